"""Comparing items within clusters and across near borders, for near-duplicates among millions.

After "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", Abbas et al. 2023: k-means, then
all pairs within each cluster, which misses the pairs that a border between clusters separates. Here an item is also
compared with the members of the clusters whose border is nearest to it."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array, Bools, Floats, Ints, Products, blocks, dot_products
from embedcache.dataset.similar_pairs import CosineTile
from embedcache.errors import DiskFullError, PathError
from embedcache.files import writing
from embedcache.metrics.neighbors import spherical_means
from embedcache.progress import Progress, watch

MAX_VISITS = 16
BLOCK = 2048
PLANNED_ROWS = 262_144
READ_ROWS = 1024
_TRAINING_PER_CLUSTER = 40
_BORDER_ROUNDING = 1e-4
_MIN_SQUARED_DISTANCE = 1e-6  # nearer centroids count as this far apart, so that their border is crossed


@dataclass(frozen=True, kw_only=True)
class ClusterAssignment:
    """Clusters of B items."""

    clusters: Array  # (B,) int32, the nearest centroid of each
    cosines: Floats  # (B,) to that centroid
    visits: Array  # (B, V) int32, other clusters that may hold a near-duplicate, the nearest border first; -1: no more
    is_complete: Bools  # (B,) whether no further cluster can hold one


class ClusterAssigner:
    """A pass (see `run_pass`) that assigns the items of a mask to the nearest centroid, and to clusters to visit.

    The border of two clusters with centroids a and b is the plane of the points x with x · a = x · b. An item x in the
    cluster of a is x · (a - b) / |a - b| away from it. The arc between two items of length 1, one on each side, crosses
    the border: if their angle is at most θ, neither is further than sin θ from it. So only clusters whose border is
    that near can hold an item with a cosine of at least cos θ to x.

    In many dimensions nearly all borders are that near. Only the `max_visits` nearest are crossed, and what that misses
    must be measured.

    Args:
        centroids_KP: (K, P) centroids.
        cosine: cos θ, the cosine of near-duplicates, from 0.
        max_visits: largest number of other clusters that an item visits.
        mask_N: (N,) whether each row of the cache is assigned.
    """

    def __init__(self, centroids_KP: Floats, cosine: float, max_visits: int, mask_N: Bools) -> None:
        self._centroids_KP, self._mask_N = centroids_KP, mask_N
        self._inverse_distances_KK = _inverse_distances(centroids_KP)
        self._farthest_border = float(np.sqrt(1 - cosine**2)) + _BORDER_ROUNDING
        self._max_visits = min(max_visits, len(centroids_KP) - 1)

    def process(self, rows_B: Ints, vectors_BP: Floats) -> list[ClusterAssignment]:
        """Assign the items of a chunk."""
        cosines_BK = vectors_BP[self._mask_N[rows_B]] @ self._centroids_KP.T
        clusters_B = cosines_BK.argmax(axis=1)
        cosines_B = cosines_BK[np.arange(len(clusters_B)), clusters_B]
        borders_BK = self._border_distances(cosines_BK, clusters_B, cosines_B)
        nearest_BV, distances_BV = _nearest_borders(borders_BK, self._max_visits + 1)
        is_near_BV = distances_BV <= self._farthest_border
        visits_BV = np.where(is_near_BV, nearest_BV, -1)[:, :-1].astype(np.int32)
        assignment = ClusterAssignment(
            clusters=clusters_B.astype(np.int32), cosines=cosines_B, visits=visits_BV, is_complete=~is_near_BV[:, -1]
        )
        return [assignment]

    def merge(self, before: list[ClusterAssignment], after: list[ClusterAssignment]) -> list[ClusterAssignment]:
        """Append the assignments of later chunks."""
        before.extend(after)
        return before

    def _border_distances(self, cosines_BK: Floats, clusters_B: Ints, cosines_B: Floats) -> Floats:
        """Overwrite the cosines to all centroids with the distances to the borders; infinite to the own cluster."""
        borders_BK = np.subtract(cosines_B[:, None], cosines_BK, out=cosines_BK)
        borders_BK *= self._inverse_distances_KK[clusters_B]
        borders_BK[np.arange(len(clusters_B)), clusters_B] = np.inf
        return borders_BK


def _inverse_distances(centroids_KP: Floats) -> Floats:
    """Compute 1 / |a - b| of all pairs of centroids, in float64: (K, K) float32."""
    squared_K = np.einsum("kp,kp->k", centroids_KP, centroids_KP, dtype=np.float64)
    inverse_KK = np.empty((len(squared_K), len(squared_K)), np.float32)
    for block in blocks(len(squared_K), BLOCK):
        products_BK = centroids_KP[block].astype(np.float64) @ centroids_KP.T
        squared_BK = squared_K[block, None] + squared_K - 2 * products_BK
        inverse_KK[block] = 1 / np.sqrt(np.maximum(squared_BK, _MIN_SQUARED_DISTANCE))
    return inverse_KK


def _nearest_borders(borders_BK: Floats, count: int) -> tuple[Ints, Floats]:
    """Return the clusters with the nearest borders, and the distances to these, ascending: (B, count) each."""
    nearest_BV = np.argpartition(borders_BK, count - 1, axis=1)[:, :count]
    distances_BV = np.take_along_axis(borders_BK, nearest_BV, axis=1)
    order_BV = np.argsort(distances_BV, axis=1, kind="stable")
    return np.take_along_axis(nearest_BV, order_BV, axis=1), np.take_along_axis(distances_BV, order_BV, axis=1)


def concatenate_assignments(parts: list[ClusterAssignment]) -> ClusterAssignment:
    """Concatenate the results of a pass; the list is emptied, so that both are not in memory at once."""
    names, count = [field.name for field in fields(ClusterAssignment)], sum(len(part.clusters) for part in parts)
    joined = {
        name: np.empty((count, *getattr(parts[0], name).shape[1:]), getattr(parts[0], name).dtype) for name in names
    }
    stop = count
    while parts:
        part = parts.pop()
        start = stop - len(part.clusters)
        for name in names:
            joined[name][start:stop] = getattr(part, name)
        stop = start
    return ClusterAssignment(**joined)


def cluster_items(
    read: Callable[[Ints], Floats], num_items: int, cosine: float, *, seed: int, what: str, progress: Progress
) -> tuple[Floats, ClusterAssignment]:
    """Divide items into 2 √N clusters by `spherical_means` of some of them: (K, P) centroids, and the assignment.

    Memory: 40 vectors per cluster, and 80 bytes per item.

    Args:
        read: returns the vectors of length 1 of items by their numbers, which start from 0: (B,) -> (B, P) float32.
        num_items: number of items.
        cosine: of near-duplicates, whose clusters an item visits.
        what: the items, for progress.
    """
    rng = np.random.default_rng(seed)
    num_clusters = round(2 * math.sqrt(num_items))
    drawn = np.sort(rng.permutation(num_items)[: _TRAINING_PER_CLUSTER * num_clusters])
    vectors_SP = np.concatenate([read(drawn[block]) for block in blocks(len(drawn), READ_ROWS)])
    finding = f"finding {num_clusters:,} clusters of {what}"
    centroids_KP = spherical_means(vectors_SP, num_clusters, seed=seed, what=finding, progress=progress)
    assigner = ClusterAssigner(centroids_KP, max(cosine, 0.0), MAX_VISITS, np.ones(num_items, bool))
    assigned = []
    for block in watch(blocks(num_items, BLOCK), progress, f"clustering {what}", num_items, "items"):
        numbers = np.arange(block.start, block.stop)
        assigned += assigner.process(numbers, read(numbers))
    return centroids_KP, concatenate_assignments(assigned)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The compared items. Positions are rows of the scratch matrix: cluster by cluster, in item order within each."""

    items: Ints  # (N,) the item at each position
    starts: Ints  # (K + 1,) the position where each cluster begins
    visitors: Array  # (V,) positions, by the cluster that they visit
    visitor_starts: Ints  # (K + 1,) where in `visitors` each cluster's begin


def make_plan(assignment: ClusterAssignment | None, num_items: int) -> Plan:
    """Sort items by cluster; without an assignment all are in one. Memory: about 30 bytes per item and 4 per visit."""
    clusters = np.zeros(num_items, np.int32) if assignment is None else assignment.clusters
    visits = np.empty((num_items, 0), np.int32) if assignment is None else assignment.visits
    num_clusters = int(max(clusters.max(), visits.max(initial=0))) + 1
    items = np.argsort(clusters, kind="stable")
    visitors, visitor_starts = _sort_visits(visits, items, num_clusters)
    return Plan(
        items=items,
        starts=_starts(np.bincount(clusters, minlength=num_clusters)),
        visitors=visitors,
        visitor_starts=visitor_starts,
    )


def _sort_visits(visits: Array, items: Ints, num_clusters: int) -> tuple[Array, Ints]:
    """Sort the positions of visitors by the cluster that they visit: (V,) int32, and where each cluster's begin.

    By counting, in blocks: first how many visitors each cluster has, then each visitor into the next place of its
    cluster.
    """
    counts_K = np.zeros(num_clusters, np.int64)
    for block in blocks(len(items), PLANNED_ROWS):
        counts_K += np.bincount(visits[block][visits[block] >= 0], minlength=num_clusters)
    visitor_starts = _starts(counts_K)
    visitors, next_K = np.empty(int(visitor_starts[-1]), np.int32), visitor_starts[:-1].copy()
    for block in blocks(len(items), PLANNED_ROWS):
        visits_BV = visits[items[block]]
        position, _ = np.nonzero(visits_BV >= 0)
        visited = visits_BV[visits_BV >= 0]
        order = np.argsort(visited, kind="stable")
        counts_K = np.bincount(visited, minlength=num_clusters)
        first_K = np.cumsum(counts_K) - counts_K  # where each cluster's begin in this block
        visitors[np.arange(len(order)) + np.repeat(next_K - first_K, counts_K)] = position[order] + block.start
        next_K += counts_K
    return visitors, visitor_starts


def _starts(counts_K: Ints) -> Ints:
    """Return where each of several consecutive ranges begins, and where the last ends: (K + 1,)."""
    return np.concatenate([[0], np.cumsum(counts_K)])


@contextmanager
def scratch_matrix(scratch: Path | str | None, shape: tuple[int, int], dtype: npt.DTypeLike) -> Iterator[Array]:
    """Create a matrix in an unnamed file, which vanishes even if the process is killed; its space is allocated at once.

    It is in the folder `scratch`, or, if that is None, in the system's for temporary files. Raises `PathError` if the
    folder does not exist, and `DiskFullError` if the matrix does not fit.
    """
    folder = Path(scratch or tempfile.gettempdir())
    if not folder.is_dir():
        raise PathError(
            f"scratch: expected an existing folder, got {folder}; create it, or give another with --scratch"
        )
    needed, free = shape[0] * shape[1] * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"comparing {shape[0]:,} vectors needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free; free some, or give another folder with --scratch"
        )
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, needed))  # a hole that cannot be filled later would be a SIGBUS
        yield np.memmap(file, dtype, "r+", shape=shape)


def iterate_tiles(
    matrix_NP: Array, plan: Plan, *, products: Products = dot_products
) -> Iterator[tuple[CosineTile, int]]:
    """Iterate over the cosines of all pairs within clusters and of visitors, with the number of items that are done.

    Args:
        matrix_NP: rows of length 1 in the order of `plan.items`.
        plan: the clusters.
        products: computes dot products, perhaps on a GPU.
    """
    for cluster in range(len(plan.starts) - 1):
        members = np.arange(plan.starts[cluster], plan.starts[cluster + 1])
        visitors = plan.visitors[plan.visitor_starts[cluster] : plan.visitor_starts[cluster + 1]]
        yield from _tiles_within(matrix_NP, plan.items, members, products)
        for tile in _tiles_across(matrix_NP, plan.items, visitors, members, products):
            yield tile, 0


def _tiles_within(
    matrix_NP: Array, items_N: Ints, members: Ints, products: Products
) -> Iterator[tuple[CosineTile, int]]:
    """Compare each pair of members once."""
    for block in blocks(len(members), BLOCK):
        left, left_BP = items_N[members[block]], to_float32(matrix_NP[members[block][0] : members[block][-1] + 1])
        yield CosineTile(left=left, right=left, cosines=products(left_BP, left_BP), is_diagonal=True), len(left)
        for other in blocks(len(members) - block.stop, BLOCK):
            right = members[block.stop :][other]
            right_BP = to_float32(matrix_NP[right[0] : right[-1] + 1])
            yield CosineTile(left=left, right=items_N[right], cosines=products(left_BP, right_BP)), 0


def _tiles_across(
    matrix_NP: Array, items_N: Ints, visitors: Array, members: Ints, products: Products
) -> Iterator[CosineTile]:
    """Compare each visitor with each member."""
    for other in blocks(len(members) if len(visitors) else 0, BLOCK):
        right = members[other]
        right_BP = to_float32(matrix_NP[right[0] : right[-1] + 1])
        for block in blocks(len(visitors), BLOCK):
            left = visitors[block]
            cosines = products(to_float32(matrix_NP[left]), right_BP)
            yield CosineTile(left=items_N[left], right=items_N[right], cosines=cosines)


def to_float32(values: Array) -> Floats:
    """Return an array in which cosines are computed."""
    return np.asarray(values, np.float32)
