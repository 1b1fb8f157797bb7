"""Rows of a cache's tables in any order, without reading the tables; keys of samples, and the rows of some keys."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints
from embedcache.store.cache import Cache
from embedcache.store.columns import Column, DeferredColumn, index_in, widen
from embedcache.store.layout import SAMPLES
from embedcache.store.tables import BLOCK, block_rows

_KEPT_ROWS = 2**22
_MATCHED_AT_ONCE = 2**20  # Arrow hashes all keys for each block


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
        self._num_rows, self._size = cache.num_rows(name), block_rows(name)
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


def key_column(caches: Sequence[Cache]) -> Column[str]:
    """Return the keys of the samples of some caches, one after another, as a column that reads them when it is used.

    Its `blocks` keep none of them; whatever else needs values has the caches keep all, as `keys_of` does.
    """
    return DeferredColumn(
        sum(map(len, caches)),
        lambda: keys_of(caches),
        read=lambda: (keys for cache in caches for keys in iterate_keys(cache)),
    )


def iterate_keys(cache: Cache) -> Iterator[pa.ChunkedArray]:
    """Iterate over the keys of a cache, 65,536 at a time. Memory: a block."""
    for number in range(-(-len(cache) // BLOCK)):
        yield cache.block(SAMPLES, number, columns=["key"])["key"].cast(pa.string())


def keys_of(caches: Sequence[Cache]) -> pa.ChunkedArray:
    """Return the keys of the samples of some caches, one after another; see `widen`."""
    columns = [cache.column("key").cast(pa.string()) for cache in caches]
    return widen(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))


def keys_at(cache: Cache, rows: Ints) -> pa.ChunkedArray:
    """Return the keys of samples of a cache, in any order: (M,) texts. Memory: these keys, and a block of others."""
    return RowReader(cache, SAMPLES, ["key"], kept_rows=0).take(rows)["key"]


def find_keys(cache: Cache, keys: Sequence[str]) -> Ints:
    """Return the row of each key in the sample table, -1 for a key that it does not have: (K,) int64."""
    known = pc.unique(pa.array(keys, pa.large_string()))
    rows = np.full(len(known), -1, np.int64)
    samples, places = match_keys([cache], known)
    rows[places] = samples
    of_keys: Ints = rows[pc.index_in(pa.array(keys, pa.large_string()), value_set=known).to_numpy()]
    return of_keys


def match_keys(caches: Sequence[Cache], keys: pa.Array) -> tuple[Ints, Ints]:
    """Find the samples of many keys.

    Memory: a million keys of the caches, and what `keys` takes twice.

    Returns:
        (M,) int64 samples that have one of the (K,) keys, ascending and counted across caches; and (M,) int64 the first
        place of the key of each.
    """
    rows, places, start = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for block in key_column(caches).blocks(_MATCHED_AT_ONCE):
        found = index_in(block, keys)
        rows.append(start + np.flatnonzero(found.is_valid()))
        places.append(found.drop_null().to_numpy())
        start += len(block)
    return np.concatenate(rows), np.concatenate(places)
