"""Find pairs of near vectors by clusters, tiles of cosines within them and across near borders, and collectors.

"SemDeDup: Data-efficient learning at web-scale through semantic deduplication" (Abbas et al. 2023) runs k-means and
compares all pairs within each cluster. It misses the pairs that a border between clusters separates. Here an item is
also compared with the members of the clusters whose border is nearest to it. A sample of items measures the fraction of
true pairs that were found.
"""

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy

from embedcache.arrays import Array, Bools, Floats, Ints, Products, blocks, dot_products, normalize
from embedcache.errors import DiskFullError, PathError
from embedcache.files import writing
from embedcache.neighbors.knn import KBest, StoredVectors, knn, scan
from embedcache.progress import NullProgress, Progress, watch

MAX_VISITS = 16
BLOCK = 2048
_ITERATIONS = 10
_TRAINING_PER_CLUSTER = 40  # FAISS asks for 39 at least
_BORDER_ROUNDING = 1e-4
_MIN_SQUARED_DISTANCE = 1e-6  # nearer centroids count as this far apart, so that their border is crossed
NOT_COMPARED = np.float32(-2)
"""Largest cosine of an item that was compared with no other item."""

_ALMOST_ONE = 1 - 1e-5  # equal vectors reach this in spite of rounding
_ROUNDING = 1e-6  # two ways of summing one cosine in float32
_NUM_PROBES = 1000


def spherical_means(vectors_NP: Floats, num_clusters: int, *, seed: int, progress: Progress | None = None) -> Floats:
    """Cluster rows of length 1 by k-means with cosines: (K, P) float32 centroids of length 1, K at most N.

    It runs ten iterations from random rows. A cluster that loses all its rows keeps its centroid. Memory: a tile of
    similarities.
    """
    chosen = np.random.default_rng(seed).choice(len(vectors_NP), min(num_clusters, len(vectors_NP)), replace=False)
    centroids_KP = vectors_NP[np.sort(chosen)]

    # Sums over the members of each cluster are one sparse product.
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
    visits: Array  # (N, V) int32, other clusters that may have a near-duplicate, the nearest border first, then K
    complete: float  # fraction of items that visit every cluster that may have one; 1 means that no pair is missing


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
    the border. If their angle is at most θ, neither is further than sin θ from it. So only clusters whose border is
    that near can have an item with a cosine of at least cos θ to x. In many dimensions nearly all borders are that
    near. Only the 16 nearest are crossed, so the missed pairs must be measured.

    Memory: 40 vectors per cluster, and 80 bytes per item.

    Args:
        vectors: the items.
        cosine: cos θ, the cosine of near-duplicates. A negative one counts as 0.
        all_pairs: put all items into one cluster.
        fit: k-means, such as `spherical_means`.
        seed: random seed of the items drawn for k-means, and of k-means.
        engine: see `scan`.
        address: see `scan`.
        progress: progress in items.
    """
    rows = vectors.rows
    if all_pairs:
        return Clusters(
            centroids=np.zeros((1, vectors.width), np.float32),
            numbers=np.zeros(len(rows), np.int32),
            visits=np.empty((len(rows), 0), np.int32),
            complete=1.0,
        )

    # The vectors are read through a copy, so that its maps of the whole feature are freed.
    num_clusters = round(2 * math.sqrt(len(rows)))
    training_rows = np.sort(np.random.default_rng(seed).permutation(rows)[: _TRAINING_PER_CLUSTER * num_clusters])
    training_SP = copy.copy(vectors).read(training_rows)
    centroids_KP = fit(training_SP, min(num_clusters, len(training_rows)), seed=seed, progress=progress)
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
        inverse_KK: 1 / |a - b| of all pairs of centroids.
        farthest: largest distance of a near border.
        num_visits: largest number of other clusters that an item visits.
        rows_B: rows of the items.
        vectors_BP: vectors of the items.
    """
    cosines_BK = vectors_BP @ centroids_KP.T
    items = np.arange(len(rows_B))
    clusters_B = cosines_BK.argmax(axis=1)
    cosines_B = cosines_BK[items, clusters_B]

    # Distances to the borders overwrite the cosines to save memory.
    borders_BK = np.subtract(cosines_B[:, None], cosines_BK, out=cosines_BK)
    borders_BK *= inverse_KK[clusters_B]
    borders_BK[items, clusters_B] = np.inf

    # One more border than is visited: if it is far, all near clusters are visited.
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
    right: Ints  # (C,) numbers of items
    cosines: Floats  # (B, C), which the receiver may change
    is_diagonal: bool = False  # whether both are the same items; otherwise they have none in common


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """N vectors in a scratch file, cluster by cluster."""

    matrix: Array  # (N, P) float16, or float32 if all are in one cluster
    items: Ints  # (N,) item at each position, in the order of the rows within a cluster
    positions: Ints  # (N,) position of each item
    starts: Ints  # (K + 1,) position where each cluster begins
    visitors: Array  # items, by the cluster that they visit
    visitor_starts: Ints  # (K + 1,) place in `visitors` where each cluster begins
    clusters: Clusters
    unit: str  # name of the items, such as `images`

    @property
    def num_clusters(self) -> int:
        """Number of clusters, which is 1 if all pairs are compared."""
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

            # Members with themselves, and with later members, so that each pair comes once.
            for block in blocks(len(members), BLOCK):
                left_BP = self.read(slice(members[block][0], members[block][-1] + 1))
                left = self.items[members[block]]
                yield CosineTile(left=left, right=left, cosines=products(left_BP, left_BP), is_diagonal=True)
                yield from self._tiles_across(left, left_BP, members[block.stop :], products)
                progress.advance(len(left))

            # Visitors are sorted by position, as consecutive reads are faster.
            visitors = np.sort(self.positions[self._visitors(cluster)])
            for block in blocks(len(visitors) if len(members) else 0, BLOCK):
                left_BP = self.read(visitors[block])
                yield from self._tiles_across(self.items[visitors[block]], left_BP, members, products)
        progress.finish()

    def _visitors(self, cluster: int) -> Array:
        return self.visitors[self.visitor_starts[cluster] : self.visitor_starts[cluster + 1]]

    def _tiles_across(self, left: Ints, left_BP: Floats, members: Ints, products: Products) -> Iterator[CosineTile]:
        """Compare some items with the items at consecutive positions."""
        for block in blocks(len(members), BLOCK):
            right = members[block]
            right_BP = self.read(slice(right[0], right[-1] + 1))
            yield CosineTile(left=left, right=self.items[right], cosines=products(left_BP, right_BP))

    def tiles_with(self, others_BP: Floats, products: Products = dot_products) -> Iterator[CosineTile]:
        """Iterate over the cosines of other vectors to the items and visitors of their nearest clusters.

        The other vectors, of length 1, are numbered from 0.
        """
        centroids_KP = self.clusters.centroids
        nearest = [products(others_BP[tile], centroids_KP).argmax(axis=1) for tile in blocks(len(others_BP), BLOCK)]
        clusters_B = np.concatenate(nearest)
        order_B = np.argsort(clusters_B, kind="stable")
        other_starts = np.searchsorted(clusters_B[order_B], np.arange(self.num_clusters + 1))

        # Only clusters that some other vector is nearest to are read.
        for cluster in np.flatnonzero(np.diff(other_starts)).tolist():
            members = self.items[self.starts[cluster] : self.starts[cluster + 1]]
            items = np.concatenate([members, self._visitors(cluster)])
            numbers = order_B[other_starts[cluster] : other_starts[cluster + 1]]
            for block in blocks(len(items), BLOCK):
                left_BP = self.read(self.positions[items[block]])
                for part in blocks(len(numbers), BLOCK):
                    cosines = products(left_BP, others_BP[numbers[part]])
                    yield CosineTile(left=items[block], right=numbers[part], cosines=cosines)


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
        scratch: folder of the scratch file. If None, use the system's folder for temporary files.
        progress: progress in items.

    Raises:
        PathError, DiskFullError: see `scratch_matrix`.
    """
    count = len(vectors.rows)
    num_clusters = len(clusters.centroids)
    items = np.argsort(clusters.numbers, kind="stable")
    positions = np.empty(count, np.int64)
    positions[items] = np.arange(count)
    visitors, visitor_starts = _sort_visits(clusters)

    # Clusters are compared approximately anyway, so that float16 may halve the scratch space.
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
    """Sort items by the cluster that they visit: (V,) int32. Also return the place where each cluster begins."""
    num_items, num_visits = clusters.visits.shape
    numbers = clusters.visits.ravel()
    by_item = (np.ones(len(numbers), bool), numbers, np.arange(num_items + 1) * num_visits)
    shape = (num_items, len(clusters.centroids) + 1)  # the last column stands for no cluster
    by_cluster = scipy.sparse.csr_array(by_item, shape=shape).tocsc()
    return by_cluster.indices, by_cluster.indptr


@contextmanager
def scratch_matrix(scratch: Path | str | None, shape: tuple[int, int], dtype: npt.DTypeLike) -> Iterator[Array]:
    """Create a matrix in an unnamed file, which vanishes even if the process is killed.

    The file is in the folder `scratch` or, if that is None, in the system's folder for temporary files. Its whole space
    is allocated immediately. Raises `PathError` if the folder does not exist, and `DiskFullError` if the matrix does
    not fit.
    """
    folder = Path(scratch or tempfile.gettempdir())
    if not folder.is_dir():
        raise PathError(
            f"scratch: expected an existing folder, got {folder}; create it, or give another with --scratch"
        )

    num_bytes = shape[0] * shape[1] * np.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DiskFullError(
            f"comparing {shape[0]:,} vectors needs {num_bytes / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free; free some, or give another folder with --scratch"
        )

    # A hole in the file that cannot be filled later would be a SIGBUS.
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
        yield np.memmap(file, dtype, "r+", shape=shape)


def cosine_limit(cosine: float) -> np.float32:
    """Return the number that float32 cosines are compared with. It is slightly below 1 for 1, to allow for rounding."""
    return np.float32(cosine if np.isinf(cosine) else min(cosine, _ALMOST_ONE))


class PairCollector:
    """Collector of the pairs above a limit and of each item's largest cosine, from tiles.

    If there are more than `max_pairs`, the limit rises to the next of the ascending `levels`. Memory: 12 bytes per
    pair, 4 per item, and as much again for a moment.
    """

    def __init__(self, num_items: int, levels: Sequence[float], max_pairs: int) -> None:
        self.highest: Floats = np.full(num_items, NOT_COMPARED, np.float32)
        self._levels = [*levels, np.inf]
        self._max_pairs = max_pairs
        self._keys: list[Ints] = []
        self._cosines: list[Floats] = []

    @property
    def limit(self) -> float:
        """Cosine from which on all pairs were kept, infinite if even the last level has too many."""
        return self._levels[0]

    def add(self, tile: CosineTile) -> None:
        """Add the pairs of a tile. An item's cosine to itself does not count."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, NOT_COMPARED)

        highest_B = tile.cosines.max(axis=1, initial=NOT_COMPARED)
        self.highest[tile.left] = np.maximum(self.highest[tile.left], highest_B)
        if not tile.is_diagonal:
            highest_C = tile.cosines.max(axis=0, initial=NOT_COMPARED)
            self.highest[tile.right] = np.maximum(self.highest[tile.right], highest_C)

        # Most rows have no near pair, so only the others are searched.
        rows = np.flatnonzero(highest_B >= cosine_limit(self.limit))
        if len(rows):
            self._add_pairs(tile, rows)

    def _add_pairs(self, tile: CosineTile, rows: Ints) -> None:
        row, column = np.nonzero(tile.cosines[rows] >= cosine_limit(self.limit))
        row = rows[row]
        if tile.is_diagonal:
            is_first = row < column
            row = row[is_first]
            column = column[is_first]

        self._keys.append(pair_keys(tile.left[row], tile.right[column], len(self.highest)))
        self._cosines.append(tile.cosines[row, column])

        while sum(map(len, self._keys)) > self._max_pairs:
            self._levels = self._levels[1:]
            masks = [cosines >= cosine_limit(self.limit) for cosines in self._cosines]
            self._keys = [keys[mask] for keys, mask in zip(self._keys, masks, strict=True)]
            self._cosines = [cosines[mask] for cosines, mask in zip(self._cosines, masks, strict=True)]

    def pairs(self) -> tuple[Ints, Ints, Floats]:
        """Return all pairs once, sorted by both items: the lower items, the higher items and the cosines, (A,) each."""
        keys, first = np.unique(np.concatenate([np.empty(0, np.int64), *self._keys]), return_index=True)
        cosines = np.concatenate([np.empty(0, np.float32), *self._cosines])[first]
        lower_A, upper_A = np.divmod(keys, len(self.highest))
        return lower_A, upper_A, cosines


def pair_keys(left: Ints, right: Ints, num_items: int) -> Ints:
    """Return a number for each pair of items, which does not depend on their order."""
    return np.minimum(left, right) * num_items + np.maximum(left, right)


class NeighborCollector:
    """Collector of each item's K most similar others, in `best`, from tiles that may repeat a pair."""

    def __init__(self, num_items: int, k: int) -> None:
        self.best = KBest(num_items, k, num_candidates=num_items)

    def add(self, tile: CosineTile) -> None:
        """Add the pairs of a tile. An item is not its own neighbor."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, -np.inf)
        self.best.add_block(tile.left, tile.right, tile.cosines)
        if not tile.is_diagonal:
            self.best.add_block(tile.right, tile.left, tile.cosines.T)


class GroupCollector:
    """Collector of the connected components of all pairs of nodes with items above a cosine, from tiles.

    Memory: about 30 bytes per node.

    Args:
        groups: (S,) group of each node so far, from 0. Pairs only merge groups.
        nodes: (N,) node of each item.
        cosine: pairs above this cosine are near.
    """

    def __init__(self, groups: Ints, nodes: Ints, cosine: float) -> None:
        self._groups = groups
        self._nodes = nodes
        self._cosine = cosine
        self._edges: list[tuple[Ints, Ints]] = []
        self._num_edges = 0

    def add(self, tile: CosineTile) -> bool:
        """Add the pairs of a tile, and return whether groups were merged.

        At most one edge per item of a tile is kept. The edges of all tiles are merged when there are many.
        """
        row, column = np.nonzero(tile.cosines > self._cosine)
        if not len(row):
            return False

        # One edge from each item to the first of its component connects the same items as all pairs.
        groups = self._groups[self._nodes[np.concatenate([tile.left, tile.right])]]
        component = components(row, column + len(tile.left), len(groups))
        first = np.empty(len(groups), np.int64)
        first[component[::-1]] = groups[::-1]
        is_edge = first[component] != groups
        self._edges.append((groups[is_edge], first[component][is_edge]))
        self._num_edges += len(self._edges[-1][0])

        if self._num_edges <= len(self._groups) // 8:
            return False
        self.merge()
        return True

    def merge(self) -> Ints:
        """Merge the groups of the edges so far, and return the group of each node: (S,) int64."""
        if self._num_edges:
            ends, first_ends = zip(*self._edges, strict=True)
            num_groups = int(self._groups.max()) + 1
            self._groups = components(np.concatenate(ends), np.concatenate(first_ends), num_groups)[self._groups]
            self._edges = []
            self._num_edges = 0
        return self._groups


def components(left: Ints, right: Ints, size: int) -> Ints:
    """Return the number of the connected component of each of `size` nodes, given the edges: (size,) int64."""
    edges = scipy.sparse.coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
    _, component = scipy.sparse.csgraph.connected_components(edges, directed=False)
    numbers: Ints = component.astype(np.int64)
    return numbers


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Number of found pairs among all pairs above the limit with a drawn item.

    Example:
        >>> Recall(num_items=1_000, num_pairs=40, num_found=39).value
        0.975
    """

    num_items: int  # drawn items, which are compared with all
    num_pairs: int  # true pairs above the limit
    num_found: int

    @property
    def value(self) -> float | None:
        """Fraction of the pairs that were found, None if there are no pairs."""
        return self.num_found / self.num_pairs if self.num_pairs else None

    def to_json(self) -> dict[str, float | None]:
        """Return all values as JSON."""
        return {**asdict(self), "value": self.value}


def measure_recall(
    arranged: Arranged, cosine: float, is_found: Callable[[Ints, Ints], Bools], *, seed: int, progress: Progress
) -> Recall | None:
    """Compare random items with all, and count how many of their pairs of at least a cosine were found.

    Args:
        arranged: the items. If all pairs were compared, there is nothing to measure.
        cosine: limit of the pairs.
        is_found: function of two (M,) arrays of item numbers that returns whether each pair was found.
        seed: random seed of the drawn items.
        progress: progress in items.
    """
    if arranged.num_clusters == 1:
        return None

    probes = draw_probes(np.arange(len(arranged.items)), seed)
    probes_QP = arranged.read(probes)
    is_probe_N = np.zeros(len(arranged.items), bool)
    is_probe_N[probes] = True

    # A cosine within rounding of the limit may lie on either side, so it is not counted.
    num_pairs = num_found = 0
    parts = blocks(len(arranged.items), BLOCK)
    for block in watch(parts, progress, f"measuring the recall of {arranged.unit}", len(arranged.items), "items"):
        query, column = np.nonzero(probes_QP @ arranged.read(block).T >= cosine_limit(cosine) + _ROUNDING)
        first = probes[query]
        second = column + block.start
        is_pair = (second > first) | ((second < first) & ~is_probe_N[second])  # a pair of two probes counts once
        num_pairs += int(is_pair.sum())
        num_found += int(is_found(arranged.items[first[is_pair]], arranged.items[second[is_pair]]).sum())

    return Recall(num_items=len(probes), num_pairs=num_pairs, num_found=num_found)


def measure_neighbor_recall(arranged: Arranged, best: KBest, *, seed: int, progress: Progress) -> Recall | None:
    """Compare random items with all, and count the nearest neighbors that were found.

    A neighbor of the same cosine also counts.
    """
    if arranged.num_clusters == 1:
        return None

    probes = draw_probes(np.arange(len(arranged.items)), seed)
    title = f"measuring the recall of {arranged.unit}"
    parts = watch(blocks(len(arranged.items), BLOCK), progress, title, len(arranged.items), "items")
    k = best.scores.shape[1]
    true_QK, cosines_QK = knn(arranged.read(probes), map(arranged.read, parts), k, own=probes)

    items = arranged.items[probes]
    is_found_QK = (best.numbers[items][:, None, :] == arranged.items[true_QK][:, :, None]).any(axis=2)
    is_found_QK |= cosines_QK <= best.scores[items][:, -1:] + _ROUNDING  # another one of the same cosine
    return Recall(num_items=len(probes), num_pairs=is_found_QK.size, num_found=int(is_found_QK.sum()))


def draw_probes(numbers: Ints, seed: int) -> Ints:
    """Draw 1,000 of the numbers, or all if there are fewer, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(numbers)[:_NUM_PROBES])
