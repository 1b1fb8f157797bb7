"""Clusters of near vectors, and the tiles of cosines within them and across near borders.

After "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", Abbas et al. 2023: k-means, then
all pairs within each cluster, which misses the pairs that a border between clusters separates. Here an item is also
compared with the members of the clusters whose border is nearest to it."""

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy

from embedcache.arrays import Array, Bools, Floats, Ints, Products, blocks, dot_products, normalize
from embedcache.errors import DiskFullError, PathError
from embedcache.files import writing
from embedcache.neighbors.scan import StoredVectors, scan
from embedcache.progress import NullProgress, Progress

MAX_VISITS = 16
BLOCK = 2048
_ITERATIONS = 10
_TRAINING_PER_CLUSTER = 40  # FAISS asks for 39 at least
_BORDER_ROUNDING = 1e-4
_MIN_SQUARED_DISTANCE = 1e-6  # nearer centroids count as this far apart, so that their border is crossed


def spherical_means(vectors_NP: Floats, num_clusters: int, *, seed: int, progress: Progress | None = None) -> Floats:
    """Cluster rows of length 1 by k-means with cosines: (K, P) float32 centroids of length 1, K at most N.

    Ten iterations from random rows; a cluster that loses all its rows keeps its centroid. Memory: a tile of
    similarities.
    """
    chosen = np.random.default_rng(seed).choice(len(vectors_NP), min(num_clusters, len(vectors_NP)), replace=False)
    centroids_KP = vectors_NP[np.sort(chosen)]
    progress = progress or NullProgress()
    progress.start(f"finding {len(centroids_KP):,} clusters", _ITERATIONS, "iterations")
    for _ in range(_ITERATIONS):
        nearest = [(vectors_NP[tile] @ centroids_KP.T).argmax(axis=1) for tile in blocks(len(vectors_NP), BLOCK)]
        members = scipy.sparse.csr_array(
            (np.ones(len(vectors_NP), np.float32), (np.concatenate(nearest), np.arange(len(vectors_NP)))),
            shape=(len(centroids_KP), len(vectors_NP)),
        )
        means_KP = normalize(members @ vectors_NP)
        centroids_KP = np.where(np.any(means_KP, axis=1)[:, None], means_KP, centroids_KP)
        progress.advance(1)
    progress.finish()
    return centroids_KP


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Clusters of N items, which are numbered in the order of their rows."""

    centroids: Floats  # (K, P)
    numbers: Array  # (N,) int32, the nearest centroid of each item
    visits: Array  # (N, V) int32, other clusters that may hold a near-duplicate, the nearest border first; K: no more
    complete: float  # fraction of items that visit every cluster that may hold one; 1 means that no pair is missing


def find_clusters(
    vectors: StoredVectors,
    cosine: float,
    *,
    all_pairs: bool = False,
    fit: Callable[..., Floats] = spherical_means,
    seed: int = 0,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    progress: Progress,
) -> Clusters:
    """Divide items into 2 √N clusters by k-means of some of them, and find the clusters that each visits.

    The border of two clusters with centroids a and b is the plane of the points x with x · a = x · b. An item x in the
    cluster of a is x · (a - b) / |a - b| away from it. The arc between two items of length 1, one on each side, crosses
    the border: if their angle is at most θ, neither is further than sin θ from it. So only clusters whose border is
    that near can hold an item with a cosine of at least cos θ to x. In many dimensions nearly all borders are that
    near. Only the 16 nearest are crossed, and what that misses must be measured.

    Memory: 40 vectors per cluster, and 80 bytes per item.

    Args:
        vectors: the items.
        cosine: cos θ, the cosine of near-duplicates; below 0 it counts as 0.
        all_pairs: all items are one cluster.
        fit: k-means, as `spherical_means`.
        seed: of the items drawn for k-means, and of k-means.
        engine: as of `scan`, like `address`.
    """
    rows = vectors.rows
    if all_pairs:
        return Clusters(
            centroids=np.zeros((1, vectors.width), np.float32),
            numbers=np.zeros(len(rows), np.int32),
            visits=np.empty((len(rows), 0), np.int32),
            complete=1.0,
        )
    num_clusters = round(2 * math.sqrt(len(rows)))
    drawn = np.sort(np.random.default_rng(seed).permutation(rows)[: _TRAINING_PER_CLUSTER * num_clusters])
    training_SP = copy.copy(vectors).read(drawn)  # a copy, so that its maps of the whole feature are freed
    centroids_KP = fit(training_SP, min(num_clusters, len(drawn)), seed=seed, progress=progress)
    del training_SP

    num_visits = min(MAX_VISITS, len(centroids_KP) - 1)
    numbers_N = np.empty(len(rows), np.int32)
    visits_NV = np.empty((len(rows), num_visits), np.int32)
    num_complete = 0
    farthest = math.sqrt(1 - max(cosine, 0.0) ** 2) + _BORDER_ROUNDING
    assign = partial(_assign, centroids_KP, _inverse_distances(centroids_KP), farthest, num_visits)
    title = f"assigning {vectors.unit} to {len(centroids_KP):,} clusters"
    for rows_B, *assigned, is_complete_B in scan(
        vectors, assign, engine=engine, address=address, title=title, progress=progress
    ):
        items_B = np.searchsorted(rows, rows_B)
        numbers_N[items_B], visits_NV[items_B] = assigned
        num_complete += int(is_complete_B.sum())
    complete = num_complete / len(rows)
    return Clusters(centroids=centroids_KP, numbers=numbers_N, visits=visits_NV, complete=complete)


def _assign(
    centroids_KP: Floats, inverse_KK: Floats, farthest: float, num_visits: int, rows_B: Ints, vectors_BP: Floats
) -> tuple[Ints, Array, Array, Bools]:
    """Return the rows, clusters and visits of items, and whether they visit all clusters that are near.

    Args:
        centroids_KP: centroids.
        inverse_KK: 1 / |a - b| of all pairs of them.
        farthest: distance of the farthest border that is near.
        num_visits: largest number of other clusters that an item visits.
    """
    cosines_BK = vectors_BP @ centroids_KP.T
    items = np.arange(len(rows_B))
    clusters_B = cosines_BK.argmax(axis=1)
    cosines_B = cosines_BK[items, clusters_B]
    borders_BK = np.subtract(cosines_B[:, None], cosines_BK, out=cosines_BK)
    borders_BK *= inverse_KK[clusters_B]
    borders_BK[items, clusters_B] = np.inf

    # One more than is visited: if that one is far, all near ones are visited.
    nearest_BV = np.argpartition(borders_BK, num_visits, axis=1)[:, : num_visits + 1]
    distances_BV = np.take_along_axis(borders_BK, nearest_BV, axis=1)
    order_BV = np.argsort(distances_BV, axis=1, kind="stable")
    nearest_BV = np.take_along_axis(nearest_BV, order_BV, axis=1)
    is_near_BV = np.take_along_axis(distances_BV, order_BV, axis=1) <= farthest
    visits_BV = np.where(is_near_BV, nearest_BV, len(centroids_KP))[:, :-1].astype(np.int32)
    return rows_B, clusters_B.astype(np.int32), visits_BV, ~is_near_BV[:, -1]


def _inverse_distances(centroids_KP: Floats) -> Floats:
    """Compute 1 / |a - b| of all pairs of centroids, in float64: (K, K) float32."""
    squared_K = np.einsum("kp,kp->k", centroids_KP, centroids_KP, dtype=np.float64)
    inverse_KK = np.empty((len(squared_K), len(squared_K)), np.float32)
    for block in blocks(len(squared_K), BLOCK):
        products_BK = centroids_KP[block].astype(np.float64) @ centroids_KP.T
        squared_BK = squared_K[block, None] + squared_K - 2 * products_BK
        inverse_KK[block] = 1 / np.sqrt(np.maximum(squared_BK, _MIN_SQUARED_DISTANCE))
    return inverse_KK


@dataclass(frozen=True, kw_only=True)
class CosineTile:
    """Cosine similarities of some items to others, both unique."""

    left: Ints  # (B,) numbers of items
    right: Ints  # (R,) numbers of items
    cosines: Floats  # (B, R); who receives it may change it
    is_diagonal: bool = False  # whether both are the same items; otherwise they have none in common


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """N vectors in a scratch file, cluster by cluster."""

    matrix: Array  # (N, P) float16, or float32 if all are in one cluster
    items: Ints  # (N,) item at each position, in the order of the rows within a cluster
    positions: Ints  # (N,) position of each item
    starts: Ints  # (K + 1,) position where each cluster begins
    visitors: Array  # items, by the cluster that they visit
    visitor_starts: Ints  # (K + 1,) where in `visitors` each cluster's begin
    clusters: Clusters
    unit: str  # what the items are

    @property
    def num_clusters(self) -> int:
        """Number of clusters; 1 if all pairs are compared."""
        return len(self.clusters.centroids)

    def read(self, positions: Ints | slice) -> Floats:
        """Return the vectors at some positions."""
        import torch  # which converts float16 ten times as fast as NumPy

        vectors_BP: Floats = torch.from_numpy(self.matrix[positions]).float().numpy()
        return vectors_BP

    def tiles(self, progress: Progress, *, products: Products = dot_products) -> Iterator[CosineTile]:
        """Iterate over the cosines of all pairs within clusters and of visitors, some of them twice."""
        progress.start(f"comparing {self.unit}", len(self.items), "items")
        for cluster in range(self.num_clusters):
            members = np.arange(self.starts[cluster], self.starts[cluster + 1])
            for block in blocks(len(members), BLOCK):
                left_BP = self.read(slice(members[block][0], members[block][-1] + 1))
                left = self.items[members[block]]
                yield CosineTile(left=left, right=left, cosines=products(left_BP, left_BP), is_diagonal=True)
                yield from self._tiles_across(left, left_BP, members[block.stop :], products)
                progress.advance(len(left))
            visitors = np.sort(self.positions[self._visitors(cluster)])
            for block in blocks(len(visitors) if len(members) else 0, BLOCK):
                left_BP = self.read(visitors[block])
                yield from self._tiles_across(self.items[visitors[block]], left_BP, members, products)
        progress.finish()

    def _visitors(self, cluster: int) -> Array:
        return self.visitors[self.visitor_starts[cluster] : self.visitor_starts[cluster + 1]]

    def _tiles_across(self, left: Ints, left_BP: Floats, members: Ints, products: Products) -> Iterator[CosineTile]:
        """Compare some items with those at consecutive positions."""
        for block in blocks(len(members), BLOCK):
            right = members[block]
            right_BP = self.read(slice(right[0], right[-1] + 1))
            yield CosineTile(left=left, right=self.items[right], cosines=products(left_BP, right_BP))

    def tiles_with(self, others_BP: Floats, products: Products = dot_products) -> Iterator[CosineTile]:
        """Iterate over the cosines of the items of each cluster and its visitors to the others that are nearest to it.

        The others, of length 1, are numbered from 0.
        """
        centroids_KP = self.clusters.centroids
        nearest = [products(others_BP[tile], centroids_KP).argmax(axis=1) for tile in blocks(len(others_BP), BLOCK)]
        clusters_B = np.concatenate(nearest)
        order_B = np.argsort(clusters_B, kind="stable")
        other_starts = np.searchsorted(clusters_B[order_B], np.arange(self.num_clusters + 1))
        for cluster in np.flatnonzero(np.diff(other_starts)).tolist():
            members = self.items[self.starts[cluster] : self.starts[cluster + 1]]
            items = np.concatenate([members, self._visitors(cluster)])
            others = order_B[other_starts[cluster] : other_starts[cluster + 1]]
            for block in blocks(len(items), BLOCK):
                left_BP = self.read(self.positions[items[block]])
                for part in blocks(len(others), BLOCK):
                    cosines = products(left_BP, others_BP[others[part]])
                    yield CosineTile(left=items[block], right=others[part], cosines=cosines)


@contextmanager
def arrange(
    vectors: StoredVectors, clusters: Clusters, *, scratch: Path | str | None = None, progress: Progress
) -> Iterator[Arranged]:
    """Write vectors to a scratch file in the order in which they are compared.

    Scratch space: `4 N P` bytes, or with several clusters `2 N P` in float16, whose rounding changes a cosine by 1e-5.
    Memory: pages of the scratch file, which the system may drop, and about 40 bytes per item and 6 per visit.

    Args:
        vectors: the items.
        clusters: their clusters.
        scratch: folder of the scratch file; None: the system's for temporary files.

    Raises:
        PathError, DiskFullError: as of `scratch_matrix`.
    """
    count = len(vectors.rows)
    num_clusters = len(clusters.centroids)
    items = np.argsort(clusters.numbers, kind="stable")
    positions = np.empty(count, np.int64)
    positions[items] = np.arange(count)
    visitors, visitor_starts = _sort_visits(clusters)
    dtype = np.float32 if num_clusters == 1 else np.float16
    with scratch_matrix(scratch, (count, vectors.width), dtype) as matrix_NP:
        progress.start(f"sorting {vectors.unit}", count, "items")
        for chunk in range(vectors.num_chunks):
            rows_B, vectors_BP = vectors.chunk(chunk)
            matrix_NP[positions[np.searchsorted(vectors.rows, rows_B)]] = vectors_BP
            progress.advance(len(rows_B))
        progress.finish()
        yield Arranged(
            matrix=matrix_NP,
            items=items,
            positions=positions,
            starts=np.concatenate([[0], np.cumsum(np.bincount(clusters.numbers, minlength=num_clusters))]),
            visitors=visitors,
            visitor_starts=visitor_starts,
            clusters=clusters,
            unit=vectors.unit,
        )


def _sort_visits(clusters: Clusters) -> tuple[Array, Array]:
    """Sort items by the cluster that they visit: (V,) int32, and where each cluster's begin."""
    num_items, num_visits = clusters.visits.shape
    visited = clusters.visits.ravel()
    by_item = (np.ones(len(visited), bool), visited, np.arange(num_items + 1) * num_visits)
    shape = (num_items, len(clusters.centroids) + 1)  # the last column is that of no cluster
    by_cluster = scipy.sparse.csr_array(by_item, shape=shape).tocsc()
    return by_cluster.indices, by_cluster.indptr


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
    needed = shape[0] * shape[1] * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"comparing {shape[0]:,} vectors needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free; free some, or give another folder with --scratch"
        )
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, needed))  # a hole that cannot be filled later would be a SIGBUS
        yield np.memmap(file, dtype, "r+", shape=shape)
