"""Kinds of keyed tables: selections, scores and hard negatives.

A selection has columns that say why each sample was selected, scores are numbers per sample. Hard negatives are samples
near a sample that do not belong to it: `group` is the number of its near-duplicate group, of which none are negatives
of each other; `negatives` a list of rows of samples, best first; `scores` their cosines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Floats, Ints
from embedcache.dataset import keytable
from embedcache.dataset.keytable import KeyTable
from embedcache.dataset.splits import check_split
from embedcache.errors import DataError, SettingError
from embedcache.files import AnyPath
from embedcache.progress import Progress
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache

_SPLIT = ["part", "group"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples of one cache, (M,) int64 rows of its table in ascending order, and why each was selected.

    Args:
        rows: the samples.
        columns: name -> a value per sample, such as its concept and cosine: (M,) NumPy or Arrow arrays.
    """

    rows: Ints
    columns: Mapping[str, Any] = field(default_factory=dict)


def write_selection(
    path: Path, cache: Cache, selection: Selection, about: Mapping[str, Any], *, progress: Progress | None = None
) -> None:
    """Write a selection as a keyed table; `about` says how it was made. Progress is in samples.

    Raises:
        DataError: the selection is empty, or its rows do not ascend.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """
    if not len(selection.rows):
        raise DataError(f"no sample of {cache.path} is selected, so {path} is not written; select with looser settings")
    keytable.write(path, [cache], selection.columns, "selection", about, rows=selection.rows, progress=progress)


def read_selection(path: Path | str, caches: Sequence[Cache]) -> Ints:
    """Return the samples of a selection, ascending and counted across caches: (M,) int64.

    Args:
        path: any table or list of keys that `keytable.read` reads; of a split, the samples of its training part.
        caches: caches of the keys.

    Raises:
        PathError, CorruptError, DataError: as in `keytable.read`.
    """
    return read_selection_table(path, caches, columns=_SPLIT).rows


def read_selection_table(
    path: Path | str,
    caches: Sequence[Cache],
    *,
    columns: Sequence[str] | None = None,
    can_be_removed: bool = False,
    can_be_others: bool = False,
) -> KeyTable:
    """Return the samples of a selection with its columns; see `read_selection` and `keytable.read`.

    With `can_be_removed`, all of the samples may have been removed, and the result is empty.
    """
    path = Path(path)
    check_split(path)  # the split of a run may serve as a selection
    table = keytable.read(
        path, caches, "selection", columns=columns, can_be_others=can_be_others, can_be_empty=can_be_removed
    )
    if not set(_SPLIT) <= set(table.columns.column_names):
        return table
    is_training = pc.equal(table.columns["part"], "train")
    return replace(table, rows=table.rows[is_training.to_numpy()], columns=table.columns.filter(is_training))


def read_selected_keys(path: Path) -> pa.ChunkedArray:
    """Return the keys of a selection without looking for their samples; errors: `read_selection`."""
    check_split(path)
    keytable.read_header(path, "selection")
    with keytable.reading_table(path, "selection"):
        table = keytable.load(path, ["key", *_SPLIT])
        if set(_SPLIT) <= set(table.column_names):
            table = table.filter(pc.equal(table["part"], "train"))
        return table["key"].cast(pa.large_string())


@dataclass(frozen=True, kw_only=True)
class HardNegatives:
    """Hard negatives of all samples of some caches, counted across them.

    Args:
        negatives_SK: (S, K) int32 samples, best first; -1: none.
        groups_S: (S,) int64 near-duplicate group of each sample.
    """

    negatives_SK: Array
    groups_S: Ints


def write_negatives(
    path: Path, cache: Cache, groups_S: Ints, negatives_MK: Array, scores_MK: Floats, about: Mapping[str, Any]
) -> None:
    """Write a table of hard negatives.

    Args:
        path: new `.parquet` file.
        cache: the cache.
        groups_S: (S,) near-duplicate group of each of its samples, -1 for a sample that was not looked at.
        negatives_MK: (M, K) rows of the negatives of the M samples that were, -1: none.
        scores_MK: their cosines.
        about: how they were found, as JSON values.
    """
    is_some_MK = negatives_MK >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(is_some_MK.sum(axis=1))]).astype(np.int32))
    rows = np.flatnonzero(groups_S >= 0)
    columns = {
        "group": groups_S[rows],
        "negatives": pa.ListArray.from_arrays(offsets, pa.array(negatives_MK[is_some_MK].astype(np.int32))),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(scores_MK[is_some_MK].astype(np.float32))),
    }
    keytable.write(path, [cache], columns, "negatives", about, rows=rows)


def read_negatives(paths: Sequence[AnyPath], caches: Sequence[Cache]) -> HardNegatives:
    """Read the tables of one or several caches; samples without a row have no negatives and are a group of their own.

    Memory: 8 bytes per sample and negative, and 8 per sample.

    Raises:
        PathError, CorruptError: as in `keytable.read`.
        DataError: a table has samples of other caches, or two tables have samples of one cache.
    """
    firsts = np.cumsum([0, *map(len, caches)])
    negatives_SK = np.full((firsts[-1], 0), -1, np.int32)
    groups_S = np.full(firsts[-1], -1, np.int64)
    for path in map(Path, paths):
        table = keytable.read(path, caches, "negatives")
        first = int(firsts[np.searchsorted(firsts, table.rows[0], side="right") - 1])
        if (groups_S[table.rows] >= 0).any():
            raise DataError(f"negatives {path}: expected one table per cache, got a second one of a cache")

        # Group numbers are below the number of a cache's samples, so the offset keeps those of two caches apart.
        groups_S[table.rows] = first + table.columns["group"].to_numpy()

        lists = table.columns["negatives"]
        lengths_M = pc.list_value_length(lists).to_numpy()
        width = max(negatives_SK.shape[1], int(lengths_M.max()))
        negatives_SK = np.pad(negatives_SK, ((0, 0), (0, width - negatives_SK.shape[1])), constant_values=-1)
        negatives_MK = np.full((len(table.rows), width), -1, np.int32)
        negatives_MK[np.arange(width) < lengths_M[:, None]] = first + pc.list_flatten(lists).to_numpy()
        negatives_SK[table.rows] = negatives_MK

    # Negative numbers are free, so each sample without a row becomes a group of its own.
    single_rows = np.flatnonzero(groups_S < 0)
    groups_S[single_rows] = -1 - single_rows
    return HardNegatives(negatives_SK=negatives_SK, groups_S=groups_S)


_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)


class Score(NamedTuple):
    """One score of all samples of a cache: its name, and (S,) float32 or float64 with NaN where a sample has none.

    It is float64 if its column is, or holds integers or decimals, which float32 would round from 2^24 on.
    """

    name: str
    values: Array


def read_scores(path: Path | str, cache: Cache, name: str | None = None) -> Score:
    """Read one score of the samples of a cache; keys that the cache does not have are ignored.

    Args:
        path: Parquet file with a column `key` and numbers, from `curate score`, `curate outliers` or another tool.
        cache: the cache.
        name: column of the score. If None, the only column of numbers.

    Raises:
        PathError, CorruptError: as in `keytable.read`.
        UnknownNameError: it has no such column of numbers.
        SettingError: it has several, and none is named.
        DataError: it has a key twice, or no key of the cache.
    """
    path = Path(path)
    table = keytable.read(path, [cache], "scores", can_be_others=True)
    name = _choose_column(path, table.columns.schema, name)
    column = table.columns[name]

    # Integers and decimals need float64, as float32 rounds above 2^24.
    kind = pa.float32() if column.type in (pa.float16(), pa.float32()) else pa.float64()
    values: Array = np.full(len(cache), np.nan, kind.to_pandas_dtype())
    values[table.rows] = column.cast(kind, safe=False).to_numpy()  # null is NaN
    return Score(name, values)


def _choose_column(path: Path, schema: pa.Schema, name: str | None) -> str:
    numbers = [field.name for field in schema if any(is_kind(field.type) for is_kind in _NUMBERS)]
    if name is not None and name not in numbers:
        raise unknown_name("column of numbers", name, numbers, where=f"of {path}")
    if name is None and len(numbers) != 1:
        got = f"{len(numbers)}: {', '.join(numbers)}; name one with --score" if numbers else "none"
        raise SettingError(f"score: expected {path} to have one column of numbers beside row, got {got}")
    return name or numbers[0]
