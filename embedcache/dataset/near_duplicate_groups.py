"""Near-duplicate groups of a strict split: connected components of all pairs of samples with items above a cosine."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from embedcache.arrays import Array, Ints, blocks
from embedcache.dataset.clusters import (
    BLOCK,
    READ_ROWS,
    cluster_items,
    iterate_tiles,
    make_plan,
    scratch_matrix,
    to_float32,
)
from embedcache.dataset.inputs import Reader, to_unit_vectors
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.settings import SplitSettings
from embedcache.metrics.neighbors import iterate_pairs_above
from embedcache.progress import Progress, watch

ALL_PAIRS_LIMIT = 200_000
"""Up to this many items of both modalities all pairs are compared."""

_NUM_PROBES = 1000
_MAX_EDGES = 4_000_000


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
    Memory: a tile of similarities; of more than 200,000 items about 200 bytes each, and 2 N D bytes of scratch space in
    the system's folder for temporary files. Progress names `purpose`, what the groups are for.
    """
    samples = pairs.samples
    labels = np.arange(len(samples))
    use_all_pairs = len(pairs.first.rows) + len(pairs.second.rows) <= ALL_PAIRS_LIMIT
    for items, (modality, read) in zip((pairs.first, pairs.second), readers.items(), strict=True):
        nodes, cosine = np.searchsorted(samples, items.samples), settings.cosines[modality]
        compared = _ComparedItems(modality, items, nodes, cosine, settings.seed, purpose, are_useless)
        labels = (_merge_all_pairs if use_all_pairs else _merge_clusters)(compared, read, labels, progress)
        if compared.are_useless(labels):
            break
    return labels


@dataclass(frozen=True)
class _ComparedItems:
    """Items of one modality that are compared.

    Args:
        items: M items.
        nodes: (M,) position of each item's sample among the samples of the split.
        cosine: above it, two items join the groups of their samples.
        are_useless: whether groups, which only grow, need no further comparison.
    """

    modality: str
    items: Items
    nodes: Ints
    cosine: float
    seed: int
    purpose: str
    are_useless: Callable[[Ints], bool]

    @property
    def what(self) -> str:
        return f"{self.modality} items for the {self.purpose}"

    @property
    def step(self) -> str:
        return f"comparing {self.what}"


def _merge_all_pairs(compared: _ComparedItems, read: Reader, labels: Ints, progress: Progress) -> Ints:
    rows = compared.items.rows
    vectors_ND = np.concatenate([to_unit_vectors(read(rows[block])) for block in blocks(len(rows), READ_ROWS)])
    for row, column in iterate_pairs_above(vectors_ND, compared.cosine, what=compared.step, progress=progress):
        for edges in blocks(len(row), _MAX_EDGES):
            labels = _merge(labels, compared.nodes[row[edges]], compared.nodes[column[edges]])
            if compared.are_useless(labels):
                return labels
    return labels


def _merge(labels: Ints, left: Ints, right: Ints) -> Ints:
    """Merge the groups of pairs of nodes: (S,) int64."""
    left, right = np.concatenate([labels[left], labels]), np.concatenate([labels[right], labels])
    size = int(labels.max()) + 1
    edges = scipy.sparse.coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
    _, component = scipy.sparse.csgraph.connected_components(edges, directed=False)
    merged: Ints = component[labels].astype(np.int64)
    return merged


def _merge_clusters(compared: _ComparedItems, read: Reader, labels: Ints, progress: Progress) -> Ints:
    rows, count, what = compared.items.rows, len(compared.items.rows), compared.what
    centroids_KP, assignment = cluster_items(
        lambda numbers: to_unit_vectors(read(rows[numbers])),
        count,
        compared.cosine,
        seed=compared.seed,
        what=what,
        progress=progress,
    )
    plan = make_plan(assignment, count)
    position_N = np.empty(count, np.int64)
    position_N[plan.items] = np.arange(count)
    with scratch_matrix(Path(tempfile.gettempdir()), (count, centroids_KP.shape[1]), np.float16) as matrix_NP:
        for block in watch(blocks(count, BLOCK), progress, f"sorting {what}", count, "items"):
            matrix_NP[position_N[block]] = to_unit_vectors(read(rows[block]))
        progress.start(compared.step, count, "items")
        edges, num_edges = [], 0
        for tile, num_done in iterate_tiles(matrix_NP, plan):
            row, column = np.nonzero(tile.cosines > compared.cosine)
            if len(row):
                edges.append(_spanning(compared.nodes[tile.left[row]], compared.nodes[tile.right[column]]))
                num_edges += edges[-1].shape[1]
            if num_edges > _MAX_EDGES:
                labels, edges, num_edges = _merge(labels, *np.concatenate(edges, axis=1)), [], 0
                if compared.are_useless(labels):
                    return labels
            progress.advance(num_done)
        if edges:
            labels = _merge(labels, *np.concatenate(edges, axis=1))
        progress.finish()
        _note_recall(compared, matrix_NP, plan.items, labels, progress)
    return labels


def _spanning(left: Ints, right: Ints) -> Array:
    """Return at most one edge per node that connects what the given edges connect: (2, E)."""
    nodes, codes = np.unique(np.concatenate([left, right]), return_inverse=True)
    shape = (len(nodes), len(nodes))
    edges = scipy.sparse.coo_array((np.ones(len(left), bool), (codes[: len(left)], codes[len(left) :])), shape=shape)
    count, component = scipy.sparse.csgraph.connected_components(edges, directed=False)
    first_of = np.empty(count, np.int64)
    first_of[component[::-1]] = nodes[::-1]
    is_other = first_of[component] != nodes
    return np.stack([nodes[is_other], first_of[component][is_other]])


def _note_recall(compared: _ComparedItems, matrix_NP: Array, items_N: Ints, labels: Ints, progress: Progress) -> None:
    """Compare random items with all, and report how many of their pairs above the cosine are in one group."""
    count = len(matrix_NP)
    probes = np.sort(np.random.default_rng(compared.seed).permutation(count)[:_NUM_PROBES])
    probes_QP, groups_N = to_float32(matrix_NP[probes]), labels[compared.nodes[items_N]]
    num_pairs = num_found = 0
    parts = blocks(count, 8 * BLOCK)
    for block in watch(parts, progress, f"measuring the recall of {compared.modality} items", count, "items"):
        query, other = np.nonzero(probes_QP @ to_float32(matrix_NP[block]).T > compared.cosine)
        is_pair = probes[query] != other + block.start
        num_pairs += int(is_pair.sum())
        num_found += int((groups_N[probes[query]] == groups_N[other + block.start])[is_pair].sum())
    found = "there is none" if not num_pairs else f"{num_found / num_pairs:.4f} are in one group"
    progress.note(
        f"{compared.purpose}: {count:,} {compared.modality} items compared within clusters; of the {num_pairs:,} pairs "
        f"above cosine {compared.cosine:g} that hold one of {len(probes):,} random items, {found}"
    )
