"""Rows of a cache's tables in any order, without reading the tables."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.store.cache import Cache
from embedcache.store.keys import find_keys

_KEPT_ROWS = 2**22


class RowReader:
    """Reads rows of one table of a cache, in any order. Thread-safe.

    Only the blocks that hold the rows are read and compared with their checksums: 65,536 samples or a chunk of items
    each. Memory: the blocks used last, up to `kept_rows`; after `load`, all rows in Arrow's memory.

    Args:
        name: `samples` or a modality.
        columns: names of the columns to read; None reads all.
        kept_rows: rows of the blocks that are kept, at least one block; None: 4 million, for rows in any order. For
            rows that ascend from call to call one block is enough: 0.
    """

    def __init__(
        self, cache: Cache, name: str, columns: Sequence[str] | None = None, *, kept_rows: int | None = None
    ) -> None:
        self._cache, self._name, self._columns = cache, name, columns
        self._num_rows, self._size = cache.num_rows(name), cache.block_rows(name)
        self._whole: pa.Table | None = None
        self._samples_N: Ints | None = None
        kept_rows = _KEPT_ROWS if kept_rows is None else kept_rows
        self._block = lru_cache(maxsize=max(1, kept_rows // self._size))(self._read_block)
        self._last_sample = lru_cache(maxsize=None)(self._read_last_sample)

    def __len__(self) -> int:
        return self._num_rows

    def load(self) -> None:
        """Read all rows, so that later calls read no file and are faster."""
        if self._whole is not None or not self._num_rows:
            return
        table = self._cache.table(self._name, self._columns)
        columns = {name: _contiguous(table[name]) for name in table.column_names}
        if "sample" in columns:
            self._samples_N = columns["sample"].to_numpy()
        self._whole = pa.table(columns)
        self._block.cache_clear()

    def take(self, rows: Ints) -> pa.Table:
        """Return rows in the given order, which must exist."""
        if self._whole is not None:
            return self._whole.take(pa.array(rows))
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // self._size, return_index=True)
        if not len(numbers):
            return self._block(0).schema.empty_table()
        parts = np.split(rows[order] % self._size, starts[1:])
        taken = [self._block(number).take(pa.array(part)) for number, part in zip(numbers.tolist(), parts, strict=True)]
        return pa.concat_tables(taken).take(pa.array(np.argsort(order)))

    def find(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return the first row of each sample in an item table, and how many rows it has: two (S,) int64."""
        samples = np.asarray(samples, np.int64)
        bounds, places = np.unique(np.concatenate([samples, samples + 1]), return_inverse=True)
        if self._samples_N is not None:
            first_rows = np.searchsorted(self._samples_N, bounds)
        else:
            first_rows = self._first_rows(bounds)
        starts, stops = np.split(first_rows[places], 2)
        return starts, stops - starts

    def find_key(self, key: str) -> int:
        """Return the row of a key in the sample table, -1 if it does not have it; see `find_keys`."""
        if self._whole is None:
            return int(find_keys(self._cache, [key])[0])
        keys = self._whole["key"].chunk(0)
        return int(pc.index(keys, pa.scalar(key, keys.type)).as_py())

    def _read_block(self, number: int) -> pa.Table:
        return self._cache.block(self._name, number, columns=self._columns)

    def _first_rows(self, samples: Ints) -> Ints:
        """Return the first row of each sample or of a later one, from the chunks that hold them; samples ascend.

        A binary search reads a few chunks to find the first one of the samples that are left; then all in it are found.
        """
        first_rows = np.full(len(samples), self._num_rows, np.int64)
        num_blocks, number, start = -(-self._num_rows // self._size), 0, 0
        while start < len(samples):
            number = bisect_left(range(num_blocks), int(samples[start]), lo=number, key=self._last_sample)
            if number == num_blocks:
                break
            samples_B = self._cache.block(self._name, number, columns=["sample"])["sample"].to_numpy()
            stop = int(np.searchsorted(samples, samples_B[-1], "right"))
            first_rows[start:stop] = number * self._size + np.searchsorted(samples_B, samples[start:stop])
            number, start = number + 1, stop
        return first_rows

    def _read_last_sample(self, number: int) -> int:
        last: int = self._cache.block(self._name, number, columns=["sample"])["sample"][-1].as_py()
        return last


def _contiguous(column: pa.ChunkedArray) -> pa.Array:
    """Join a column's chunks, so that a row is found without searching its chunk; text may exceed 2 GiB."""
    return (column.cast(pa.large_string()) if pa.types.is_string(column.type) else column).combine_chunks()
