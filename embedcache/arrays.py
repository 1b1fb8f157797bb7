"""Small array helpers. NumPy only.

The shape letters used everywhere in this package:

    N  rows of a feature          D  width of a feature       T  tokens of an item
    B  rows of a batch            P  width of the shared space
    Q  queries                    C  candidates               K  neighbours or ranks kept
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from embedcache.errors import DataError

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


def normalize(vectors_ND: Array) -> Floats:
    """Scale each row to length 1: (N, D) any float -> (N, D) float32. A zero row stays zero."""
    vectors_ND = np.asarray(vectors_ND, dtype=np.float32)
    length_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    unit_ND: Floats = vectors_ND / np.maximum(length_N1, np.finfo(np.float32).tiny)
    return unit_ND


def check_finite(values: Array, name: str) -> None:
    """Refuse NaN and infinity in an array of any shape.

    Raises:
        DataError: names the array, how many rows are bad and the first of them.
    """
    bad = np.atleast_1d(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise DataError(f"{name} holds NaN or infinity in {int(bad.sum())} of {len(bad)} rows, first row {first}")


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Cut `num_rows` rows into consecutive slices of `size` rows; the last may be shorter."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
