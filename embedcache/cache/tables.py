"""Reading our Parquet tables, on the calling thread alone."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.artifact import digest
from embedcache.errors import CorruptError, EmbedcacheError, PathError
from embedcache.paths import io_reason, is_remote


@contextmanager
def open_table(file: Path | BytesIO, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open a table of this machine or behind a URL.

    Always read it with `use_threads=False`: our tables are small, and a process that ended right after Arrow's thread
    pool had started aborted in 2 of 30 runs (pyarrow 26, with torch imported).
    """
    if isinstance(file, BytesIO) or not is_remote(file):
        with pq.ParquetFile(file, metadata=metadata) as table:
            yield table
        return
    with file.open("rb") as opened, pq.ParquetFile(opened, metadata=metadata) as table:
        yield table


def read_table(file: Path | BytesIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a whole table."""
    with open_table(file) as table:
        return table.read(columns=columns, use_threads=False)


def iterate_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """Go through the rows of a table. Memory: one batch."""
    with table_errors(path), open_table(path) as table:
        for batch in table.iter_batches(columns=columns, use_threads=False):
            yield from batch.to_pylist()


class TableDigest:
    """SHA-256 over the values of a table's columns in row order, however the rows are cut into batches."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, rows: pa.Table) -> None:
        """Take more rows, of int64 and string columns."""
        for name in rows.column_names:
            if pa.types.is_integer(rows.schema.field(name).type):
                data = rows[name].to_numpy().astype("<i8").tobytes()
            else:
                values = rows[name].to_pylist()
                data = "".join("\1\0" if value is None else f"{value}\0" for value in values).encode()
            self._columns[name].update(data)

    def hexdigest(self) -> str:
        """Give it as 64 hex digits."""
        return digest({name: column.hexdigest() for name, column in self._columns.items()})


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turn a table that cannot be read into our error.

    Raises:
        PathError: the system does not give it.
        CorruptError: it is no such table.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, EmbedcacheError):
            raise
        if getattr(error, "errno", None) is not None:
            raise PathError(f"cannot read {path}: {io_reason(error)}") from error
        raise CorruptError(
            f"{path} cannot be read: {error}; get the file again, or extract into a new folder"
        ) from error
