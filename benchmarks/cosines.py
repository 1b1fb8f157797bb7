"""How far two sets of vectors of the same items are apart."""

from pathlib import Path

import numpy as np

from embedcache.arrays import Array
from embedcache.store.cache import Cache

MAX_DRIFT = 1e-3
"""Largest 1 - cosine at which two ways to compute a vector are the same; float16 on disk alone gives about 1e-7."""


def vectors(cache_path: Path, modality: str) -> Array:
    """Read the only feature of a modality in a cache: (N, D) float32."""
    return Cache(cache_path).feature(modality).load().astype(np.float32)


def check_cosines(ours_ND: Array, theirs_ND: Array, max_drift: float) -> str:
    """Compare row by row, and say how far apart the rows are.

    Raises:
        ValueError: a row is further away than allowed; the figures would compare different work.
    """
    drift_N = 1 - np.sum(_unit(ours_ND) * _unit(theirs_ND), axis=1)
    line = f"1 - cosine: median {np.median(drift_N):.1e}, largest {drift_N.max():.1e}"
    if not drift_N.max() <= max_drift:
        raise ValueError(f"the vectors differ: {line}; allowed {max_drift}")
    return line


def _unit(vectors_ND: Array) -> Array:
    as_float64 = vectors_ND.astype(np.float64)
    unit: Array = as_float64 / np.linalg.norm(as_float64, axis=1, keepdims=True)
    return unit
