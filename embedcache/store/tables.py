"""Parquet tables that are checked as they are read: their footer and pages, and the rows of samples and items.

Rows have a CRC-32C of each column, by blocks, so that any part is checked when read. It is computed from values, not
from the bytes of the file: a table that another process has made longer since `cache.json` was read has the same rows
at its start, and another Parquet writer gives the same checksums.
"""

import hashlib
import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Ints
from embedcache.errors import CorruptError
from embedcache.files import check_regular, is_remote
from embedcache.modalities import MODALITIES
from embedcache.provenance import digest
from embedcache.sources.base import FileItem
from embedcache.store.arrays import DIGITS
from embedcache.store.layout import items_path

BLOCK = 65_536
"""Rows of the sample table in a block; an item table has blocks of a chunk."""

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


class OpenedTable(NamedTuple):
    """A table's file of an inode, size and time: its footer, and the first row of each row group, then their number."""

    stamp: tuple[int, int, int]
    footer: pq.FileMetaData
    starts: Ints

    def may_hold(self, group: int, column: str, texts: Sequence[str]) -> bool:
        """Return whether a row group may have one of some texts, ascending, in a column, by its least and greatest."""
        if column not in self.footer.schema.names:
            return True
        found = self.footer.row_group(group).column(self.footer.schema.names.index(column)).statistics
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
            metadata = metadata or _parse_footer(stream)
            with pq.ParquetFile(stream, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as table:
                yield table
    else:
        with file.open("rb") as stream:
            metadata = metadata or _parse_footer(stream)
            with pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True) as table:
                yield table


def read_footer(path: Path) -> pq.FileMetaData:
    """Read the footer of a table of a cache, which has a checksum: Arrow may end the process on a damaged one.

    Raises:
        ArrowInvalid: it has no checksum or differs from it, is not of Parquet, or contradicts itself about the number
            of rows.
    """
    if not is_remote(path):
        check_regular(path)
    with path.open("rb") as file:
        return _parse_footer(file, is_own=True)


def read_opened(path: Path, before: OpenedTable | None) -> OpenedTable:
    """Read the footer of a table, or return what was read before if the file has not changed.

    Parsing a footer takes longer than reading the rows of a chunk. Another process may append samples at any time.
    """
    status = path.stat()
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    if before is not None and before.stamp == stamp:
        return before
    footer = read_footer(path)
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return OpenedTable(stamp, footer, np.cumsum([0, *counts]))


def _parse_footer(file: BinaryIO, *, is_own: bool = False) -> pq.FileMetaData:
    size = file.seek(0, os.SEEK_END)
    end = _read_end(file, size, _READ_BYTES)
    length = _FOOTER_END + int.from_bytes(end[-_FOOTER_END:-4], "little")
    if len(end) < length + _CHECKSUM_BYTES:
        end = _read_end(file, size, length + _CHECKSUM_BYTES)
    footer, checksum = end[-length:], end[-length - _CHECKSUM_BYTES : -length]
    has_checksum = checksum.startswith(_CHECKSUM_WORD)
    if is_own and not has_checksum:
        raise pa.ArrowInvalid("its footer has no checksum")
    if has_checksum and checksum != _CHECKSUM % google_crc32c.value(footer):
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


def item_tables(folder: Path) -> list[str]:
    """Return the modalities that have an item table in a folder."""
    return [modality for modality in ITEM_SCHEMAS if items_path(folder, modality).is_file()]


def to_file_item(row: Mapping[str, Any]) -> FileItem:
    """Return the item in a row of an item table of files."""
    return FileItem(**{name: value for name, value in row.items() if name != "sample"})


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


class TableChecksums:
    """Checksums of a table whose rows arrive in order, in batches of any size. Memory: a block."""

    def __init__(self, block_rows: int) -> None:
        self._block_rows = block_rows
        self._columns: dict[str, list[str]] = defaultdict(list)
        self._left: pa.Table | None = None

    def update(self, rows: pa.Table) -> None:
        """Add rows."""
        rows = rows if self._left is None else pa.concat_tables([self._left, rows])
        num_full = len(rows) // self._block_rows * self._block_rows
        for start in range(0, num_full, self._block_rows):
            self._add(rows.slice(start, self._block_rows))
        self._left = rows.slice(num_full)

    def close(self) -> dict[str, str]:
        """Return column -> 8 hex digits per block."""
        if self._left is not None and len(self._left):
            self._add(self._left)
        self._left = None
        return {name: "".join(blocks) for name, blocks in self._columns.items()}

    def _add(self, block: pa.Table) -> None:
        for name in block.column_names:
            self._columns[name].append(column_checksum(block[name]))


def column_checksum(column: "pa.Array | pa.ChunkedArray") -> str:
    """Return the CRC-32C of the values of a column as 8 hex digits: which are null, then all others in row order.

    Whole numbers and booleans count as int64, other numbers as float64, little-endian; texts and bytes as their
    lengths, int64, then their bytes; anything else as JSON.
    """
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    crc = google_crc32c.value(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    for part in _value_bytes(values):
        crc = google_crc32c.extend(crc, part)
    return f"{crc:08x}"


def _value_bytes(values: pa.Array) -> Iterator[bytes]:
    kind = values.type
    if pa.types.is_boolean(kind):
        values, kind = values.cast(pa.int8()), pa.int8()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        dtype = "<i8" if pa.types.is_integer(kind) else "<f8"
        yield values.fill_null(0).to_numpy(zero_copy_only=False).astype(dtype).tobytes()
    elif kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()) or pa.types.is_fixed_size_binary(
        kind
    ):
        texts = values.cast(pa.large_binary()).fill_null(b"")
        yield pc.binary_length(texts).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        offsets = np.frombuffer(texts.buffers()[1], "<i8", len(texts) + 1, offset=8 * texts.offset)
        data = texts.buffers()[2]
        yield b"" if data is None else data.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).to_pybytes()
    else:
        yield json.dumps(values.to_pylist(), sort_keys=True, default=str).encode()


def check_rows(rows: pa.Table, checksums: Mapping[str, str], first_row: int, block_rows: int, path: Path) -> None:
    """Compare rows of a table with their checksums.

    Args:
        rows: all rows from `first_row` on that the checksums cover, or whole blocks of them; some columns are enough.
        checksums: column -> 8 hex digits per block; columns without are not compared.
        first_row: first row of a block.
        block_rows: rows per block.
        path: file of the table.

    Raises:
        CorruptError: a column differs.
    """
    for name in rows.column_names:
        written = checksums.get(name, "")
        for start in range(0, len(rows) if written else 0, block_rows):
            place = (first_row + start) // block_rows * DIGITS
            if column_checksum(rows[name].slice(start, block_rows)) != written[place : place + DIGITS]:
                raise CorruptError(
                    f"{path}: column {name!r} has changed since it was written, in rows {first_row:,} to "
                    f"{first_row + len(rows) - 1:,}; if an --extend, --retry-failed or cache remove was interrupted, "
                    "run it again; else restore the file, or extract into a new folder"
                )
