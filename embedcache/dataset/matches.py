"""Which items are among others, or near each other: copies by hash, near-duplicates by cosine, groups of a split.

Leaks and overlaps are items among others. Groups are connected components of all pairs of samples with near items.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from embedcache.arrays import Bools, Floats, Ints, distinct
from embedcache.dataset.inputs import InputFeature, Reader, to_mean_vectors, to_unit_vectors
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.vectors import ItemVectors
from embedcache.modalities import noun
from embedcache.neighbors.knn import KBest
from embedcache.neighbors.pairs import (
    Arranged,
    GroupCollector,
    Recall,
    arrange,
    cosine_limit,
    draw_probes,
    find_clusters,
    measure_recall,
)
from embedcache.processes import products_on
from embedcache.progress import NullProgress, Progress

ALL_PAIRS_LIMIT = 4e12
"""Up to this many multiplications, items × other items × width, all pairs are compared: about a minute."""

_BATCH = 65_536  # other items, so that a cluster is compared with many of them at once


class ItemSet(NamedTuple):
    """Items of one modality with a feature that compares them."""

    feature: InputFeature
    items: Items

    def vectors(self) -> ItemVectors:
        """Return the unit vectors of the items, tokens averaged."""
        return ItemVectors(self.feature.read, self.items.rows, self.feature.width, noun(self.feature.modality))

    def batches(self, size: int) -> Iterator[Floats]:
        """Iterate over the unit vectors of all items, at least `size` at a time; each chunk is read once."""
        rows = self.items.rows

        chunk_size = self.feature.group.info.chunk_size
        parts: list[Floats] = []
        for chunk in distinct(rows // chunk_size).tolist():
            chunk_rows, inputs = self.feature.chunk(chunk)
            start, stop = np.searchsorted(rows, [chunk * chunk_size, (chunk + 1) * chunk_size])
            parts.append(to_unit_vectors(inputs.take(np.searchsorted(chunk_rows, rows[start:stop]))))
            if sum(map(len, parts)) >= size:
                yield np.concatenate(parts)
                parts = []
        if parts:
            yield np.concatenate(parts)


def find_equal(items: ItemSet, others: ItemSet) -> tuple[Ints, Bools]:
    """Return the first row among others with the bytes of each item, -1 if there is none, and which others it is of."""
    hashes_Q = items.feature.hashes_of(items.items.rows)
    contents = pc.unique(hashes_Q)

    hashes_C = others.feature.hashes_of(others.items.rows)
    numbers_C = pc.fill_null(pc.index_in(hashes_C, value_set=contents, skip_nulls=True), -1).to_numpy()
    is_equal_C: Bools = numbers_C >= 0

    # The last place belongs to items without a hash. Assigned in reverse, the first row of a content stays.
    first_F = np.full(len(contents) + 1, -1, np.int64)
    first_F[numbers_C[is_equal_C][::-1]] = others.items.rows[is_equal_C][::-1]

    numbers_Q = pc.fill_null(pc.index_in(hashes_Q, value_set=contents, skip_nulls=True), -1).to_numpy()
    return first_F[numbers_Q], is_equal_C


@dataclass(frozen=True, kw_only=True)
class NearItems:
    """The closest pairs of Q items and C others, of the pairs that were compared."""

    closest: Ints  # (Q,) closest other item of each item, by its position among the others; -1 if compared with none
    sims: Floats  # (Q,) similarity to it; -inf if it was compared with none
    other_sims: Floats  # (C,) similarity of each other item to the closest item; -inf if it was compared with none
    num_clusters: int  # 1 if all pairs were compared
    complete: float  # fraction of items whose near borders were all crossed; 1 means that no pair is missing
    recall: Recall | None  # of the pairs of drawn items above the limit; None if all pairs were compared


def find_near(
    items: ItemSet,
    others: ItemSet,
    cosine: float,
    *,
    is_probe: Bools | None = None,
    all_pairs: bool | None = None,
    seed: int = 0,
    scratch: Path | str | None = None,
    device: str = "cpu",
    progress: Progress,
) -> NearItems:
    """Find the closest pairs of items and others.

    All pairs: Q C products. Clusters: about 11 C √Q, with 2 √Q clusters, and 1,000 C for the recall. Scratch space: as
    of `arrange` for the items. Memory: twice 65,536 vectors, 200 bytes per item and 4 per other item. Deterministic.

    Args:
        items: at least one item; their vectors are kept in the scratch file, and may be fewer than the others.
        others: other items of the same feature, which are read once.
        cosine: pairs of at least this cosine are to be found.
        is_probe: (Q,) items that may be drawn to measure recall. If None, all.
        all_pairs: whether all pairs are compared. If None, they are if that takes at most about a minute.
        seed: seed of the clusters and of the drawn items.
        scratch: folder of the scratch file. If None, use the system's.
        device: device that computes the products.
        progress: progress in other items.
    """
    queries = items.vectors()
    num_items = len(items.items.rows)
    num_others = len(others.items.rows)
    if all_pairs is None:
        all_pairs = num_items * num_others * queries.width <= ALL_PAIRS_LIMIT

    clusters = find_clusters(queries, cosine, all_pairs=all_pairs, seed=seed, progress=progress)

    best = KBest(num_items, 1)
    other_sims = np.full(num_others, -np.inf, np.float32)

    # The recall is measured on drawn items, which are compared with all others.
    probes = draw_probes(np.arange(num_items) if is_probe is None else np.flatnonzero(is_probe), seed)
    is_drawn = np.zeros(num_items, bool)
    is_drawn[probes] = True

    limit = cosine_limit(cosine)
    products = products_on(device)
    num_pairs = num_found = 0

    with arrange(queries, clusters, scratch=scratch, progress=NullProgress()) as arranged:
        probes_QP = arranged.read(arranged.positions[probes])
        progress.start(f"comparing with {num_others:,} {queries.unit}", num_others, queries.unit)

        start = 0
        for others_BP in others.batches(_BATCH):
            if not all_pairs:
                num_pairs += int((products(probes_QP, others_BP) >= limit).sum())

            for tile in arranged.tiles_with(others_BP, products):
                num_found += int((tile.cosines[is_drawn[tile.left]] >= limit).sum())
                best.add_block(tile.left, tile.right + start, tile.cosines)
                sims_C = other_sims[tile.right + start]
                other_sims[tile.right + start] = np.maximum(sims_C, tile.cosines.max(axis=0))
            start += len(others_BP)
            progress.advance(len(others_BP))
        progress.finish()

    return NearItems(
        closest=best.numbers[:, 0].astype(np.int64),
        sims=best.scores[:, 0],
        other_sims=other_sims,
        num_clusters=arranged.num_clusters,
        complete=clusters.complete,
        recall=None if all_pairs else Recall(num_items=len(probes), num_pairs=num_pairs, num_found=num_found),
    )


MAX_COMPARED_ITEMS = 200_000
"""Up to this many items of all modalities together, all pairs are compared."""


def pair_sides(pairs: Pairs, readers: Mapping[str, Reader]) -> dict[str, tuple[Items, Reader]]:
    """Return modality -> items and their reader; with one reader, only of the first items."""
    sides = zip((pairs.first, pairs.second), readers.items(), strict=False)
    return {modality: (items, reader) for items, (modality, reader) in sides}


def near_duplicate_groups(
    samples: Ints,
    settings: SplitSettings,
    sides: Mapping[str, tuple[Items, Reader]],
    progress: Progress,
    *,
    purpose: str = "split",
    are_useless: Callable[[Ints], bool] = lambda _: False,
) -> Ints:
    """Return the near-duplicate group of each sample: (S,) int64.

    Samples are of one group if they have near items of any modality. Groups only grow while items are compared. Once
    `are_useless` returns true for them, they are returned as they are.

    Up to 200,000 items all pairs are compared. Of more items, those within 2 √N clusters and across the 16 nearest
    borders of each item are; how many of the pairs of a random sample of items are then in one group is reported.
    Memory: a tile of similarities; of more than 200,000 items about 200 bytes each. Scratch space in the system's
    folder for temporary files: as of `arrange`. Progress names `purpose`, what the groups are for.
    """
    groups = np.arange(len(samples))
    use_all_pairs = sum(len(items.rows) for items, _ in sides.values()) <= MAX_COMPARED_ITEMS
    for modality, (items, reader) in sides.items():
        cosine = settings.cosines[modality]
        vectors = _open_items(items, reader, f"{modality} items for the {purpose}")
        clusters = find_clusters(vectors, cosine, all_pairs=use_all_pairs, seed=settings.seed, progress=progress)
        nodes = np.searchsorted(samples, items.samples)
        with arrange(vectors, clusters, progress=progress) as arranged:
            groups = _merge_near(arranged, GroupCollector(groups, nodes, cosine), are_useless, progress)

            # Groups only grow, so the other modalities cannot repair a split that has lost its parts.
            if are_useless(groups):
                return groups
            _note_recall(
                arranged, groups[nodes], cosine, f"{purpose}: {len(nodes):,} {modality} items", settings.seed, progress
            )
    return groups


def _open_items(items: Items, read: Reader, unit: str) -> ItemVectors:
    width = to_mean_vectors(read(items.rows[:1])).shape[1]
    return ItemVectors(read, items.rows, width, unit)


def _merge_near(
    arranged: Arranged, collector: GroupCollector, are_useless: Callable[[Ints], bool], progress: Progress
) -> Ints:
    for tile in arranged.tiles(progress):
        if collector.add(tile) and are_useless(collector.merge()):
            break
    return collector.merge()


def _note_recall(arranged: Arranged, groups_N: Ints, cosine: float, what: str, seed: int, progress: Progress) -> None:
    """Report how many of the pairs that hold a random item are in one group, unless all pairs were compared."""
    recall = measure_recall(
        arranged, cosine, lambda left, right: groups_N[left] == groups_N[right], seed=seed, progress=progress
    )
    if recall is None:
        return
    share = "there is none" if recall.value is None else f"{recall.value:.4f} are in one group"
    progress.note(
        f"{what} compared within clusters; of the {recall.num_pairs:,} pairs above cosine {cosine:g} that hold one of "
        f"{recall.num_items:,} random items, {share}"
    )
