"""Tables of a cache, whose parts are files that never change, and single Parquet files that carry checksums.

A file of a cache is compared with the CRC-32C in `cache.json` when a process first opens it. Selections and the like
are single files: their pages and their footer have checksums.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Ints, blocks
from embedcache.errors import CorruptError, PathError
from embedcache.files import check_regular, is_remote, read_file, reading
from embedcache.modalities import MODALITIES
from embedcache.samples import FileItem
from embedcache.store.arrays import check_file
from embedcache.store.layout import TableFile

BLOCK = 65_536
"""Samples that are read and written together: the rows of a row group."""

ITEM_BLOCK = 16_384
"""Items that are read and written together."""

RESTORE_TABLE = "restore the file, or extract into a new folder"
"""What to do about a damaged table of a cache."""

_FOOTER_END = 8  # its length, int32 little-endian, and the magic number of Parquet
_READ_BYTES = 2**16  # as Arrow reads at once; a footer of millions of rows is longer
_CHECKSUM, _CHECKSUM_WORD = b"footer crc32c %08x", b"footer crc32c "
_CHECKSUM_BYTES = len(_CHECKSUM % 0)

_FILES = [("sample", pa.int64()), ("path", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]
_INTERVAL = [("start_s", pa.float64()), ("stop_s", pa.float64())]
_TEXTS = [("sample", pa.int64()), ("text", pa.string()), ("language", pa.string())]
ITEM_SCHEMAS = {
    name: pa.schema(_TEXTS if modality.kind == "texts" else _FILES + _INTERVAL * modality.has_interval)
    for name, modality in MODALITIES.items()
}

_SAMPLES_SCHEMA = pa.schema([("key", pa.string())])


@contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a local or remote Parquet table; its footer and pages are compared with the checksums that they have.

    Always read it with `use_threads=False`: the tables are small, and a process that exited right after Arrow's thread
    pool had started aborted in 2 of 30 runs (pyarrow 26, with torch imported). Local files are not read ahead either:
    Arrow does that in threads, which takes a table of one chunk four times as long.
    """
    if not is_remote(path):
        check_regular(path)
        with pa.OSFile(str(path)) as stream:  # opened once: another process may replace the table at any time
            metadata = _parse_footer(stream)
            with pq.ParquetFile(stream, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as table:
                yield table
    else:
        with path.open("rb") as stream:
            metadata = _parse_footer(stream)
            with pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True) as table:
                yield table


def _parse_footer(file: BinaryIO) -> pq.FileMetaData:
    """Read the footer, and compare it with its checksum first: Arrow may end the process on a damaged one."""
    size = file.seek(0, os.SEEK_END)
    end = _read_end(file, size, _READ_BYTES)
    length = _FOOTER_END + int.from_bytes(end[-_FOOTER_END:-4], "little")
    if len(end) < length + _CHECKSUM_BYTES:
        end = _read_end(file, size, length + _CHECKSUM_BYTES)
    footer, checksum = end[-length:], end[-length - _CHECKSUM_BYTES : -length]
    if checksum.startswith(_CHECKSUM_WORD) and checksum != _CHECKSUM % google_crc32c.value(footer):
        raise pa.ArrowInvalid("its footer has changed since it was written")
    with pq.ParquetFile(pa.BufferReader(end)) as table:
        return check_footer(table).metadata


def _read_end(file: BinaryIO, size: int, num_bytes: int) -> bytes:
    file.seek(max(0, size - num_bytes))
    return file.read()


def check_footer(table: pq.ParquetFile) -> pq.ParquetFile:
    """Return an open table whose footer counts its rows consistently, else raise `ArrowInvalid`."""
    metadata = table.metadata
    counts = {metadata.num_rows, sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))}
    if len(counts) > 1:
        raise pa.ArrowInvalid(f"its footer counts {' and '.join(map(str, sorted(counts)))} rows")
    return table


def add_footer_checksum(path: Path) -> None:
    """Write the CRC-32C of a finished table's footer in front of it: a gap to readers, which know where pages are."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        length = _FOOTER_END + int.from_bytes(_read_end(file, size, _FOOTER_END)[:4], "little")
        footer = _read_end(file, size, length)
        file.seek(size - length)
        file.write(_CHECKSUM % google_crc32c.value(footer) + footer)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table; `ArrowInvalid` if a page is damaged, or the counts of rows contradict each other."""
    with open_table(path) as table:
        rows, num_rows = table.read(columns=columns, use_threads=False), table.metadata.num_rows
    if len(rows) != num_rows:
        raise pa.ArrowInvalid(f"its footer counts {num_rows} rows, got {len(rows)}")
    return rows


def iterate_table(path: Path, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Iterate over the rows of a table, `size` at a time, or over one table without rows. Memory: a block.

    Columns that the table does not have are left out; errors are those of `read_table`.
    """
    with open_table(path) as table:
        num_rows, expected = 0, table.metadata.num_rows
        num_listed, expected_listed = 0, _count_listed(table.metadata, columns)
        for batch in table.iter_batches(size, columns=columns, use_threads=False):
            num_rows += len(batch)
            for column in batch.columns:
                if pa.types.is_list(column.type):
                    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
                    num_listed += int(np.maximum(lengths, 1).sum())
            yield pa.table(batch)
        if not expected:
            yield table.read(columns=columns, use_threads=False)
    if num_rows != expected:
        raise pa.ArrowInvalid(f"its footer counts {expected} rows, got {num_rows}")
    if num_listed != expected_listed:  # headers of pages have no checksums
        raise pa.ArrowInvalid(f"its footer counts {expected_listed} values of lists, got {num_listed}")


def _count_listed(metadata: pq.FileMetaData, columns: Sequence[str] | None) -> int:
    """Return how many values of lists there are by the footer, where an empty list counts as one."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    listed = [number for number, path in enumerate(paths) if ".list." in path]
    if columns is not None:
        listed = [number for number in listed if paths[number].partition(".")[0] in columns]
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return sum(group.column(number).num_values for group in groups for number in listed)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table whose pages and footer have checksums, which `open_table` compares."""
    pq.write_table(table, path, write_page_checksum=True)
    add_footer_checksum(path)


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
            if schema.field("key").type != pa.string():
                raise ValueError(f"expected keys of text, got {schema.field('key').type}")
            return schema

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

    def may_hold(self, rows: range, column: str, texts: Sequence[str]) -> bool:
        """Return whether some rows may have one of some texts, ascending, by the statistics of their row groups."""
        for file, first in zip(self._files, self._starts.tolist(), strict=False):
            inside = range(max(rows.start - first, 0), min(rows.stop - first, file.num_rows))
            if inside and _open_part(self._folder, file).may_hold(inside, column, texts):
                return True
        return False


class _OpenedPart(NamedTuple):
    """The footer of a file, its columns, and the first row of each row group, then the number of rows."""

    footer: pq.FileMetaData
    schema: pa.Schema
    starts: Ints

    def groups(self, rows: range) -> range:
        """Return the row groups that hold some rows."""
        first = int(np.searchsorted(self.starts, rows.start, "right")) - 1
        return range(first, int(np.searchsorted(self.starts[:-1], rows.stop)))

    def may_hold(self, rows: range, column: str, texts: Sequence[str]) -> bool:
        if column not in self.footer.schema.names:
            return False
        place = self.footer.schema.names.index(column)
        for group in self.groups(rows):
            found = self.footer.row_group(group).column(place).statistics
            if found is None or not found.has_min_max or not isinstance(found.min, str):
                return True
            first = bisect_left(texts, found.min)
            if first < len(texts) and texts[first] <= found.max:
                return True
        return False


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


def count_rows_of(folder: Path, file: TableFile) -> int:
    """Compare a file with its checksum now, and return the number of its rows."""
    path = folder / file.name
    if is_remote(path):
        _fetch.cache_clear()
        _fetch(path, file)
    else:
        check_file(path, file.checksum, next_step=RESTORE_TABLE, once=False)
    return int(_parse_part(path, file).starts[-1])


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
