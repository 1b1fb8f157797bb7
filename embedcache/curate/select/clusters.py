"""k-means through FAISS: seeded, on a sample where there are many vectors."""

from collections.abc import Iterable

import numpy as np

from embedcache.arrays import Floats, Ints, normalize
from embedcache.curate.faiss_index import import_faiss
from embedcache.errors import SettingError

_ITERATIONS = 20
_POINTS_A_CENTROID = 256
_LEAST_POINTS = 40
"""Vectors a centroid where the number of centroids is worked out."""
_MOST_CENTROIDS = 10_000


def default_clusters(num_vectors: int) -> int:
    """Work out a number of centroids: one for 40 vectors, 10,000 at most."""
    return max(1, min(_MOST_CENTROIDS, num_vectors // _LEAST_POINTS))


def most_training_vectors(num_clusters: int) -> int:
    """Say how many vectors k-means looks at, at most: 256 a centroid."""
    return num_clusters * _POINTS_A_CENTROID


def find_centroids(vectors_NP: Floats, num_clusters: int, *, seed: int) -> Floats:
    """Cluster vectors by cosine: (C, P) float32 unit rows.

    Args:
        vectors_NP: (N, P) float32 unit rows.
        num_clusters: C.
        seed: of the first centroids.

    Raises:
        SettingError: there are fewer vectors than clusters.
        MissingExtraError: FAISS is not installed.
    """
    if num_clusters > len(vectors_NP):
        raise SettingError(f"{num_clusters:,} clusters of {len(vectors_NP):,} vectors; give fewer --clusters")
    kmeans = import_faiss().Kmeans(
        vectors_NP.shape[1],
        num_clusters,
        niter=_ITERATIONS,
        seed=seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_A_CENTROID,
    )
    kmeans.train(np.ascontiguousarray(vectors_NP))
    return normalize(kmeans.centroids)


def nearest(blocks: Iterable[Floats], centroids_CP: Floats) -> Ints:
    """Find the nearest centroid of each vector: (N,) int64. Memory: the products of a block."""
    found = [np.empty(0, np.int64), *((vectors_BP @ centroids_CP.T).argmax(axis=1) for vectors_BP in blocks)]
    return np.concatenate(found)
