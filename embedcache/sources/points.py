"""Decode point clouds: `.npz` and `.parquet`, and with the extra `points` also `.ply` and `.las`.

The format follows from the first bytes. Points have coordinates, either `xyz` of shape (N, 3) or `x`, `y` and `z`, and
any other arrays with one row per point, under their names in the file.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array
from embedcache.errors import ItemError
from embedcache.registry import require

MAX_POINTS = 10_000_000
_MAX_BYTES = 2**30  # of all arrays of one item, uncompressed
_MIN_RESOLUTION = 1e-4  # of the extent: float32 coordinates far from their origin are coarser
_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, EOFError, OverflowError, MemoryError, SyntaxError),
    *(NotImplementedError, RuntimeError, UnicodeError, struct.error, zlib.error, zipfile.BadZipFile, pa.ArrowException),
)
"""What the readers raise on damaged bytes."""


def decode_points(data: bytes, path: str = "") -> dict[str, Array]:
    """Decode a point cloud. Thread-safe.

    Floating-point values become float32; integers keep their dtype. The coordinates of a `.las` file are relative to
    the offset in its header.

    Args:
        data: the whole file.
        path: name of the file, for messages.

    Returns:
        name -> array with one row per point: `xyz`, (N, 3) float32, first.

    Raises:
        ItemError: the file cannot be decoded, has no coordinates or no points, more than `MAX_POINTS`, arrays of
            different lengths, NaN or infinity, or coordinates too far from their origin for float32.
    """
    if not data:
        raise ItemError("empty file")
    for magic, read in _READERS.items():
        if data.startswith(magic):
            try:
                return _check(read(data))
            except ItemError:
                raise
            except _DAMAGE as error:
                text = str(error).partition("\n")[0] or type(error).__name__
                raise ItemError(f"damaged point cloud: {text}") from None
    raise ItemError(f"not a point cloud (npz, parquet, ply, las){f': {path}' if path else ''}")


def _read_npz(data: bytes) -> dict[str, Array]:
    """Read the arrays of an npz without NumPy's reader, which allocates what a damaged header asks for."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        _check_size(sum(member.file_size for member in members))
        return {member.filename.removesuffix(".npy"): _read_npy(archive.read(member)) for member in members}


def _read_npy(data: bytes) -> Array:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ItemError("it holds pickled objects, which may run code")
    values: Array = np.frombuffer(data, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if is_fortran else "C")


def _read_parquet(data: bytes) -> dict[str, Array]:
    with pq.ParquetFile(io.BytesIO(data), pre_buffer=False) as file:
        _check_count(file.metadata.num_rows)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        _check_size(sum(group.total_byte_size for group in groups))
        table = file.read(use_threads=False)
    return {name: values for name in table.column_names if (values := _column(table[name])) is not None}


def _column(column: pa.ChunkedArray) -> Array | None:
    """Return a column of numbers, (N,), or of lists of equal length, (N, width), as an array; None for others."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    number = kind.value_type if is_list else kind
    if not (pa.types.is_integer(number) or pa.types.is_floating(number) or pa.types.is_boolean(number)):
        return None
    if column.null_count:
        raise ItemError("a column holds nulls")
    if not is_list:
        return np.asarray(column.to_numpy())
    values = column.combine_chunks()
    values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    widths = pc.unique(pc.list_value_length(values)).to_pylist()
    if len(widths) > 1:
        raise ItemError("a column holds lists of different lengths")
    array: Array = values.flatten().to_numpy(zero_copy_only=False).reshape(len(column), *(widths or [0]))
    return array


def _read_ply(data: bytes) -> dict[str, Array]:
    header = data[: data.find(b"end_header")]
    for count in re.findall(rb"element\s+\w+\s+(\d+)", header):
        _check_count(int(count))
    plyfile = require("plyfile", extra="points")
    try:
        vertices = plyfile.PlyData.read(io.BytesIO(data), mmap=False)["vertex"].data
    except plyfile.PlyParseError as error:
        raise ItemError(f"damaged point cloud: {error}") from None
    return {name: vertices[name] for name in vertices.dtype.names if vertices[name].dtype.kind in "iufb"}


def _read_las(data: bytes) -> dict[str, Array]:
    laspy = require("laspy", extra="points")
    try:
        with laspy.open(io.BytesIO(data)) as file:
            _check_count(file.header.point_count)
            points = file.read()
    except laspy.errors.LaspyException as error:
        raise ItemError(f"damaged point cloud: {error}") from None
    steps = np.stack([points.X, points.Y, points.Z], axis=1)
    names = [name for name in points.point_format.dimension_names if name not in {"X", "Y", "Z"}]
    return {"xyz": steps * points.header.scales, **{name: np.asarray(points[name]) for name in names}}


_READERS: Mapping[bytes, Callable[[bytes], dict[str, Any]]] = {
    b"PK\x03\x04": _read_npz,
    b"PAR1": _read_parquet,
    b"ply\n": _read_ply,
    b"ply\r\n": _read_ply,
    b"LASF": _read_las,
}


def _check(arrays: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays with `xyz` first, after checking them."""
    if "xyz" not in arrays and {"x", "y", "z"} <= arrays.keys():
        arrays = {"xyz": np.stack([arrays.pop(name) for name in ("x", "y", "z")], axis=1), **arrays}
    xyz_N3 = arrays.pop("xyz", None)
    if xyz_N3 is None or xyz_N3.ndim != 2 or xyz_N3.shape[1] != 3:
        found = "none" if xyz_N3 is None else f"xyz of shape {xyz_N3.shape}"
        raise ItemError(f"no coordinates: expected xyz of shape (N, 3), or x, y and z, got {found}")
    if not len(xyz_N3):
        raise ItemError("no points")
    _check_count(len(xyz_N3))
    for name, values in arrays.items():
        if values.ndim not in (1, 2) or len(values) != len(xyz_N3):
            raise ItemError(f"wrong shape: expected one row of {name} per point, {len(xyz_N3):,}, got {values.shape}")
    checked = {name: _plain(name, values) for name, values in {"xyz": xyz_N3.astype(np.float64), **arrays}.items()}
    _check_resolution(xyz_N3)
    return checked


def _plain(name: str, values: Array) -> Array:
    """Return values as float32 or integers in the machine's byte order."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind in "iu":
        return values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind != "f":
        raise ItemError(f"no numbers: expected numbers in {name}, got {values.dtype}")
    with np.errstate(over="ignore"):
        plain = values.astype(np.float32)
    if not np.isfinite(plain).all():
        raise ItemError(f"invalid values: {name} has NaN, infinity, or a value beyond float32")
    return plain


def _check_resolution(xyz_N3: Array) -> None:
    largest = float(np.abs(xyz_N3).max())
    extent = float(np.ptp(xyz_N3.astype(np.float64), axis=0).max())
    step = float(np.spacing(np.float32(largest)))
    if extent > 0 and step > _MIN_RESOLUTION * extent:
        raise ItemError(
            f"too far from the origin: coordinates up to {largest:,.0f} over an extent of {extent:,.6g}; float32 "
            f"resolves {step:g} there; subtract an origin"
        )


def _check_count(count: int) -> None:
    if count > MAX_POINTS:
        raise ItemError(f"too many points: {count:,}, more than {MAX_POINTS:,}")


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MAX_BYTES:
        raise ItemError(f"too large: {num_bytes:,} bytes uncompressed, more than {_MAX_BYTES:,}")
