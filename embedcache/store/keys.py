"""Keys of samples: of all caches together, read in blocks or whole, and the rows of some keys."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools, Ints
from embedcache.store.cache import Cache
from embedcache.store.checksums import BLOCK
from embedcache.store.columns import Column, DeferredColumn, index_in, widen
from embedcache.store.layout import SAMPLES


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
    distinct, which = np.unique(rows, return_inverse=True)
    return widen(key_column([cache]).select(distinct).array).take(pa.array(which))


def find_keys(cache: Cache, keys: Sequence[str]) -> Ints:
    """Return the row of each key in the sample table, -1 for a key that it does not have: (K,) int64.

    Blocks of samples are read until all keys are found: first those that may hold one by the statistics of the table,
    then all others. Statistics that no checksum covers, as of the first caches, are not used. Memory: a block.
    """
    wanted = pc.unique(pa.array(keys, pa.string()))
    rows = np.full(len(wanted), -1, np.int64)
    for number in cache.likely_blocks(SAMPLES, "key", sorted(set(keys))):
        found = pc.index_in(cache.block(SAMPLES, number, columns=["key"])["key"], value_set=wanted)
        places = np.flatnonzero(found.is_valid())
        rows[found.take(pa.array(places)).to_numpy()] = number * BLOCK + places
        if (rows >= 0).all():
            break
    of_keys: Ints = rows[pc.index_in(pa.array(keys, pa.string()), value_set=wanted).to_numpy()]
    return of_keys


def match_keys(caches: Sequence[Cache], keys: pa.Array) -> tuple[Ints, Bools]:
    """Find the samples of many keys.

    Memory: a million keys of the caches, and what `keys` takes twice.

    Args:
        caches: the caches.
        keys: (K,) distinct keys.

    Returns:
        (M,) int64 samples that have one of the keys, ascending and counted across caches; and (K,) bool, whether any
        sample has each of them.
    """
    rows, is_found, start = [np.empty(0, np.int64)], np.zeros(len(keys), bool), 0
    for block in key_column(caches).blocks(_MATCHED_AT_ONCE):
        found = index_in(block, keys)
        places = np.flatnonzero(found.is_valid())
        is_found[found.take(pa.array(places)).to_numpy()] = True
        rows.append(start + places)
        start += len(block)
    return np.concatenate(rows), is_found


_MATCHED_AT_ONCE = 2**20  # Arrow hashes all keys for each block
