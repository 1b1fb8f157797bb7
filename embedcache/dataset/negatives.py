"""Hard negatives: for each sample of a cache, samples that are near it and do not belong to it.

A table has one row per sample, in the order of the cache's samples: `key`; `group`, the number of its near-duplicate
group, -1 for a sample that was not looked at; `negatives`, a list of rows of samples, best first; and `scores`, their
cosines. Two samples of one group are never negatives of each other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array, Floats, Ints
from embedcache.errors import DataError, PathError, quoted
from embedcache.files import AnyPath, reading
from embedcache.outputs import new_output, read_metadata, to_metadata
from embedcache.store.cache import Cache
from embedcache.store.layout import SAMPLES
from embedcache.store.rows import RowReader
from embedcache.store.tables import add_footer_checksum, open_table, read_footer

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("group", pa.int64()),
        ("negatives", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
    ]
)
_READ_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class HardNegatives:
    """Hard negatives of all samples of some caches, counted across them.

    Args:
        negatives_SK: (S, K) int32 samples, best first; -1: none.
        groups_S: (S,) int64 near-duplicate group of each sample.
    """

    negatives_SK: Array
    groups_S: Ints


class NegativesBlock(NamedTuple):
    """Hard negatives of consecutive samples: (B, K) int32 samples, -1: none, and (B, K) float32 their cosines."""

    negatives_BK: Array
    scores_BK: Floats


def write_negatives(
    path: Path, cache: Cache, groups_S: Ints, parts: Iterable[NegativesBlock], metadata: Mapping[str, Any]
) -> None:
    """Write a table of hard negatives, one row group per block; memory: a block.

    Args:
        path: new `.parquet` file.
        cache: the cache.
        groups_S: (S,) near-duplicate group of each of its samples, -1: not looked at.
        parts: the negatives of all samples, block by block in their order.
        metadata: how they were found, as JSON values.
    """
    header = {
        "cache": str(cache.path),
        "index_digest": cache.info.index_digest,
        "num_samples": len(groups_S),
        **metadata,
    }
    schema, keys, start = _SCHEMA.with_metadata(to_metadata(header, _SCHEMA)), cache.column("key"), 0
    with new_output(path) as temporary:
        with pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
            for part in parts:
                count = len(part.negatives_BK)
                columns = [
                    keys.slice(start, count).cast(pa.string()).combine_chunks(),
                    pa.array(groups_S[start : start + count]),
                    *_lists(part),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                start += count
        add_footer_checksum(temporary)


def _lists(part: NegativesBlock) -> list[pa.Array]:
    """Return the columns `negatives` and `scores` of a block: a list per sample, of those that it has."""
    is_some_BK = part.negatives_BK >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(is_some_BK.sum(axis=1))]).astype(np.int32))
    values = (part.negatives_BK.astype(np.int32), part.scores_BK.astype(np.float32))
    return [pa.ListArray.from_arrays(offsets, pa.array(side[is_some_BK])) for side in values]


def check_negatives(paths: Sequence[AnyPath], caches: Sequence[Cache]) -> None:
    """Check that tables are hard negatives of some caches, without reading their rows; errors: `read_negatives`."""
    _open_tables(paths, caches, lambda table, number: None)  # noqa: ARG005


def read_negatives(paths: Sequence[AnyPath], caches: Sequence[Cache]) -> HardNegatives:
    """Read the tables of one or several caches; samples without a row have no negatives and are a group of their own.

    Memory: 4 bytes per sample and negative, 8 per sample, and a block of rows.

    Raises:
        PathError: a file does not exist.
        CorruptError: a file is not such a table, has changed since it was written, as by sorting its rows, or a page is
            damaged.
        DataError: a table is of other samples than those of the caches, or two are of one cache.
    """
    firsts = np.concatenate([[0], np.cumsum([cache.info.num_samples for cache in caches])])
    negatives_SK, groups_S = np.full((int(firsts[-1]), 0), -1, np.int32), np.full(int(firsts[-1]), -1, np.int64)

    def fill(table: pq.ParquetFile, number: int) -> None:
        nonlocal negatives_SK
        negatives_SK = _fill(table, caches[number], int(firsts[number]), negatives_SK, groups_S)

    _open_tables(paths, caches, fill)
    alone = np.flatnonzero(groups_S < 0)
    groups_S[alone] = -1 - alone
    return HardNegatives(negatives_SK=negatives_SK, groups_S=groups_S)


def _open_tables(paths: Sequence[AnyPath], caches: Sequence[Cache], use: Callable[[pq.ParquetFile, int], None]) -> None:
    """Call a function with each open table and the number of its cache.

    Its errors of Arrow become `CorruptError`.
    """
    found: set[int] = set()
    for path in map(Path, paths):
        if not path.is_file():
            raise PathError(
                f"negatives {path} does not exist; write it with: embedcache curate negatives CACHE {quoted(path)}"
            )
        with reading(path, "expected a table of curate negatives"), open_table(path, read_footer(path)) as table:
            number = _find_cache(path, table, caches)
            if number in found:
                raise DataError(
                    f"negatives {path}: expected one table per cache, got a second one of {caches[number].path}"
                )
            found.add(number)
            use(table, number)


def _find_cache(path: Path, table: pq.ParquetFile, caches: Sequence[Cache]) -> int:
    """Return the number of the cache that a table is of."""
    header = read_metadata(path, table.schema_arrow)
    if not set(_SCHEMA.names) <= set(table.schema_arrow.names) or "index_digest" not in header:
        raise ValueError(f"it has the columns {', '.join(table.schema_arrow.names)}")
    if table.metadata.num_rows != header.get("num_samples"):
        raise ValueError(f"it has {table.metadata.num_rows:,} rows, not one per sample; mine them again")
    for number, cache in enumerate(caches):
        if cache.info.has_rows_of(header["index_digest"]) and cache.info.num_samples >= table.metadata.num_rows:
            return number
    names = " and ".join(str(cache.path) for cache in caches)
    raise DataError(f"negatives {path}: expected those of {names}, got those of {header['cache']}; mine them again")


def _fill(table: pq.ParquetFile, cache: Cache, first: int, negatives_SK: Array, groups_S: Ints) -> Array:
    """Read a table into the rows of its cache, which begin at `first`; return the negatives, wider if it has more."""
    start, num_values, keys = first, 0, RowReader(cache, SAMPLES, ["key"], kept_rows=0)
    for batch in table.iter_batches(_READ_ROWS, columns=["key", "group", "negatives"], use_threads=False):
        lists, count = batch.column("negatives"), len(batch)
        rows_B = np.arange(start - first, start - first + count)
        _check_keys(batch.column("key"), cache, keys.take(rows_B)["key"], start - first)
        groups_S[start : start + count] = batch.column("group").to_numpy()
        lengths_B = np.diff(lists.offsets.to_numpy())
        num_values += int(np.maximum(lengths_B, 1).sum())  # an empty list counts as one
        if (most := int(lengths_B.max(initial=0))) > negatives_SK.shape[1]:
            wider = np.full((len(negatives_SK), most - negatives_SK.shape[1]), -1, np.int32)
            negatives_SK = np.concatenate([negatives_SK, wider], axis=1)
        is_some_BK = np.arange(negatives_SK.shape[1]) < lengths_B[:, None]
        negatives_SK[start : start + count][is_some_BK] = lists.flatten().to_numpy() + first
        start += count
    if start - first != table.metadata.num_rows:
        raise ValueError(f"it has {start - first:,} rows, not {table.metadata.num_rows:,} as its footer counts")
    if num_values != (expected := _count_values(table.metadata)):  # headers of pages have no checksums
        raise ValueError(f"it has {num_values:,} negatives, not {expected:,} as its footer counts")
    is_grouped = groups_S[first:start] >= 0
    # No two caches share a number then, as each is below the number of the cache's samples.
    groups_S[first:start][is_grouped] += first
    return negatives_SK


def _check_keys(keys: pa.Array, cache: Cache, expected: pa.ChunkedArray, start: int) -> None:
    """Check that rows from `start` on are those of the cache: lists hold row numbers. Removed samples have no key."""
    expected_B = expected.combine_chunks().cast(keys.type)
    is_same_B = pc.fill_null(pc.equal(keys, expected_B), False)  # noqa: FBT003
    others = np.setdiff1d(np.flatnonzero(~np.asarray(is_same_B)), cache.removed - start)
    if len(others):
        row = int(others[0])
        raise ValueError(
            f"row {start + row} has the key {keys[row].as_py()!r}, not {expected_B[row].as_py()!r} as in the cache; "
            "rows must have the order of its samples"
        )


def _count_values(metadata: pq.FileMetaData) -> int:
    """Return how many negatives there are by the footer, where an empty list counts as one."""
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    [column] = [number for number, path in enumerate(paths) if path.startswith("negatives.")]
    return sum(metadata.row_group(group).column(column).num_values for group in range(metadata.num_row_groups))
