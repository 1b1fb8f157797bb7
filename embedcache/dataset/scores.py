"""Scores: numbers of the samples of a cache in a Parquet table, one row per sample, found again by key."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array
from embedcache.dataset import keytable
from embedcache.errors import SettingError
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache

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
        name: column of the score; None: the only one that holds numbers.

    Raises:
        PathError, CorruptError: as in `keytable.read`.
        UnknownNameError: it has no such column of numbers.
        SettingError: it has several, and none is named.
        DataError: it has a key twice, or no key of the cache.
    """
    path = Path(path)
    found = keytable.read(path, [cache], "scores", can_be_others=True)
    name = _choose_column(path, found.columns.schema, name)
    column = found.columns[name]
    kind = pa.float32() if column.type in (pa.float16(), pa.float32()) else pa.float64()
    values: Array = np.full(len(cache), np.nan, kind.to_pandas_dtype())
    values[found.rows] = column.cast(kind, safe=False).to_numpy()  # null is NaN
    return Score(name, values)


def _choose_column(path: Path, schema: pa.Schema, name: str | None) -> str:
    numbers = [field.name for field in schema if any(is_kind(field.type) for is_kind in _NUMBERS)]
    if name is not None and name not in numbers:
        raise unknown_name("column of numbers", name, numbers, where=f"of {path}")
    if name is None and len(numbers) != 1:
        got = f"{len(numbers)}: {', '.join(numbers)}; name one with --score" if numbers else "none"
        raise SettingError(f"score: expected {path} to have one column of numbers beside row, got {got}")
    return name or numbers[0]
