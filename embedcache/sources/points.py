"""Decode point clouds, `.npz` files.

Points have coordinates, either `xyz` of shape (N, 3) or `x`, `y` and `z`, and any other arrays with one row per point,
under their names in the file.
"""

import io
import threading
import zipfile

import numpy as np

from embedcache.arrays import Array, read_npz
from embedcache.errors import ItemError
from embedcache.modeling.images import DAMAGE

MAX_POINTS = 10_000_000
_MAX_BYTES = 2**30  # of all arrays of one item, uncompressed
_PARSING = threading.Lock()  # NumPy parses headers by `ast`, which fails at times in threads of Python 3.11
_MIN_RESOLUTION = 1e-4  # of the extent: float32 coordinates far from their origin are coarser


def decode_points(data: bytes) -> dict[str, Array]:
    """Decode a point cloud. Thread-safe.

    Floating-point values become float32; integers keep their dtype.

    Args:
        data: the whole file.

    Returns:
        name -> array with one row per point: `xyz`, (N, 3) float32, first.

    Raises:
        ItemError: the file cannot be decoded, has no coordinates or no points, more than `MAX_POINTS`, arrays of
            different lengths, NaN or infinity, or coordinates too far from their origin for float32.
    """
    if not data:
        raise ItemError("empty file")
    if not data.startswith(b"PK\x03\x04"):
        raise ItemError("not a point cloud (npz)")

    try:
        with _PARSING:
            arrays = read_npz(io.BytesIO(data), max_bytes=_MAX_BYTES)
        return _check(arrays)
    except ItemError:
        raise
    except (*DAMAGE, RuntimeError, zipfile.BadZipFile) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ItemError(f"damaged point cloud: {text}") from None


def _check(arrays: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays with `xyz` first, after checking them."""
    if "xyz" not in arrays and {"x", "y", "z"} <= arrays.keys():
        arrays = {"xyz": np.stack([arrays.pop(name) for name in ("x", "y", "z")], axis=1), **arrays}

    xyz_N3 = arrays.pop("xyz", None)
    if xyz_N3 is None or xyz_N3.ndim != 2 or xyz_N3.shape[1] != 3:
        shape = "none" if xyz_N3 is None else f"xyz of shape {xyz_N3.shape}"
        raise ItemError(f"no coordinates: expected xyz of shape (N, 3), or x, y and z, got {shape}")

    if not len(xyz_N3):
        raise ItemError("no points")
    if len(xyz_N3) > MAX_POINTS:
        raise ItemError(f"too many points: {len(xyz_N3):,}, more than {MAX_POINTS:,}")

    for name, values in arrays.items():
        if values.ndim not in (1, 2) or len(values) != len(xyz_N3):
            raise ItemError(f"wrong shape: expected one row of {name} per point, {len(xyz_N3):,}, got {values.shape}")

    checked = {name: _plain(name, values) for name, values in {"xyz": xyz_N3.astype(np.float64), **arrays}.items()}

    # Rounding to float32 must not move points by more than a small part of the extent.
    extent = np.ptp(xyz_N3.astype(np.float64), axis=0).max()
    if np.abs(checked["xyz"] - xyz_N3).max() > _MIN_RESOLUTION * extent:
        raise ItemError(f"too far from the origin for float32, over an extent of {extent:,.6g}; subtract an origin")

    return checked


def _plain(name: str, values: Array) -> Array:
    """Return values as float32 or integers in the machine's byte order."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind in "iu":
        return values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind != "f":
        raise ItemError(f"no numbers: expected numbers in {name}, got {values.dtype}")

    # A value beyond float32 becomes infinite and is refused below.
    with np.errstate(over="ignore"):
        plain = values.astype(np.float32)
    if not np.isfinite(plain).all():
        raise ItemError(f"invalid values: {name} has NaN, infinity, or a value beyond float32")
    return plain
