"""Pairs of items that lie close together, collected from tiles of cosines.

Cutting unit vectors into clusters, and saying which other clusters may hold an item's near-duplicates.

A matrix on the disk for as long as it is needed; a killed process leaves none behind.

How close items lie to their nearest other: counts, and bars of text.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array, Bools, Floats, Ints
from embedcache.errors import DiskFullError, PathError
from embedcache.files import disk_errors
from embedcache.search.faiss_index import spherical_kmeans

_NEVER = np.float32(-2)  # below every cosine
_ONE = 1 - 1e-5  # what equal vectors reach in spite of rounding


def cosine_limit(cosine: float) -> np.float32:
    """Give the number that a float32 cosine is compared with: 1 leaves room for the rounding of equal vectors."""
    return np.float32(cosine if np.isinf(cosine) else min(cosine, _ONE))


@dataclass(frozen=True, kw_only=True)
class CosineTile:
    """The cosines of some items with others.

    Args:
        left: (B,) int64, numbers of items, each once.
        right: (R,) int64, alike.
        cosines: (B, R) float32; the collector may change it.
        is_diagonal: whether both are the same items; else they have none in common.
    """

    left: Ints
    right: Ints
    cosines: Floats
    is_diagonal: bool = False


@dataclass(frozen=True, kw_only=True)
class SimilarPairs:
    """Pairs of items whose cosine is at least a limit: each once, the smaller number first, in that order.

    Args:
        left: (L,) int64.
        right: (L,) int64.
        cosines: (L,) float32.
    """

    left: Ints
    right: Ints
    cosines: Floats

    def between(self, low: float, high: float = np.inf) -> "SimilarPairs":
        """Keep those of at least one cosine and below another."""
        mask = (self.cosines >= cosine_limit(low)) & (self.cosines < cosine_limit(high))
        return SimilarPairs(left=self.left[mask], right=self.right[mask], cosines=self.cosines[mask])


class PairCollector:
    """Takes tiles, and keeps the pairs above a limit and each item's largest cosine.

    Memory: 12 bytes a pair, 4 an item, and as much again for a moment. Where there are more pairs than allowed, the
    limit rises to the next level.

    Args:
        num_items: N.
        levels: cosines, ascending; the first is the limit, the others are what it may rise to.
        most: pairs that may be kept.
    """

    def __init__(self, num_items: int, levels: Sequence[float], most: int) -> None:
        self.best: Floats = np.full(num_items, _NEVER, np.float32)
        self._levels = [*levels, np.inf]
        self._most = most
        self._keys: list[Ints] = []
        self._cosines: list[Floats] = []

    @property
    def limit(self) -> float:
        """The cosine that all pairs have been kept from; infinite where even the last level has too many."""
        return self._levels[0]

    def take(self, tile: CosineTile) -> None:
        """Look at the cosines of a tile; those of an item with itself do not count."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, _NEVER)
        best_B = tile.cosines.max(axis=1, initial=_NEVER)
        self._raise_best(tile.left, best_B)
        if not tile.is_diagonal:
            self._raise_best(tile.right, tile.cosines.max(axis=0, initial=_NEVER))
        rows = np.flatnonzero(best_B >= cosine_limit(self.limit))
        if len(rows):
            self._keep(tile, rows)

    def links(self) -> SimilarPairs:
        """Give all pairs, each once."""
        keys, first = np.unique(np.concatenate([np.empty(0, np.int64), *self._keys]), return_index=True)
        cosines = np.concatenate([np.empty(0, np.float32), *self._cosines])[first]
        left, right = np.divmod(keys, max(1, len(self.best)))
        return SimilarPairs(left=left, right=right, cosines=cosines)

    def _raise_best(self, items: Ints, cosines: Floats) -> None:
        self.best[items] = np.maximum(self.best[items], cosines)

    def _keep(self, tile: CosineTile, rows: Ints) -> None:
        row, column = np.nonzero(tile.cosines[rows] >= cosine_limit(self.limit))
        row = rows[row]
        if tile.is_diagonal:
            is_above = row < column
            row, column = row[is_above], column[is_above]
        left, right = tile.left[row], tile.right[column]
        self._keys.append(np.minimum(left, right) * len(self.best) + np.maximum(left, right))
        self._cosines.append(tile.cosines[row, column])
        while sum(map(len, self._keys)) > self._most:
            self._rise()

    def _rise(self) -> None:
        self._levels = self._levels[1:]
        kept = [cosines >= cosine_limit(self.limit) for cosines in self._cosines]
        self._keys = [keys[mask] for keys, mask in zip(self._keys, kept, strict=True)]
        self._cosines = [cosines[mask] for cosines, mask in zip(self._cosines, kept, strict=True)]


_ITERATIONS = 10
_ROUNDING = 1e-4
_LEAST_SQUARED = 1e-6  # nearer centroids count as this far apart, so that their border is looked over
_TRAINING_EACH = 40
"""Vectors a cluster that k-means is fitted on; FAISS asks for 39 at least."""


def choose_num_clusters(num_items: int) -> int:
    """Choose 2 √N: finding its cluster costs an item K products, and each cluster that it is compared with N / K."""
    return max(1, round(2 * math.sqrt(num_items)))


def num_training(num_clusters: int) -> int:
    """Count the vectors that so many clusters are fitted on."""
    return _TRAINING_EACH * num_clusters


def fit_centroids(training_SP: Floats, num_clusters: int, *, seed: int) -> Floats:
    """Fit spherical k-means: (K, P) float32 rows of length 1, K at most the number of vectors.

    Args:
        training_SP: (S, P) float32 rows of length 1.
        num_clusters: how many are asked for.
        seed: of the first centroids.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    count = min(num_clusters, len(training_SP))
    return spherical_kmeans(training_SP, count, seed=seed, iterations=_ITERATIONS, max_per_cluster=_TRAINING_EACH)


@dataclass(frozen=True, kw_only=True)
class ClusterAssignment:
    """Where some items belong.

    Args:
        clusters: (B,) int32, the nearest centroid of each.
        cosines: (B,) float32, to that centroid.
        visits: (B, V) int32, other clusters that may hold a near-duplicate, the nearest border first; -1: no more.
        is_complete: (B,) bool, whether no further cluster can hold one.
    """

    clusters: Array
    cosines: Floats
    visits: Array
    is_complete: Bools


class ClusterAssigner:
    """A pass (see `passes`) that assigns items to clusters.

    Two items of two clusters a and b lie on both sides of the plane where the cosines to both centroids are equal. So
    if their angle is θ or less, neither is further than sin θ from that plane: of an item x of a these are the
    clusters b with x · (a - b) <= sin θ |a - b|, and no other can hold a neighbor. In many dimensions that bound
    is wide; only the nearest borders are taken, and what is missed for it must be measured.

    Args:
        centroids_KP: (K, P) float32 rows.
        cosine: the smallest one that matters, cos θ.
        most_visits: clusters an item may visit beside its own.
        is_taken: (N,) bool, rows to assign.
    """

    def __init__(self, centroids_KP: Floats, cosine: float, most_visits: int, is_taken: Bools) -> None:
        self._centroids = centroids_KP
        self._reach = float(np.sqrt(1 - cosine**2)) + _ROUNDING
        self._most_visits = min(most_visits, len(centroids_KP) - 1)
        self._is_taken = is_taken
        self._inverse_KK = _inverse_distances(centroids_KP)

    def process(self, rows_B: Ints, vectors_BP: Floats) -> list[ClusterAssignment]:
        """Assign the items of a chunk."""
        vectors_BP = vectors_BP[self._is_taken[rows_B]]
        cosines_BK = vectors_BP @ self._centroids.T
        clusters = cosines_BK.argmax(axis=1)
        own = np.take_along_axis(cosines_BK, clusters[:, None], axis=1)
        borders_BK = np.subtract(own, cosines_BK, out=cosines_BK)
        borders_BK *= self._inverse_KK[clusters]
        borders_BK[np.arange(len(clusters)), clusters] = np.inf
        visits, is_complete = self._visits(borders_BK)
        return [
            ClusterAssignment(
                clusters=clusters.astype(np.int32), cosines=own[:, 0], visits=visits, is_complete=is_complete
            )
        ]

    def merge(self, before: list[ClusterAssignment], after: list[ClusterAssignment]) -> list[ClusterAssignment]:
        """Put those of later chunks behind."""
        before.extend(after)
        return before

    def _visits(self, borders_BK: Floats) -> tuple[Array, Bools]:
        count = self._most_visits
        nearest = np.argpartition(borders_BK, count, axis=1)[:, : count + 1]
        borders = np.take_along_axis(borders_BK, nearest, axis=1)
        order = np.argsort(borders, axis=1, kind="stable")
        nearest, borders = np.take_along_axis(nearest, order, axis=1), np.take_along_axis(borders, order, axis=1)
        visits = np.where(borders[:, :count] <= self._reach, nearest[:, :count], -1).astype(np.int32)
        return visits, borders[:, count] > self._reach


def join(parts: list[ClusterAssignment]) -> ClusterAssignment:
    """Put the results of a pass into one."""
    return ClusterAssignment(
        clusters=np.concatenate([part.clusters for part in parts]),
        cosines=np.concatenate([part.cosines for part in parts]),
        visits=np.concatenate([part.visits for part in parts]),
        is_complete=np.concatenate([part.is_complete for part in parts]),
    )


def _inverse_distances(centroids_KP: Floats) -> Floats:
    """Give 1 / |a - b| of all pairs of centroids: (K, K) float32."""
    squared_K = np.einsum("kp,kp->k", centroids_KP, centroids_KP, dtype=np.float64)
    squared_KK = squared_K[:, None] + squared_K - 2 * centroids_KP.astype(np.float64) @ centroids_KP.T
    inverse_KK: Floats = (1 / np.sqrt(np.maximum(squared_KK, _LEAST_SQUARED))).astype(np.float32)
    return inverse_KK


@contextmanager
def scratch_matrix(folder: Path, shape: tuple[int, int], dtype: npt.DTypeLike) -> Iterator[Array]:
    """Give a matrix that lies in a file without a name; all of its space is taken at once.

    Args:
        folder: where; it must exist.
        shape: of the matrix.
        dtype: of its values.

    Raises:
        PathError: there is no such folder.
        DiskFullError: it does not fit; says how much is needed and how much is free.
    """
    if not folder.is_dir():
        raise PathError(f"the scratch folder {folder} does not exist; make it, or name another with --scratch")
    needed, free = shape[0] * shape[1] * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"comparing {shape[0]:,} vectors needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free; free some, or name another folder with --scratch"
        )
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, needed))  # a hole that cannot be filled later would be a SIGBUS
        yield np.memmap(file, dtype, "r+", shape=shape)


_WIDTHS = (0.005, 0.01, 0.02, 0.05, 0.1)
_MOST_BINS = 32
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of cosines.

    Args:
        lows: (H,) where each bin begins, ascending.
        width: of a bin; the last one holds its upper end, 1, as well.
        counts: (H,) int64.
    """

    lows: Floats
    width: float
    counts: Ints

    def bars(self) -> Iterator[str]:
        """Draw a line a bin, the closest first; the length of a bar is the logarithm of its count."""
        logs = np.log1p(self.counts) / np.log1p(max(1, self.counts.max(initial=0)))
        for low, log, count in zip(self.lows[::-1], logs[::-1], self.counts[::-1], strict=True):
            yield f"{low:6.3f}  {'█' * round(_BAR * float(log)):{_BAR}}  {count:,}"


def histogram(cosines_N: Floats) -> Histogram:
    """Count cosines in at most 32 bins that end at 1; those below all of them are in the first.

    Args:
        cosines_N: (N,) each item's largest cosine to another.
    """
    lowest = float(np.clip(cosines_N.min(initial=1), -1, 1))
    width = next((width for width in _WIDTHS if (1 - lowest) / width <= _MOST_BINS), _WIDTHS[-1])
    num_bins = min(_MOST_BINS, max(1, int(np.ceil((1 - lowest) / width - 1e-6))))
    bins = np.ceil((1 - cosines_N.astype(np.float64)) / width - 1e-4).astype(np.int64) - 1
    bins = np.clip(bins, 0, num_bins - 1)
    lows = (1 - width * np.arange(num_bins, 0, -1)).astype(np.float32)
    counts = np.bincount(num_bins - 1 - bins, minlength=num_bins).astype(np.int64)
    return Histogram(lows=lows, width=width, counts=counts)
