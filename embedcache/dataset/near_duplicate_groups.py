"""Near-duplicate groups of a strict split: connected components of all pairs of samples with items above a cosine."""

from collections.abc import Callable, Mapping

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.inputs import Reader, to_mean_vectors
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.vectors import ItemVectors
from embedcache.neighbors.clusters import Arranged, arrange, find_clusters
from embedcache.neighbors.pairs import GroupCollector, measure_recall
from embedcache.progress import Progress

ALL_PAIRS_LIMIT = 200_000
"""Up to this many items of both modalities all pairs are compared."""


def near_duplicate_groups(
    pairs: Pairs,
    settings: SplitSettings,
    readers: Mapping[str, Reader],
    progress: Progress,
    *,
    purpose: str = "split",
    are_useless: Callable[[Ints], bool] = lambda _: False,
) -> Ints:
    """Return the near-duplicate group of each sample: (S,) int64.

    Groups only grow while items are compared. Once `are_useless` returns true for them, they are returned as they are.

    Up to 200,000 items all pairs are compared. Of more items, those within 2 √N clusters and across the 16 nearest
    borders of each item are; how many of the pairs of a random sample of items are then in one group is reported.
    Memory: a tile of similarities; of more than 200,000 items about 200 bytes each. Scratch space in the system's
    folder for temporary files: as of `arrange`. Progress names `purpose`, what the groups are for.
    """
    samples = pairs.samples
    groups = np.arange(len(samples))
    use_all_pairs = len(pairs.first.rows) + len(pairs.second.rows) <= ALL_PAIRS_LIMIT
    for items, (modality, read) in zip((pairs.first, pairs.second), readers.items(), strict=True):
        cosine = settings.cosines[modality]
        vectors = _open_items(items, read, f"{modality} items for the {purpose}")
        clusters = find_clusters(vectors, cosine, all_pairs=use_all_pairs, seed=settings.seed, progress=progress)
        nodes = np.searchsorted(samples, items.samples)
        with arrange(vectors, clusters, progress=progress) as arranged:
            groups = _merge_near(arranged, GroupCollector(groups, nodes, cosine), are_useless, progress)
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
    found = "there is none" if recall.value is None else f"{recall.value:.4f} are in one group"
    progress.note(
        f"{what} compared within clusters; of the {recall.num_pairs:,} pairs above cosine {cosine:g} that hold one of "
        f"{recall.num_items:,} random items, {found}"
    )
