"""Zarr v3 arrays whose chunks are raw little-endian rows and a CRC-32C, so that they can be memory-mapped.

zarr-python makes the metadata of arrays, and any Zarr reader reads them. Chunks are written here because they must be
flushed before they are committed, and read from memory maps because zarr-python reads a complete chunk for one row.
Only functions that write metadata import zarr-python, so readers do not load it.
"""

import json
import math
import mmap
import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from embedcache.arrays import Array, blocks
from embedcache.errors import CorruptError, PathError, UnfinishedError
from embedcache.files import check_regular, io_reason, is_remote, read_file, write_atomic
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import FileName, Manifest, read_json, write_json

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

CRC_BYTES = 4

REPAIR = "repair it with: embedcache verify CACHE --repair"
"""Next step for damaged chunks and commits."""

_CHECKED: set[tuple[tuple[int, ...] | None, str]] = set()  # files that this process has compared with their commit
_MAX_OPEN_FILES = 32_768
_REMOTE_BYTES = 2**30
_BLOCK_BYTES = 2**22
_READ_BYTES = 2**20
_OPTIONAL = ("storage_transformers", "dimension_names", "consolidated_metadata")


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a Zarr group's `zarr.json`."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def array_metadata(
    shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, attributes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of a Zarr array's `zarr.json`. The fill value is NaN, or -1 for integers."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=shape,
        chunks=tuple(max(size, 1) for size in chunks),  # Zarr has no chunk without values
        dtype=dtype,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=Crc32cCodec(),
        fill_value=fill_value(dtype),
        attributes=dict(attributes or {}),
    )
    metadata = json.loads(files["zarr.json"].to_bytes())

    # Versions of zarr-python differ in whether they write these when they are empty.
    return {name: value for name, value in metadata.items() if value or name not in _OPTIONAL}


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write the metadata of a Zarr group or array."""
    write_json(path / "zarr.json", metadata)


def has_metadata(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Return whether a Zarr group or array has this metadata."""
    try:
        return bool(read_metadata(path) == metadata)
    except (CorruptError, PathError):
        return False


def fill_value(dtype: Any) -> float:
    """Return the value of missing rows: -1 for integers, else NaN."""
    return -1 if np.dtype(dtype).kind == "i" else np.nan


def read_metadata(path: Path) -> Any:
    """Read the metadata of a Zarr group or array."""
    return read_json(path / "zarr.json")


def chunk_path(array_path: Path, number: int, ndim: int) -> Path:
    """Return the file of a chunk of an array that is chunked along the first axis only."""
    return array_path.joinpath("c", str(number), *["0"] * (ndim - 1))


def write_chunk(array_path: Path, number: int, parts: Iterable[Array], chunk_shape: tuple[int, ...], dtype: str) -> str:
    """Write one chunk and flush it to disk. A short chunk is padded with the fill value.

    Memory: a block of rows of 4 MB, in addition to the parts.

    Args:
        parts: the rows, as consecutive arrays of the dtype.

    Returns:
        The CRC-32C of the rows as 8 hex digits. Its 4 bytes, little-endian, end the file.
    """
    crc = 0

    def data() -> Iterator[bytes]:
        nonlocal crc
        for block in _row_blocks(parts, chunk_shape, dtype):
            crc = google_crc32c.extend(crc, block)
            yield block
        yield crc.to_bytes(CRC_BYTES, "little")

    write_atomic(chunk_path(array_path, number, len(chunk_shape)), data())
    return f"{crc:08x}"


def _row_blocks(parts: Iterable[Array], chunk_shape: tuple[int, ...], dtype: str) -> Iterator[bytes]:
    """Iterate over the bytes of a chunk's rows, little-endian, some rows at a time."""
    disk_dtype = np.dtype(dtype).newbyteorder("<")
    row_bytes = int(np.prod(chunk_shape[1:])) * disk_dtype.itemsize
    rows_per_block = max(1, _BLOCK_BYTES // max(1, row_bytes))

    num_missing = chunk_shape[0]
    for part in parts:
        num_missing -= len(part)
        for rows in blocks(len(part), rows_per_block):
            yield np.ascontiguousarray(part[rows], disk_dtype).tobytes()

    for rows in blocks(num_missing, rows_per_block):
        yield np.full((rows.stop - rows.start, *chunk_shape[1:]), fill_value(dtype), disk_dtype).tobytes()


def open_chunk(
    array_path: Path, number: int, chunk_shape: tuple[int, ...], dtype: str, committed_crc: str, *, once: bool = False
) -> Array:
    """Map one chunk into memory, read-only, and compare its rows with the checksum in its commit.

    A chunk behind a URL is read.

    Args:
        once: skip the rows of a file that this process has compared before. The size and the copy of the checksum at
            the end of the file are compared each time.

    Raises:
        UnfinishedError: the chunk is committed, but its file is missing.
        CorruptError: the file has the wrong size or other bytes.
    """
    path = chunk_path(array_path, number, len(chunk_shape))
    num_bytes = math.prod(chunk_shape) * np.dtype(dtype).itemsize

    try:
        mapped, identity = (read_file(path), None) if is_remote(path) else _map(path)
    except FileNotFoundError as error:
        raise UnfinishedError(f"{path} is committed but missing; run the same embedcache extract again") from error
    except OSError as error:
        raise PathError(f"cannot read {path}: {io_reason(error)}") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise CorruptError(f"{path}: expected {num_bytes + CRC_BYTES} bytes, got an empty file; {REPAIR}") from error

    if len(mapped) != num_bytes + CRC_BYTES:
        raise CorruptError(f"{path}: expected {num_bytes + CRC_BYTES} bytes, got {len(mapped)}; {REPAIR}")
    if mapped[num_bytes:] != int(committed_crc, 16).to_bytes(CRC_BYTES, "little"):
        raise _changed(path, committed_crc, f"{int.from_bytes(mapped[num_bytes:], 'little'):08x} at its end", REPAIR)

    # A changed file has another identity, so it is compared again.
    checked = (identity, committed_crc)
    if not once or checked not in _CHECKED:
        actual_crc = f"{google_crc32c.value(np.frombuffer(mapped, np.uint8, num_bytes)):08x}"
        if actual_crc != committed_crc:
            raise _changed(path, committed_crc, actual_crc, REPAIR)
        if identity is not None:
            _CHECKED.add(checked)

    return np.frombuffer(mapped, dtype, num_bytes // np.dtype(dtype).itemsize).reshape(chunk_shape)


def _changed(path: Path, checksum: str, actual: str, next_step: str) -> CorruptError:
    return CorruptError(f"{path}: expected checksum {checksum}, got {actual}: the bytes changed on disk; {next_step}")


def file_checksum(path: Path, *, progress: Progress | None = None) -> str:
    """Return the CRC-32C of all bytes of a local file as 8 hex digits, as one step. Memory: a block."""
    progress = progress or NullProgress()
    progress.start(f"checking {path.name}", -(-path.stat().st_size // _READ_BYTES), "MiB")

    # One piece of memory for all reads is faster.
    crc = 0
    buffer = bytearray(_READ_BYTES)
    block = np.frombuffer(buffer, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = google_crc32c.extend(crc, block[:count])
            progress.advance(1)

    progress.finish()
    return f"{crc:08x}"


class ListedFile(Manifest):
    """The size of a file that a manifest lists, and the CRC-32C of all its bytes as 8 hex digits."""

    num_bytes: int
    checksum: str


def describe_files(folder: Path, names: Iterable[str]) -> dict[FileName, ListedFile]:
    """Return the entries of files in the manifest of their folder."""
    files = {}
    for name in names:
        path = folder / name
        files[path.name] = ListedFile(num_bytes=path.stat().st_size, checksum=file_checksum(path))
    return files


def check_file(
    path: Path, checksum: str, *, next_step: str, once: bool = True, progress: Progress | None = None
) -> None:
    """Compare a local file with its checksum.

    Args:
        once: skip a file that this process has compared before.
        progress: shows the comparison as one step.

    Raises:
        PathError: there is no such file.
        CorruptError: it has other bytes.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; {next_step}")

    status = path.stat()
    checked = ((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns), checksum)
    if once and checked in _CHECKED:
        return

    actual = file_checksum(path, progress=progress)
    if actual != checksum:
        raise _changed(path, checksum, actual, next_step)

    _CHECKED.add(checked)


def _map(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    """Map a file, and return it with an identity that changes when the file is written again."""
    check_regular(path)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), identity


def max_maps(array_path: Path, chunk_bytes: int) -> int:
    """Return how many chunks a feature may keep open. Each needs an open file, or memory if it is remote."""
    if is_remote(array_path):
        return max(1, _REMOTE_BYTES // chunk_bytes)
    return max(16, _raise_open_file_limit() // 8)


@cache
def _raise_open_file_limit() -> int:
    """Raise this process's limit of open files as far as the system allows, once, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit
