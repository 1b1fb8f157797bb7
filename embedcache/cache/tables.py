"""Reading our Parquet tables, on the calling thread alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import CorruptError


def read_table(file: Path | BytesIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a whole table.

    Without Arrow's thread pool: our tables are small, and a process that ended right after the pool had started
    aborted in 2 of 30 runs (pyarrow 26, with torch imported).
    """
    with pq.ParquetFile(file) as opened:
        return opened.read(columns=columns, use_threads=False)


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Turn a table that cannot be read into our error.

    Raises:
        CorruptError: names the file.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptError(
            f"{path} cannot be read: {error}; get the file again, or extract into a new folder"
        ) from error
