"""The sample and item tables: their columns, and reading them in row order."""

import hashlib
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import CorruptError, EmbedcacheError, PathError, one_line
from embedcache.files import check_regular, is_remote
from embedcache.io_errors import io_reason
from embedcache.modalities import MODALITIES
from embedcache.provenance import digest
from embedcache.sources.base import FileItem
from embedcache.store.layout import items_path, samples_path

_FOOTER_END = 8  # its length, int32 little-endian, and the magic number of Parquet
_READ_BYTES = 2**16  # as Arrow reads at once; a footer of millions of rows is longer
_CHECKSUM, _CHECKSUM_WORD = b"footer crc32c %08x", b"footer crc32c "
_CHECKSUM_BYTES = len(_CHECKSUM % 0)


class Footer(NamedTuple):
    """The footer of a table, and whether the file has a checksum of it, which was compared."""

    metadata: pq.FileMetaData
    has_checksum: bool

    def may_hold(self, group: int, column: str, texts: Sequence[str]) -> bool:
        """Return whether a row group may have one of some texts, ascending, in a column, by its least and greatest.

        Arrow ends the process where it looks at a column of a damaged footer: without a checksum, each group may.
        """
        if not self.has_checksum or column not in self.metadata.schema.names:
            return True
        found = self.metadata.row_group(group).column(self.metadata.schema.names.index(column)).statistics
        if found is None or not found.has_min_max or not isinstance(found.min, str):
            return True
        first = bisect_left(texts, found.min)
        return first < len(texts) and texts[first] <= found.max


@contextmanager
def open_table(file: Path | BytesIO, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open a local or remote Parquet table; its footer and pages are compared with the checksums that they have.

    Always read it with `use_threads=False`: the tables are small, and a process that exited right after Arrow's thread
    pool had started aborted in 2 of 30 runs (pyarrow 26, with torch imported). Local files are not read ahead either:
    Arrow does that in threads, which takes a table of one chunk four times as long.
    """
    if isinstance(file, BytesIO):  # a commit has a digest
        with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as table:
            yield check_footer(table)
    elif not is_remote(file):
        check_regular(file)
        with pa.OSFile(str(file)) as stream:  # opened once: another process may replace the table at any time
            metadata = metadata or _parse_footer(stream).metadata
            with pq.ParquetFile(stream, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as table:
                yield table
    else:
        with file.open("rb") as stream:
            metadata = metadata or _parse_footer(stream).metadata
            with pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True) as table:
                yield table


def read_footer(path: Path) -> Footer:
    """Read the footer of a table.

    Raises:
        ArrowInvalid: it differs from its checksum, is not of Parquet, or contradicts itself about the number of rows.
    """
    if not is_remote(path):
        check_regular(path)
    with path.open("rb") as file:
        return _parse_footer(file)


def _parse_footer(file: BinaryIO) -> Footer:
    size = file.seek(0, os.SEEK_END)
    end = _read_end(file, size, _READ_BYTES)
    length = _FOOTER_END + int.from_bytes(end[-_FOOTER_END:-4], "little")
    if len(end) < length + _CHECKSUM_BYTES:
        end = _read_end(file, size, length + _CHECKSUM_BYTES)
    footer, checksum = end[-length:], end[-length - _CHECKSUM_BYTES : -length]
    has_checksum = checksum.startswith(_CHECKSUM_WORD)
    if has_checksum and checksum != _CHECKSUM % google_crc32c.value(footer):
        raise pa.ArrowInvalid("its footer has changed since it was written")
    with pq.ParquetFile(pa.BufferReader(end)) as table:
        return Footer(check_footer(table).metadata, has_checksum)


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


def read_table(file: Path | BytesIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table; `ArrowInvalid` if a page is damaged, or the counts of rows contradict each other."""
    with open_table(file) as table:
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
        for batch in table.iter_batches(size, columns=columns, use_threads=False):
            num_rows += len(batch)
            yield pa.table(batch)
        if not expected:
            yield table.read(columns=columns, use_threads=False)
    if num_rows != expected:
        raise pa.ArrowInvalid(f"its footer counts {expected} rows, got {num_rows}")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table whose pages and footer have checksums, which `open_table` compares."""
    pq.write_table(table, path, write_page_checksum=True)
    add_footer_checksum(path)


class TableDigest:
    """SHA-256 of the values of a table's columns in row order, independent of batches."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, rows: pa.Table) -> None:
        """Add rows with int64, float64 and string columns."""
        for name in rows.column_names:
            kind = rows.schema.field(name).type
            if pa.types.is_integer(kind):
                data = rows[name].to_numpy().astype("<i8").tobytes()
            elif pa.types.is_floating(kind):
                data = rows[name].to_numpy().astype("<f8").tobytes()  # null is NaN, which is no value of these tables
            else:
                values = rows[name].to_pylist()
                data = "".join("\1\0" if value is None else f"{value}\0" for value in values).encode()
            self._columns[name].update(data)

    def hexdigest(self) -> str:
        """Return the digest as 64 hex digits."""
        return digest({name: column.hexdigest() for name, column in self._columns.items()})


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading a table as a `PathError`, or as a `CorruptError` if the file is not that table."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, EmbedcacheError):
            raise
        if getattr(error, "errno", None) is not None:
            raise PathError(f"cannot read {path}: {io_reason(error)}") from error
        raise CorruptError(
            f"{path} cannot be read: {one_line(error)}; restore the file, or extract into a new folder"
        ) from error


_FILES = [("sample", pa.int64()), ("path", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]
_INTERVAL = [("start_s", pa.float64()), ("stop_s", pa.float64())]
_TEXTS = [("sample", pa.int64()), ("text", pa.string()), ("language", pa.string())]
ITEM_SCHEMAS = {
    name: pa.schema(_TEXTS if modality.kind == "texts" else _FILES + _INTERVAL * modality.has_interval)
    for name, modality in MODALITIES.items()
}


def item_tables(folder: Path) -> list[str]:
    """Return the modalities that have an item table in a folder."""
    return [modality for modality in ITEM_SCHEMAS if items_path(folder, modality).is_file()]


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """One sample of the tables of a cache.

    Args:
        files: modality -> first row of its items, and the items; of modalities that the cache has.
        texts: each text with its language.
    """

    key: str
    files: Mapping[str, tuple[int, Sequence[FileItem]]]
    texts: Sequence[tuple[str, str | None]]


def read_samples(cache_path: Path, modalities: Collection[str], rows: range) -> Iterator[IndexedSample]:
    """Iterate over samples of a cache with items of some modalities in row order. Memory: one batch of each table."""
    keys = (row["key"] for row in _iterate_rows(samples_path(cache_path), ["key"]))
    names = [name for name in modalities if MODALITIES[name].kind == "files"]
    texts = _rows_by_sample(items_path(cache_path, "text")) if "text" in modalities else repeat([])
    items = (_rows_by_sample(items_path(cache_path, modality)) for modality in names)
    next_rows = dict.fromkeys(names, 0)
    for number, (key, captions, *groups) in enumerate(islice(zip(keys, texts, *items, strict=False), rows.stop)):
        if number >= rows.start:
            yield IndexedSample(
                key=key,
                files={
                    name: (next_rows[name], [to_file_item(row) for row in group])
                    for name, group in zip(names, groups, strict=True)
                },
                texts=[(row["text"], row["language"]) for row in captions],
            )
        for name, group in zip(names, groups, strict=True):
            next_rows[name] += len(group)


def to_file_item(row: Mapping[str, Any]) -> FileItem:
    """Return the item in a row of an item table of files."""
    return FileItem(**{name: value for name, value in row.items() if name != "sample"})


def _iterate_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    with table_errors(path), open_table(path) as table:
        for batch in table.iter_batches(columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _rows_by_sample(path: Path) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over the rows of each sample in an item table, which is sorted by sample; without end."""
    next_sample = 0
    for sample, rows in groupby(_iterate_rows(path), key=itemgetter("sample")):
        yield from repeat([], sample - next_sample)
        yield list(rows)
        next_sample = sample + 1
    yield from repeat([])
