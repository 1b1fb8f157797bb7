"""k-means through FAISS: seeded, on a sample where there are many vectors."""

from collections.abc import Iterable

import numpy as np

from embedcache.arrays import Floats, Ints, normalize
from embedcache.curate.indexes.faiss_index import spherical_kmeans
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
    return normalize(
        spherical_kmeans(
            vectors_NP, num_clusters, seed=seed % 2**31, iterations=_ITERATIONS, most_each=_POINTS_A_CENTROID
        )
    )


def nearest(blocks: Iterable[Floats], centroids_CP: Floats) -> Ints:
    """Find the nearest centroid of each vector: (N,) int64. Memory: the products of a block."""
    found = [np.empty(0, np.int64), *((vectors_BP @ centroids_CP.T).argmax(axis=1) for vectors_BP in blocks)]
    return np.concatenate(found)
