"""Scores: numbers of the samples of a cache in a Parquet table, one row per sample, found again by key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Floats
from embedcache.errors import DataError, PathError, SettingError
from embedcache.files import reading
from embedcache.outputs import check_table_output, new_output, read_metadata, with_metadata
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache
from embedcache.store.columns import index_in
from embedcache.store.tables import read_table, write_table

_EXPECTED = "expected a Parquet file with a column key"
_ROW, _KEY = "row", "key"
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)


class Score(NamedTuple):
    """One score of all samples of a cache: its name, and (S,) float32 or float64 with NaN where a sample has none.

    It is float64 if its column is, or holds integers or decimals, which float32 would round from 2^24 on.
    """

    name: str
    values: Array


def write_scores(
    path: Path, cache: Cache, columns: Mapping[str, "Floats | pa.Array"], metadata: Mapping[str, Any]
) -> None:
    """Write scores as Parquet: `row`, `key`, the columns, and `metadata` (how they were computed).

    Args:
        path: the file, which ends in `.parquet`.
        cache: the cache.
        columns: name -> a value per sample, in row order. NaN becomes null.

    Raises:
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """
    check_table_output("scores", path)
    arrays = {
        name: pa.array(values, pa.float32(), from_pandas=True) if isinstance(values, np.ndarray) else values
        for name, values in columns.items()
    }
    table = pa.table({_ROW: np.arange(cache.info.num_samples), _KEY: cache.column(_KEY), **arrays})
    header = {"cache": str(cache.path), "index_digest": cache.info.index_digest, **metadata}
    with new_output(path) as temporary:
        write_table(temporary, with_metadata(table, header))


def read_scores(path: Path | str, cache: Cache, name: str | None = None) -> Score:
    """Read one score of the samples of a cache, matched by key; keys that the cache does not have are ignored.

    Args:
        path: Parquet file with a column `key` and numbers, from `curate score`, `curate outliers` or another tool.
        cache: the cache.
        name: column of the score; None: the only one that holds numbers.

    Raises:
        PathError: the file does not exist.
        CorruptError: the file cannot be read, a bit of it has changed, or its keys are no texts or numbers.
        UnknownNameError: it has no such column of numbers.
        SettingError: it has several, and none is named.
        DataError: it has a key twice, or no key of the cache.
    """
    path = Path(path)
    if not path.is_file():
        raise PathError(f"scores {path}: expected a Parquet file with a column key, got a path that does not exist")
    with reading(path, _EXPECTED):
        table = read_table(path)
    read_metadata(path, table.schema)
    if _KEY not in table.column_names:
        raise DataError(f"scores {path}: expected a column key, got {', '.join(table.column_names)}")
    name = _choose_column(path, table, name)
    with reading(path, _EXPECTED):
        known = table[_KEY].cast(pa.large_string()).combine_chunks()
    keys = cache.column(_KEY)
    if len(pc.unique(known)) < len(known):
        raise DataError(f"scores {path}: expected each key once, got {len(known) - len(pc.unique(known)):,} repeated")
    positions = index_in(keys, known).combine_chunks()
    if positions.null_count == len(positions):
        raise DataError(
            f"scores {path}: expected keys of {cache.path}, such as {keys[0].as_py()!r}, got {len(known):,} others"
            + (f", such as {known[0].as_py()!r}" if len(known) else "")
        )
    kind = pa.float32() if table[name].type in (pa.float16(), pa.float32()) else pa.float64()
    values: Array = table[name].cast(kind, safe=False).combine_chunks().take(positions).to_numpy(False)  # noqa: FBT003
    return Score(name, np.asarray(values, kind.to_pandas_dtype()))


def _choose_column(path: Path, table: pa.Table, name: str | None) -> str:
    numbers = [field.name for field in table.schema if field.name != _ROW and _is_number(field.type)]
    if name is not None and name not in numbers:
        raise unknown_name("column of numbers", name, numbers, where=f"of {path}")
    if name is None and len(numbers) != 1:
        got = f"{len(numbers)}: {', '.join(numbers)}; name one with --score" if numbers else "none"
        raise SettingError(f"score: expected {path} to have one column of numbers beside row, got {got}")
    return name or numbers[0]


def _is_number(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _NUMBERS)
