"""Cutting unit vectors into clusters, and saying which other clusters may hold an item's near-duplicates."""

import math
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints
from embedcache.curate.indexes.faiss_index import spherical_kmeans

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
    return spherical_kmeans(training_SP, count, seed=seed, iterations=_ITERATIONS, most_each=_TRAINING_EACH)


@dataclass(frozen=True, kw_only=True)
class Assigned:
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


class Assign:
    """A pass (see `passes`) that assigns items to clusters.

    Two items of two clusters a and b lie on both sides of the plane where the cosines to both centroids are equal. So
    if their angle is θ or less, neither is further than sin θ from that plane: of an item x of a these are the
    clusters b with x · (a - b) <= sin θ |a - b|, and no other can hold a neighbour. In many dimensions that bound
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

    def take(self, rows_B: Ints, vectors_BP: Floats) -> list[Assigned]:
        """Assign the items of a chunk."""
        vectors_BP = vectors_BP[self._is_taken[rows_B]]
        cosines_BK = vectors_BP @ self._centroids.T
        clusters = cosines_BK.argmax(axis=1)
        own = np.take_along_axis(cosines_BK, clusters[:, None], axis=1)
        borders_BK = np.subtract(own, cosines_BK, out=cosines_BK)
        borders_BK *= self._inverse_KK[clusters]
        borders_BK[np.arange(len(clusters)), clusters] = np.inf
        visits, is_complete = self._visits(borders_BK)
        return [Assigned(clusters=clusters.astype(np.int32), cosines=own[:, 0], visits=visits, is_complete=is_complete)]

    def merge(self, before: list[Assigned], after: list[Assigned]) -> list[Assigned]:
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


def join(parts: list[Assigned]) -> Assigned:
    """Put the results of a pass into one."""
    return Assigned(
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
