"""Vectors in `.npy` files with a table of keys and captions beside them, and in the arrays of an `.npz`."""

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from embedcache.arrays import Array, blocks
from embedcache.encoders.base import Modality
from embedcache.errors import CorruptError, DataError, EmbedcacheError, SettingError
from embedcache.interop.exporting import VectorExport, new_folder
from embedcache.interop.parquet import write_rows
from embedcache.interop.vector_files import FileGroup, VectorImport, check_dtype
from embedcache.modalities import MODALITIES
from embedcache.progress import Progress, watch
from embedcache.registry import unknown_name
from embedcache.sources.files import open_binary, wrap_io_errors

_BLOCK = 8192
_ROW_GROUP = 2**20
_SKIP_BYTES = 2**24


def open_npy_vectors(files: Mapping[str, Path | str], *, table: Path | None = None) -> VectorImport:
    """Open `.npy` files whose rows belong together, with a table of their keys, captions and columns.

    Args:
        files: modality -> file of vectors.
        table: table of the rows.

    Raises:
        SettingError: no file is named, or several of one modality.
        UnknownNameError: a modality is unknown.
        CorruptError: a file is damaged.
        DataError: an array is not (rows, width) of float16, float32 or float64, or they differ in their rows.
    """
    given: dict[Modality, Path] = {}
    for name, path in files.items():
        if name not in MODALITIES:
            raise unknown_name("modality", name, MODALITIES)
        if not isinstance(path, str | Path):
            raise SettingError(f"files: expected one .npy file of {name} vectors, got {path!r}; name one")
        given[MODALITIES[name].name] = Path(path)
    if not given:
        raise SettingError("files: expected a .npy file, got none; name one with --file MODALITY=FILE")
    group = FileGroup(vectors={modality: open_npy(path) for modality, path in given.items()}, table=table)
    first = next(iter(given.values()))
    return VectorImport(form="npy", path=first, modalities={name: name for name in given}, groups=[group])


def write_npy(export: VectorExport, folder: Path, *, progress: Progress) -> int:
    """Write a `.npy` per modality and `rows.parquet` into a new folder, whole or not at all; return the row count.

    Vectors are as they are in the cache. Memory: a block of vectors, and a million rows of the table.
    """
    num_rows = len(export.samples)
    with new_folder(folder) as temporary:
        tables = map(export.table, blocks(num_rows, _ROW_GROUP))
        shown = watch(tables, progress, "writing rows.parquet", num_rows, "rows")
        write_rows(temporary / "rows.parquet", shown, export.record)
        for modality in export.modalities:
            progress.start(f"writing {modality}.npy", num_rows, "vectors")
            shape = (num_rows, export.width(modality))
            stream = export.vectors(modality, _BLOCK)
            write_array(temporary / f"{modality}.npy", stream, shape, export.dtype(modality), progress)
            progress.finish()
    return num_rows


@dataclass(frozen=True, kw_only=True)
class NpyFile:
    """A two-dimensional array in C order, read block by block without a memory map.

    Args:
        path: the `.npy` or `.npz` file.
        num_rows: number of rows.
        width: components per row.
        dtype: `float16`, `float32` or `float64`.
        start: offset of its components in the file or member, in bytes.
        member: name of the array in an `.npz`; None for a `.npy`.
    """

    path: Path
    num_rows: int
    width: int
    dtype: str
    start: int
    member: str | None = None

    def blocks(self, first: int, size: int) -> Iterator[Array]:
        """Iterate over the rows from `first` on: arrays (B, D) of at most `size` rows."""
        row_bytes = self.width * np.dtype(self.dtype).itemsize
        with self._open() as file:
            _skip(file, self.start + first * row_bytes)
            for row in range(first, self.num_rows, size):
                count = min(size, self.num_rows - row)
                data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise _truncated(self, row + len(data) // row_bytes)
                yield np.frombuffer(data, self.dtype).reshape(count, self.width)

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with report_damage(self.path):
            if self.member is None:
                with open_binary(self.path) as file:
                    yield file
            else:
                with (
                    open_binary(self.path) as whole,
                    zipfile.ZipFile(whole) as archive,
                    archive.open(f"{self.member}.npy") as file,
                ):
                    yield file


def open_npy(path: Path) -> NpyFile:
    """Read the header of a `.npy` file.

    Raises:
        CorruptError: it is not a `.npy` file, or ends before its last row.
        DataError: it is not a two-dimensional array of float16, float32 or float64 in C order.
    """
    with report_damage(path), open_binary(path) as file:
        rows = _parse_header(path, file, None)
        num_bytes = os.fstat(file.fileno()).st_size - rows.start
    row_bytes = rows.width * np.dtype(rows.dtype).itemsize
    if num_bytes < rows.num_rows * row_bytes:
        raise _truncated(rows, num_bytes // row_bytes)
    return rows


def open_npz(path: Path, name: str) -> NpyFile:
    """Read the header of one array of an `.npz` file; raise an UnknownNameError that lists its arrays."""
    with report_damage(path), open_binary(path) as whole, zipfile.ZipFile(whole) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist()]
        if name not in names:
            raise unknown_name("array", name, names, hint=f"in {path}")
        with archive.open(f"{name}.npy") as file:
            return _parse_header(path, file, name)


def write_array(path: Path, stream: Iterable[Array], shape: tuple[int, int], dtype: str, progress: Progress) -> None:
    """Write a `.npy` file, whose header is format 1.0: 128 bytes, one line that other readers parse by themselves."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
        npy_format.write_array_header_1_0(file, header)
        for block in stream:
            file.write(block.tobytes())
            progress.advance(len(block))


@contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """Return a context in which the errors of a damaged file name it and the next step."""
    try:
        with wrap_io_errors(path):
            yield
    except EmbedcacheError:
        raise
    except (zipfile.BadZipFile, EOFError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is damaged: {error or 'it ends too early'}; get the file again") from error
    except ValueError as error:
        raise CorruptError(
            f"{path}: expected an array written by NumPy, got an error: {error}; get the file again"
        ) from error


def _parse_header(path: Path, file: IO[bytes], member: str | None) -> NpyFile:
    location = str(path) if member is None else f"{path}, array {member}"
    is_version_1 = npy_format.read_magic(file) == (1, 0)
    read = npy_format.read_array_header_1_0 if is_version_1 else npy_format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if len(shape) != 2 or is_fortran:
        order = " in Fortran order; save it with np.ascontiguousarray(vectors)" if is_fortran else ""
        raise DataError(f"{location}: expected an array (rows, width) in C order, got shape {shape}{order}")
    if not shape[1]:
        raise DataError(f"{location}: expected vectors of a width of at least 1, got shape {shape}")
    return NpyFile(
        path=path,
        num_rows=shape[0],
        width=shape[1],
        dtype=check_dtype(dtype, location),
        start=file.tell(),
        member=member,
    )


def _skip(file: IO[bytes], num_bytes: int) -> None:
    """Move forward; the member of an archive can only be read."""
    if isinstance(file, zipfile.ZipExtFile):
        while num_bytes and (read := len(file.read(min(num_bytes, _SKIP_BYTES)))):
            num_bytes -= read
    else:
        file.seek(num_bytes)


def _truncated(rows: NpyFile, num_there: int) -> CorruptError:
    return CorruptError(
        f"{rows.path} is cut short: expected {rows.num_rows:,} rows, got {num_there:,}; get the file again"
    )
