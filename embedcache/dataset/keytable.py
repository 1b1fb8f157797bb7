"""Keyed tables: values of the samples of some caches, in Parquet with the row and the key of each sample.

Splits, selections, scores, hard negatives and the samples that dedup removes are such tables. The header names their
caches. In these caches, samples are found by their rows, and the keys are compared. In any other cache, and in tables
of other tools, samples are found by their keys. A list of keys is a table without values.
"""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as cache_calls
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Ints, blocks
from embedcache.dataset.pairs import name_caches
from embedcache.errors import DataError, PathError, pluralize
from embedcache.files import TEXT_ENCODING, read_file, reading
from embedcache.progress import NullProgress, Progress, watch
from embedcache.provenance import check_table_output, new_output, read_metadata, to_metadata
from embedcache.store.cache import Cache, Keys, RowReader, match_keys
from embedcache.store.layout import SAMPLES
from embedcache.store.tables import BLOCK, Column, add_checksum, iterate_table, open_table, read_removed, read_table

_log = logging.getLogger(__name__)

_ROWS_PER_GROUP = 2**20
_SCHEMAS = {
    "split": pa.schema({"part": pa.string(), "group": pa.int64()}),
    "negatives": pa.schema({"group": pa.int64(), "negatives": pa.list_(pa.int32())}),
}
"""Columns that every table of a kind has in addition to `key`. Other kinds may have any columns."""
_HINTS = {
    "selection": "Parquet with a column key, or a text file in UTF-8 with one key per line",
    "split": "the split.parquet of a run, which embedcache train writes",
    "negatives": "a table of embedcache curate negatives",
    "scores": "Parquet with a column key and numbers",
}


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    """Values of some samples.

    Args:
        rows: (M,) int64 samples, ascending and counted across the caches.
        columns: (M,) their values.
        about: header, without the names of the caches' rows; empty for a table of another tool.
    """

    rows: Ints
    columns: pa.Table
    about: Mapping[str, Any]

    def align(self, num_samples: int) -> pa.Table:
        """Return a row for each of S samples, null for those that the table does not have."""
        if len(self.rows) == num_samples:
            return self.columns

        places = np.full(num_samples, -1, np.int64)
        places[self.rows] = np.arange(len(self.rows))
        return self.columns.take(pa.array(places, mask=places < 0))


def write(
    path: Path,
    caches: Sequence[Cache],
    columns: Mapping[str, Any],
    kind: str,
    about: Mapping[str, Any],
    *,
    rows: Ints | None = None,
    progress: Progress | None = None,
) -> None:
    """Write values of samples with the `row` and `key` of each one, and for several caches the number of its `cache`.

    Memory: the keys of the samples.

    Args:
        path: the file, which ends in `.parquet`.
        caches: caches of the samples.
        columns: name -> a value per sample, as an Arrow or NumPy array, `Column` or list; NaN becomes null.
        kind: kind of the table, such as `selection`.
        about: entries of the header in addition to the kind and the caches, as JSON values.
        rows: (M,) samples, ascending and counted across the caches. If None, all samples.
        progress: progress in samples.

    Raises:
        DataError: the rows do not ascend.
        PathError: the path does not end in `.parquet`, or `check_output` refuses it.
    """
    check_table_output(kind, path)
    firsts = np.cumsum([0, *map(len, caches)])
    rows = np.arange(firsts[-1]) if rows is None else rows

    # A table has one value per sample, so no row may come twice.
    descents = np.flatnonzero(np.diff(rows) <= 0)
    if len(descents):
        previous_row, next_row = rows[descents[0] : descents[0] + 2].tolist()
        raise DataError(
            f"{kind} {path}: expected rows in ascending order, each once, got {next_row} after {previous_row}"
        )

    number_M = np.searchsorted(firsts, rows, side="right") - 1
    table = pa.table({"row": rows - firsts[number_M]})
    if len(caches) > 1:
        table = table.append_column("cache", pa.array(number_M, pa.int16()))

    # NumPy has no null, so callers mark a missing value by NaN.
    for name, values in columns.items():
        array = values.array if isinstance(values, Column) else values
        is_arrow = isinstance(array, pa.Array | pa.ChunkedArray)
        table = table.append_column(name, array if is_arrow else pa.array(array, from_pandas=True))

    table = table.add_column(1, "key", Keys(caches, rows).array)

    # The digests tell a reader whether rows still mean the same samples.
    paths = [str(cache.path) for cache in caches]
    digests = [cache.info.index_digest for cache in caches]
    header = {"kind": kind, "caches": paths, "index_digests": digests, **about}

    table = table.replace_schema_metadata(to_metadata(header))
    parts = watch(
        blocks(len(table), _ROWS_PER_GROUP), progress or NullProgress(), f"writing the {kind}", len(table), "samples"
    )

    with new_output(path) as temporary:
        with pq.ParquetWriter(temporary, table.schema) as writer:
            for part in parts:
                writer.write_table(table.slice(part.start, part.stop - part.start))
        add_checksum(temporary)


def read(
    path: Path,
    caches: Sequence[Cache],
    kind: str,
    *,
    columns: Sequence[str] | None = None,
    can_be_others: bool = False,
    can_be_empty: bool = False,
) -> KeyTable:
    """Read the values of the samples of some caches that a table has.

    Samples that have been removed from a cache since are left out, and a warning says how many.

    Args:
        path: a Parquet file with a column `key`, a text file in UTF-8 with one key per line, or `.npy` of DataComp's
            uids.
        caches: the caches. A key that several of them have is found in each, unless the header names one of them.
        kind: kind that is expected.
        columns: names of the columns to read, as far as they exist. If None, all.
        can_be_others: whether to ignore keys that no cache has.
        can_be_empty: whether all samples of the table may have been removed.

    Raises:
        PathError: there is no such file.
        CorruptError: the file is not such a table, or has changed since it was written.
        DataError: it has keys of other samples, or no sample of the caches.
    """
    about = read_header(path, kind)
    columns = _SCHEMAS[kind].names if kind in _SCHEMAS else columns
    names = None if columns is None else ["row", "key", "cache", *columns]
    numbers_by_cache = _number_caches(about, caches)

    with reading_table(path, kind):
        if any(numbers_by_cache):
            samples, table, num_removed = _find_rows(path, names, caches, numbers_by_cache)
        elif kind == "negatives":
            got = " and ".join(about.get("caches", ["another tool"]))
            raise DataError(f"{kind} {path}: expected those of {name_caches(caches)}, got those of {got}")
        else:
            table = load(path, names)
            samples, table, num_removed = _find_keys(path, table, caches, kind, can_be_others=can_be_others)

        # A selection may name a key several times; the first one counts.
        if (np.diff(samples) <= 0).any():
            num_rows = len(samples)
            samples, places = np.unique(samples, return_index=True)
            table = table.take(pa.array(places))
            _check_repeated(path, kind, num_rows - len(samples))

        # From here on, the samples identify the rows.
        key_columns = [name for name in ("row", "key", "cache") if name in table.column_names]
        table = table.drop_columns(key_columns)
        if kind in _SCHEMAS:
            table = table.select(_SCHEMAS[kind].names).cast(_SCHEMAS[kind])

    if num_removed:
        samples_were = pluralize(num_removed, "sample was", "samples were")
        warn_removed(f"{kind} {path}: {samples_were} removed from the cache, and left out")

    if not (len(samples) or can_be_empty):
        got = "only removed ones; make a new one" if num_removed else f"others, not {caches[0].key(0)!r}"
        raise DataError(f"{kind} {path}: expected samples of {name_caches(caches)}, got {got}")

    return KeyTable(rows=samples, columns=table, about=about)


def _number_caches(about: Mapping[str, Any], caches: Sequence[Cache]) -> list[list[int]]:
    """Return the numbers by which the header of a table names each cache."""
    numbers_by_cache: list[list[int]] = []
    for cache in caches:
        numbers: list[int] = []
        for number, digest in enumerate(about.get("index_digests", ())):
            if cache.info.has_rows_of(digest):
                numbers.append(number)
        numbers_by_cache.append(numbers)
    return numbers_by_cache


@cache_calls
def warn_removed(message: str) -> None:
    """Log that a table names samples that were removed from a cache, once in a process."""
    _log.warning(message)


@contextmanager
def reading_table(path: Path, kind: str) -> Iterator[None]:
    """Raise errors of reading a keyed table as `PathError`, or as `CorruptError` if the file is not such a table."""
    expected = f"expected {_HINTS.get(kind, 'a table with a column key')}"
    if not path.is_file():
        raise PathError(f"{kind} {path}: {expected}, got {'no file' if path.exists() else 'nothing'}")
    with reading(path, expected):
        yield


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """Return the header of a table, empty for a table of another tool. Raises the errors of `read`.

    It has `index_digests` only if the table has the columns that the digests identify.
    """
    with reading_table(path, kind):
        if path.suffix != ".parquet":
            return {}

        with open_table(path) as file:
            schema = file.schema_arrow

        required = ["key", *_SCHEMAS.get(kind, pa.schema([])).names]
        if not set(required) <= set(schema.names):
            raise ValueError(f"it has the columns {', '.join(schema.names)}, not {' and '.join(required)}")

        # Digests without rows, or without the cache of a row, identify no sample.
        about = read_metadata(path, schema)
        if "row" not in schema.names or ("cache" not in schema.names and len(about.get("index_digests", ())) > 1):
            about.pop("index_digests", None)

        return about


def load(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table or list of keys."""
    if path.suffix == ".parquet":
        return read_table(path, columns)
    if path.suffix == ".npy":
        return pa.table({"key": _read_uids(path)})

    # Only line breaks end a key: `str.splitlines` would also split at other characters.
    lines = read_file(path).decode(TEXT_ENCODING).split("\n")
    keys = [line.removesuffix("\r") for line in lines]
    return pa.table({"key": pa.array(list(filter(None, keys)), pa.string())})


def _read_uids(path: Path) -> list[str]:
    """Return the keys of a list of DataComp's uids. Two unsigned integers make a key of 32 hexadecimal digits."""
    uids = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
    if not isinstance(uids, np.ndarray) or uids.dtype != np.dtype("u8,u8") or uids.ndim != 1:
        raise DataError(f"selection {path}: expected a list of uids, one row of dtype u8,u8, got other arrays")
    digits = np.stack([uids["f0"], uids["f1"]], axis=1).astype(">u8").tobytes().hex()
    return [digits[place : place + 32] for place in range(0, len(digits), 32)]


def _find_rows(
    path: Path, names: Sequence[str] | None, caches: Sequence[Cache], numbers_by_cache: Sequence[Sequence[int]]
) -> tuple[Ints, pa.Table, int]:
    """Find samples by their rows, block by block.

    Returns:
        The samples, their rows of the table, and the number of samples that were removed.
    """
    firsts = np.cumsum([0, *map(len, caches)])
    readers = [RowReader(cache, SAMPLES, ["key"], kept_rows=0) for cache in caches]

    samples = []
    parts = []
    num_removed = 0
    for block in iterate_table(path, BLOCK, names):
        number_B = block["cache"].to_numpy() if "cache" in block.column_names else np.zeros(len(block), np.int16)
        for cache, first, numbers, keys in zip(caches, firsts.tolist(), numbers_by_cache, readers, strict=False):
            part = block.filter(pa.array(np.isin(number_B, numbers)))

            is_removed = np.isin(part["row"].to_numpy(), cache.removed)
            num_removed += int(is_removed.sum())
            part = part.filter(pa.array(~is_removed))

            # A row outside the cache has no key to compare.
            rows = part["row"].to_numpy()
            is_inside = bool(((rows >= 0) & (rows < len(cache))).all())
            if not is_inside or not keys.take(rows)["key"].equals(part["key"].cast(pa.large_string())):
                raise DataError(
                    f"{path}: expected in each row the key of {cache.path}, got others; write it again, or without the "
                    "column row"
                )

            samples.append(first + rows)
            parts.append(part.drop_columns("key"))

    return np.concatenate(samples), pa.concat_tables(parts), num_removed


def _find_keys(
    path: Path, table: pa.Table, caches: Sequence[Cache], kind: str, *, can_be_others: bool
) -> tuple[Ints, pa.Table, int]:
    """Find samples by their keys, and return the same as `_find_rows`."""
    keys = table["key"].cast(pa.large_string()).combine_chunks()
    _check_repeated(path, kind, len(keys) - len(pc.unique(keys)))
    samples, places = match_keys(caches, keys)

    num_removed = 0
    if not can_be_others:
        matched_keys = keys.take(pa.array(places))
        unknown_keys = pc.unique(keys.filter(pc.invert(pc.is_in(keys, value_set=matched_keys)))).to_pylist()
        num_unmatched = len(unknown_keys)

        # A key of a removed sample is no mistake of the table.
        for cache in caches:
            if cache.info.removed:
                removed = read_removed(cache.path, cache.info)
                unknown_keys = [key for key in unknown_keys if removed.row_of(key) is None]
        num_removed = num_unmatched - len(unknown_keys)

        if unknown_keys or not len(keys):
            examples = ", ".join(map(repr, unknown_keys[:3])) or "no keys"
            raise DataError(
                f"{kind} {path}: expected keys of {name_caches(caches)}, such as {caches[0].key(0)!r}, got {examples}; "
                f"{len(unknown_keys):,} of {len(keys):,} keys have no sample there"
            )

    return samples, table.take(pa.array(places)), num_removed


def _check_repeated(path: Path, kind: str, num_repeated: int) -> None:
    """Refuse several values of a sample. Only a list of keys may name a sample several times."""
    if num_repeated and kind != "selection":
        raise DataError(f"{kind} {path}: expected each key once, got {num_repeated:,} repeated")
