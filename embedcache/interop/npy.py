"""Arrays in `.npy` files, with a table of keys and captions beside them.

The rows of an array that NumPy wrote: `.npy`, or one array of an `.npz`.
"""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy_format

from embedcache.arrays import Array
from embedcache.encoders.base import Modality
from embedcache.errors import CorruptError, DataError, SettingError, UnknownNameError
from embedcache.interop.incoming import Incoming, Part, check_dtype
from embedcache.interop.outgoing import new_folder
from embedcache.progress import Progress
from embedcache.sources.files import wrap_io_errors

if TYPE_CHECKING:
    from embedcache.interop.outgoing import Outgoing

FORM = "npy"
_BLOCK = 8192


def open_arrays(*, image: Path | None = None, text: Path | None = None, table: Path | None = None) -> Incoming:
    """Look at arrays whose rows belong together.

    Args:
        image: a `.npy` of image vectors.
        text: a `.npy` of text vectors.
        table: their keys, captions and columns: `.parquet`, `.csv`, `.tsv` or `.jsonl`.

    Raises:
        SettingError: no array is given.
        PathError: there is no such file.
        CorruptError: a file is damaged.
        DataError: an array is not (rows, width) of float16 or float32, or they differ in their rows.
    """
    given: list[tuple[Modality, Path | None]] = [("image", image), ("text", text)]
    vectors = {str(modality): open_npy(path) for modality, path in given if path is not None}
    first = image or text
    if first is None:
        raise SettingError("no array is given; give one with --image-file or --text-file, or one with each")
    modalities = {str(modality): modality for modality, path in given if path is not None}
    return Incoming(form=FORM, path=first, modalities=modalities, parts=[Part(vectors=vectors, table=table)])


def write_arrays(outgoing: "Outgoing", folder: Path, *, progress: Progress) -> int:
    """Write `image.npy`, `text.npy` and `rows.parquet` into a new folder, whole or not at all; give the number of rows.

    Vectors are as they are in the cache. Memory: a block, and the cache's tables.

    Raises:
        PathError: the folder is not empty.
    """
    num_rows = len(outgoing.samples)
    with new_folder(folder) as temporary:
        table: pa.Table = outgoing.table(slice(0, num_rows))
        pq.write_table(table.replace_schema_metadata(outgoing.metadata), temporary / "rows.parquet")
        for modality in outgoing.modalities:
            progress.start(f"writing {modality}.npy", num_rows, "vectors")
            with (temporary / f"{modality}.npy").open("wb") as file:
                write_header(file, (num_rows, outgoing.width(modality)), outgoing.dtype(modality))
                for block in outgoing.vectors(modality, _BLOCK):
                    file.write(block.tobytes())
                    progress.advance(len(block))
            progress.finish()
    return num_rows


_MOST_SKIPPED_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class NpyRows:
    """A two-dimensional array in C order, read a block at a time without a memory map.

    Args:
        path: the `.npy`, or the `.npz`.
        num_rows: of the array.
        width: of a row.
        dtype: `float16` or `float32`.
        start: where in the file its numbers begin.
        member: name of the array in an `.npz`; None for a `.npy`.
    """

    path: Path
    num_rows: int
    width: int
    dtype: str
    start: int
    member: str | None = None

    def blocks(self, first: int, size: int) -> Iterator[Array]:
        """Go through the rows from `first` on: arrays (B, D), B at most `size`.

        Raises:
            CorruptError: the file ends before its last row.
        """
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
        with damage_named(self.path):
            if self.member is None:
                with self.path.open("rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.member}.npy") as file:
                    yield file


def open_npy(path: Path) -> NpyRows:
    """Read the header of a `.npy` file.

    Raises:
        PathError: there is no such file.
        CorruptError: it is no `.npy`, or ends before its last row.
        DataError: it is not a two-dimensional array of float16 or float32 in C order.
    """
    with damage_named(path), path.open("rb") as file:
        rows = _of_header(path, file, None)
        num_bytes = os.fstat(file.fileno()).st_size - rows.start
    row_bytes = rows.width * np.dtype(rows.dtype).itemsize
    if num_bytes < rows.num_rows * row_bytes:
        raise _truncated(rows, num_bytes // row_bytes)
    return rows


def open_npz(path: Path, name: str) -> NpyRows:
    """Read the header of one array of an `.npz` file.

    Raises:
        PathError: there is no such file.
        CorruptError: it is no `.npz`.
        UnknownNameError: it has no such array; those that it has are listed.
        DataError: the array is not two-dimensional, of float16 or float32, in C order.
    """
    with damage_named(path), zipfile.ZipFile(path) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist()]
        if name not in names:
            raise UnknownNameError(f"{path} has no array {name!r}; it has {', '.join(sorted(names)) or 'none'}")
        with archive.open(f"{name}.npy") as file:
            return _of_header(path, file, name)


def write_header(file: IO[bytes], shape: tuple[int, int], dtype: str) -> None:
    """Begin a `.npy` file, format 1.0: 128 bytes, whose one line other readers parse by themselves."""
    about = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
    npy_format.write_array_header_1_0(file, about)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged file gives into an error that names it."""
    try:
        with wrap_io_errors(path):
            yield
    except (zipfile.BadZipFile, EOFError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} cannot be read: {error or 'it ends too early'}; get the file again") from error


def _of_header(path: Path, file: IO[bytes], member: str | None) -> NpyRows:
    place = str(path) if member is None else f"{path}, array {member},"
    shape, is_fortran, dtype = _read_header(path, file)
    if len(shape) != 2 or is_fortran:
        order = " in Fortran order" if is_fortran else ""
        raise DataError(f"{place} is shaped {shape}{order}; vectors are an array (rows, width) in C order")
    return NpyRows(
        path=path,
        num_rows=shape[0],
        width=shape[1],
        dtype=check_dtype(dtype, place),
        start=file.tell(),
        member=member,
    )


def _read_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = npy_format.read_magic(file)
        read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        return read(file)
    except ValueError as error:
        raise CorruptError(f"{path} is no array that NumPy wrote: {error}; get the file again") from error


def _skip(file: IO[bytes], num_bytes: int) -> None:
    """Go forward; the member of an archive can only be read."""
    if isinstance(file, zipfile.ZipExtFile):
        while num_bytes and (read := len(file.read(min(num_bytes, _MOST_SKIPPED_BYTES)))):
            num_bytes -= read
    else:
        file.seek(num_bytes)


def _truncated(rows: NpyRows, num_there: int) -> CorruptError:
    return CorruptError(
        f"{rows.path} is cut short: it holds {num_there:,} of {rows.num_rows:,} rows; get the file again"
    )
