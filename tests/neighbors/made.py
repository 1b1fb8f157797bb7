"""Vectors in groups of near-duplicates, and a plain search of their pairs."""

import numpy as np

from embedcache.arrays import Floats, Inputs, normalize
from embedcache.dataset.vectors import ItemVectors


def made_vectors(count: int, seed: int, *, width: int = 16, noise: float = 0.08) -> Floats:
    """Vectors in groups of one to five near-duplicates."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 6, count))[:count]
    centers = rng.standard_normal((count, width))
    return normalize(centers[groups] + noise * rng.standard_normal((count, width)))[rng.permutation(count)]


def stored(vectors_NP: Floats) -> ItemVectors:
    """Vectors in memory that are read in chunks."""
    rows = np.arange(len(vectors_NP))
    return ItemVectors(lambda some: Inputs(vectors_NP[some]), rows, vectors_NP.shape[1], "dots")


def brute(vectors_NP: Floats, limit: float) -> set[tuple[int, int]]:
    """All pairs of at least a cosine."""
    cosines = vectors_NP.astype(np.float64) @ vectors_NP.T.astype(np.float64)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(cosines >= limit), strict=True) if i < j}
