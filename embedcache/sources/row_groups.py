"""Images that stand in Parquet files, read by row from many threads through the last few row groups."""

from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa

from embedcache.errors import EmbedcacheError, ItemError
from embedcache.sources.table_files import damage_named, open_parquet

CACHE_BYTES = 256 * 2**20


class RowGroups:
    """Reads single cells. Rows that follow each other cost one read of their row group.

    Peak memory: `cache_bytes`, or one row group of the image column where that is larger, and the
    one being read.

    Args:
        cache_bytes: decoded row groups kept, in bytes.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[Path, str, int], pa.ChunkedArray] = OrderedDict()
        self._starts: dict[Path, list[int]] = {}
        self._lock = Lock()

    def read(self, path: Path, column: str, row: int) -> Any:
        """Get one cell: bytes, a dict for a struct, or None. Safe from many threads.

        Raises:
            ItemError: the file is gone or damaged, or has no such row.
        """
        try:
            with self._lock:  # pyarrow itself reads a row group with several threads
                group, first = self._locate(path, row)
                cells = self._group(path, column, group)
        except EmbedcacheError as error:
            raise ItemError(str(error)) from None
        return cells[row - first].as_py()

    def _locate(self, path: Path, row: int) -> tuple[int, int]:
        """Give the row group of a row and the first row of that group."""
        if path not in self._starts:
            with damage_named(path):
                self._starts[path] = _group_starts(path)
        starts = self._starts[path]
        if row >= starts[-1]:
            raise ItemError(f"{path} has {starts[-1]} rows, no row {row}")
        group = bisect_right(starts, row) - 1
        return group, starts[group]

    def _group(self, path: Path, column: str, group: int) -> pa.ChunkedArray:
        name = (path, column, group)
        if name not in self._groups:
            with damage_named(path), open_parquet(path) as file:
                self._groups[name] = file.read_row_group(group, columns=[column]).column(column)
        self._groups.move_to_end(name)
        self._drop_oldest()
        return self._groups[name]

    def _drop_oldest(self) -> None:
        while len(self._groups) > 1 and self._size_bytes() > self._cache_bytes:
            self._groups.popitem(last=False)

    def _size_bytes(self) -> int:
        return sum(int(cells.nbytes) for cells in self._groups.values())


def _group_starts(path: Path) -> list[int]:
    """Give the first row of each row group, and at the end the number of rows."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return list(accumulate(sizes, initial=0))
