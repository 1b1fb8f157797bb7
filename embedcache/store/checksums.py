"""Checksums of the rows of tables: a CRC-32C of each column, by blocks of rows, so that any part is checked when read.

They are computed from values, not from the bytes of the Parquet file: a table that another process has made longer
since `cache.json` was read has the same rows at its start, and another Parquet writer gives the same checksums.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.errors import CorruptError
from embedcache.store.arrays import DIGITS

BLOCK = 65_536
"""Rows of the sample table in a block; an item table has blocks of a chunk."""


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


def column_checksum(column: pa.ChunkedArray) -> str:
    """Return the CRC-32C of the values of a column as 8 hex digits: which are null, then all others in row order.

    Whole numbers and booleans count as int64, other numbers as float64, little-endian; texts and bytes as their
    lengths, int64, then their bytes; anything else as JSON.
    """
    values = column.combine_chunks()
    crc = google_crc32c.value(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    for part in _parts(values):
        crc = google_crc32c.extend(crc, part)
    return f"{crc:08x}"


def _parts(values: pa.Array) -> Iterator[bytes]:
    kind = values.type
    if pa.types.is_boolean(kind):
        values, kind = values.cast(pa.int8()), pa.int8()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        dtype = "<i8" if pa.types.is_integer(kind) else "<f8"
        yield values.fill_null(0).to_numpy(zero_copy_only=False).astype(dtype).tobytes()
    elif kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        texts = values.cast(pa.large_binary()).fill_null(b"")
        yield pc.binary_length(texts).to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        offsets = np.frombuffer(texts.buffers()[1], "<i8", len(texts) + 1, offset=8 * texts.offset)
        data = texts.buffers()[2]
        yield b"" if data is None else data.slice(int(offsets[0]), int(offsets[-1] - offsets[0])).to_pybytes()
    else:
        yield json.dumps(values.to_pylist(), sort_keys=True, default=str).encode()


def find_changed(rows: pa.Table, checksums: Mapping[str, str], first_row: int, block_rows: int) -> str | None:
    """Return the first column that differs from its checksums; None if all are as written.

    Args:
        rows: all rows from `first_row` on that the checksums cover, or whole blocks of them; some columns are enough.
        checksums: column -> 8 hex digits per block; columns without are not compared, as those of the first caches.
        first_row: first row of a block.
        block_rows: rows per block.
    """
    names: list[str] = rows.column_names
    for name in names:
        written = checksums.get(name, "")
        for start in range(0, len(rows) if written else 0, block_rows):
            place = (first_row + start) // block_rows * DIGITS
            if column_checksum(rows[name].slice(start, block_rows)) != written[place : place + DIGITS]:
                return name
    return None


def check_rows(rows: pa.Table, checksums: Mapping[str, str], first_row: int, block_rows: int, path: Path) -> None:
    """Compare rows of a table with their checksums, or raise a `CorruptError`; the arguments are of `find_changed`."""
    changed = find_changed(rows, checksums, first_row, block_rows)
    if changed is not None:
        last = first_row + len(rows) - 1
        raise CorruptError(
            f"{path}: column {changed!r} has changed since it was written, in rows {first_row:,} to {last:,}; if an "
            "--extend, --retry-failed or cache remove was interrupted, run it again; else restore the file, or extract "
            "into a new folder"
        )
