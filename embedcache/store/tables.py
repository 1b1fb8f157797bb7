"""Tables of a cache, whose parts are files that never change, and single Parquet files that carry checksums.

A file of a cache is compared with the CRC-32C in `cache.json` when a process first opens it. Selections and the like
are single files, which hold a checksum of their other bytes. Values of millions of rows stay in Arrow's memory.

A removed sample keeps its row, so that the rows of all others stay: its key is `removed-` with its row, its other
columns are null, its captions are empty, and its items have no path and no feature. The source may still have it, so
the table of `RemovedSamples` holds a keyed digest of its key, by which an extraction leaves it out.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, overload

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.errors import CorruptError, PathError
from embedcache.files import check_regular, is_remote, read_file, reading, replacing
from embedcache.modalities import MODALITIES
from embedcache.provenance import digest_file
from embedcache.samples import FileItem
from embedcache.store.arrays import check_file
from embedcache.store.layout import SAMPLES, CacheInfo, TableFile, removed_path

T = TypeVar("T")


class Column(Sequence[T]):
    """A column of values, None where it is null; a Python object is made only for a value that is read.

    Args:
        array: the values, in Arrow's memory.
    """

    def __init__(self, array: "pa.Array | pa.ChunkedArray") -> None:
        self.array = array

    def is_null(self) -> Bools:
        """Return which values are null: (N,) bool."""
        is_null: Bools = self.array.is_null().to_numpy(zero_copy_only=False)
        return is_null

    def count(self, value: object) -> int:
        """Count a value."""
        return int(pc.sum(pc.equal(self.array, pa.scalar(value, self.array.type))).as_py() or 0)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.array[index].to_pylist() if isinstance(index, slice) else self.array[index].as_py()

    def __iter__(self) -> Iterator[T]:
        return iter(self.array.to_pylist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001 - as NumPy calls it
        values: Array = np.array(self.array, dtype=dtype, copy=copy)
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def to_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return values as one Arrow array."""
    if not isinstance(values, Column):
        return pa.array(values, kind)
    array = values.array.cast(kind)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def is_none(values: Sequence[Any]) -> Bools:
    """Return which values are None: (N,) bool."""
    if isinstance(values, Column):
        return values.is_null()
    return np.array([value is None for value in values], bool)


BLOCK = 65_536
"""Samples that are read and written together: the rows of a row group."""

ITEM_BLOCK = 16_384
"""Items that are read and written together."""


def block_rows(name: str) -> int:
    """Return the rows of a row group of a table, `samples` or that of a modality; the last one has fewer."""
    return BLOCK if name == SAMPLES else ITEM_BLOCK


RESTORE_TABLE = "restore the file, or extract into a new folder"
"""What to do about a damaged table of a cache."""

_FOOTER_END = 8  # its length, int32 little-endian, and the magic number of Parquet
_CHECKSUM, _CHECKSUM_WORD = b"crc32c of the rest %08x", b"crc32c of the rest "
_CHECKSUM_BYTES = len(_CHECKSUM % 0)
_READ_BYTES = 2**20

_TEXT = pa.large_string()
"""Type of all texts that are read: an array of `string` holds 2 GiB, which keys and captions exceed."""

_FILES = [("sample", pa.int64()), ("path", _TEXT), ("offset", pa.int64()), ("length", pa.int64())]
_INTERVAL = [("start_s", pa.float64()), ("stop_s", pa.float64())]
_TEXTS = [("sample", pa.int64()), ("text", _TEXT), ("language", _TEXT)]
ITEM_SCHEMAS = {
    name: pa.schema(_TEXTS if modality.kind == "texts" else _FILES + _INTERVAL * modality.has_interval)
    for name, modality in MODALITIES.items()
}

_SAMPLES_SCHEMA = pa.schema([("key", _TEXT)])


@contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a local or remote Parquet table, after its bytes were compared with the checksum that it has, if any.

    Always read it with `use_threads=False`: the tables are small, and a process that exited right after Arrow's thread
    pool had started aborted in 2 of 30 runs (pyarrow 26, with torch imported).

    Raises:
        pa.ArrowInvalid: its bytes have changed since it was written.
    """
    if not is_remote(path):
        check_regular(path)
    with path.open("rb") as file:  # opened once: another process may replace the table at any time
        _compare(file)
        with pq.ParquetFile(file) as table:
            yield table


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table; errors are those of `open_table`."""
    with open_table(path) as table:
        return table.read(columns=columns, use_threads=False)


def iterate_table(path: Path, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Iterate over the rows of a table, `size` at a time, or over one table without rows. Memory: a block.

    Columns that the table does not have are left out; errors are those of `open_table`.
    """
    with open_table(path) as table:
        for batch in table.iter_batches(size, columns=columns, use_threads=False):
            yield pa.table(batch)
        if not table.metadata.num_rows:
            yield table.read(columns=columns, use_threads=False)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table with a checksum of its bytes, with which `open_table` compares them."""
    pq.write_table(table, path)
    add_checksum(path)


def add_checksum(path: Path) -> None:
    """Write the CRC-32C of all bytes of a finished table in front of its footer.

    To readers of Parquet this is a gap: they know where pages are.
    """
    with path.open("r+b") as file:
        start = _footer_start(file)
        checksum = _CHECKSUM % _crc(file, start, start)
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(checksum + footer)


def _compare(file: BinaryIO) -> None:
    """Compare a table with its checksum, before Arrow sees it: a damaged footer may end the process."""
    start = _footer_start(file)
    file.seek(max(0, start - _CHECKSUM_BYTES))
    checksum = file.read(_CHECKSUM_BYTES)
    if not checksum.startswith(_CHECKSUM_WORD):
        return  # of another tool
    if checksum != _CHECKSUM % _crc(file, start - _CHECKSUM_BYTES, start):
        raise pa.ArrowInvalid("its bytes have changed since it was written")


def _footer_start(file: BinaryIO) -> int:
    """Return where the footer of a table begins, by its length at the end of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _FOOTER_END))
    return max(0, size - _FOOTER_END - int.from_bytes(file.read(4), "little"))


def _crc(file: BinaryIO, stop: int, start: int) -> int:
    """Return the CRC-32C of a file without its bytes from `stop` to `start`. Memory: a block."""
    file.seek(0)
    crc = 0
    for rows in blocks(stop, _READ_BYTES):
        crc = google_crc32c.extend(crc, file.read(rows.stop - rows.start))
    file.seek(start)
    while block := file.read(_READ_BYTES):
        crc = google_crc32c.extend(crc, block)
    return crc


def to_file_item(row: Mapping[str, Any]) -> FileItem:
    """Return the item in a row of an item table of files."""
    return FileItem(**{name: value for name, value in row.items() if name != "sample"})


class Table:
    """One table of a cache, `samples` or the items of a modality: the rows of its parts, one after another.

    A file is compared with its checksum when this process first opens it. Thread-safe.

    Args:
        folder: folder of the cache.
        files: the files of its parts, in row order.
        schema: columns that all parts have. None for samples, of which parts may have other columns besides the key.
    """

    def __init__(self, folder: Path, files: Sequence[TableFile], schema: pa.Schema | None = None) -> None:
        self._folder, self._files, self._given = folder, files, schema
        self._starts = np.cumsum([0, *(file.num_rows for file in files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the columns that any part has."""
        if self._given is not None or not self._files:
            return self._given or _SAMPLES_SCHEMA
        schemas = [_open_part(self._folder, file).schema for file in self._files]
        with reading(self._folder / self._files[0].name, RESTORE_TABLE):
            schema = pa.unify_schemas([_SAMPLES_SCHEMA, *schemas], promote_options="permissive")
            if schema.field("key").type != _TEXT:
                raise ValueError(f"expected keys of text, got {schema.field('key').type}")
            return pa.schema([f.with_type(_TEXT) if pa.types.is_string(f.type) else f for f in schema])

    def read(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return rows, which are read with the row groups that hold them; None is read where a part lacks a column.

        Raises:
            PathError: a file is missing.
            CorruptError: a file has other bytes than it was written with.
            KeyError: there is no such column.
        """
        stop = len(self) if stop is None else stop
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        pieces = [schema.empty_table()]
        for file, first in zip(self._files, self._starts.tolist(), strict=False):
            rows = range(max(start - first, 0), min(stop - first, file.num_rows))
            if rows:
                pieces.append(_read_rows(self._folder, file, rows, schema, has_all=self._given is not None))
        return pa.concat_tables(pieces)

    def blocks(self, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Iterate over all rows, `size` at a time. Memory: a block."""
        for rows in blocks(len(self), size):
            yield self.read(rows.start, rows.stop, columns)


class _OpenedPart(NamedTuple):
    """The footer of a file, its columns, and the first row of each row group, then the number of rows."""

    footer: pq.FileMetaData
    schema: pa.Schema
    starts: Ints

    def groups(self, rows: range) -> range:
        """Return the row groups that hold some rows."""
        first = int(np.searchsorted(self.starts, rows.start, "right")) - 1
        return range(first, int(np.searchsorted(self.starts[:-1], rows.stop)))


def _open_part(folder: Path, file: TableFile) -> _OpenedPart:
    """Compare a file with its checksum, unless this process has, and return its footer."""
    path = folder / file.name
    if not is_remote(path):
        check_file(path, file.checksum, next_step=RESTORE_TABLE)
    return _parse_part(path, file)


@lru_cache(maxsize=256)
def _parse_part(path: Path, file: TableFile) -> _OpenedPart:
    with reading(path, RESTORE_TABLE), _open_stream(path, file) as stream, pq.ParquetFile(stream) as table:
        footer, schema = table.metadata, table.schema_arrow.remove_metadata()
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if sum(counts) != file.num_rows:
        raise CorruptError(f"{path}: expected {file.num_rows:,} rows, got {sum(counts):,}; {RESTORE_TABLE}")
    return _OpenedPart(footer, schema, np.cumsum([0, *counts]))


def _open_stream(path: Path, file: TableFile) -> Any:
    return pa.BufferReader(_fetch(path, file)) if is_remote(path) else pa.OSFile(str(path))


@lru_cache(maxsize=8)
def _fetch(path: Path, file: TableFile) -> bytes:
    """Read a whole file behind a URL, and compare it with its checksum."""
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise PathError(f"{path} does not exist; {RESTORE_TABLE}") from error
    actual = f"{google_crc32c.value(data):08x}"
    if actual != file.checksum:
        raise CorruptError(f"{path}: expected checksum {file.checksum}, got {actual}; {RESTORE_TABLE}")
    return data


def check_table(folder: Path, file: TableFile) -> None:
    """Compare a file with its checksum and its number of rows now."""
    path = folder / file.name
    if is_remote(path):
        _fetch.cache_clear()
        _fetch(path, file)
    else:
        check_file(path, file.checksum, next_step=RESTORE_TABLE, once=False)
    _parse_part(path, file)


def _read_rows(folder: Path, file: TableFile, rows: range, schema: pa.Schema, *, has_all: bool) -> pa.Table:
    """Read rows of a file with the columns of a schema, null where the file lacks one that it need not have."""
    path, opened = folder / file.name, _open_part(folder, file)
    groups = opened.groups(rows)
    names = [name for name in schema.names if name in opened.schema.names]
    missing = [name for name in schema.names if name not in names and (has_all or name == "key")]
    if missing:
        raise CorruptError(f"{path} has no column {missing[0]!r}; {RESTORE_TABLE}")

    with reading(path, RESTORE_TABLE):
        with _open_stream(path, file) as stream, pq.ParquetFile(stream, metadata=opened.footer) as table:
            # Without threads: a process that ends right after Arrow's pool has started may abort.
            found = table.read_row_groups(list(groups), columns=names, use_threads=False)
        found = found.slice(rows.start - int(opened.starts[groups.start]), len(rows))
        columns = {
            field.name: found[field.name].cast(field.type) if field.name in names else pa.nulls(len(rows), field.type)
            for field in schema
        }
        return pa.table(columns, schema=schema)


_DIGEST_BYTES = 16
_SCHEMA = pa.schema([("row", pa.int64()), ("key_digest", pa.binary(_DIGEST_BYTES))])
_SALT = b"salt"


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """Samples that were removed.

    Args:
        table: `row`, ascending, and `key_digest`, the keyed BLAKE2b-128 of the key.
        salt: key of the digests.
    """

    table: pa.Table
    salt: str

    @property
    def rows(self) -> Ints:
        """(M,) int64 rows of the sample table, ascending."""
        rows: Ints = self.table["row"].to_numpy()
        return rows

    @cached_property
    def _digests(self) -> dict[bytes, int]:
        return dict(zip(self.table["key_digest"].to_pylist(), self.rows.tolist(), strict=True))

    def row_of(self, key: str) -> int | None:
        """Return the row that a key had; None if no sample of that key was removed, as far as digests tell."""
        return self._digests.get(digest_key(key, self.salt)) if self._digests else None

    def merge(self, other: "RemovedSamples") -> "RemovedSamples":
        """Return the samples of both, whose digests have one salt."""
        table = pa.concat_tables([self.table, other.table.filter(~np.isin(other.rows, self.rows))])
        return RemovedSamples(table=table.sort_by("row"), salt=self.salt)


def digest_key(key: str, salt: str) -> bytes:
    """Return the keyed BLAKE2b-128 of a key."""
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES, key=salt.encode()[:64]).digest()


def make_removed(rows: Ints, keys: Sequence[str], salt: str) -> RemovedSamples:
    """Return the table of some samples."""
    digests = [digest_key(key, salt) for key in keys]
    return RemovedSamples(table=pa.table([rows, digests], schema=_SCHEMA), salt=salt)


def read_removed(cache_path: Path, info: CacheInfo) -> RemovedSamples:
    """Read the samples that were removed from a cache.

    Raises:
        CorruptError: the table is missing or has changed.
    """
    if not info.removed:
        return make_removed(np.empty(0, np.int64), [], info.index_digest)
    path = removed_path(cache_path, info.removed)
    if not path.is_file() or digest_file(path) != info.removed["digest"]:
        raise CorruptError(
            f"{path}: expected the table of removed samples that cache.json was written for, got "
            f"{'another file' if path.is_file() else 'none'}; restore the file"
        )
    with reading(path, RESTORE_TABLE):
        table = read_table(path)
        return RemovedSamples(table=table.cast(_SCHEMA), salt=table.schema.metadata[_SALT].decode())


def write_removed(path: Path, removed: RemovedSamples) -> None:
    """Write a table of removed samples, atomically."""
    with replacing(path) as temporary:
        write_table(temporary, removed.table.cast(_SCHEMA.with_metadata({_SALT: removed.salt})))
