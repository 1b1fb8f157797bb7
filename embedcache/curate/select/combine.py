"""Selections from selections: intersection, difference, or a random sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.select.baselines import draw_rows
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.errors import DataError, SettingError
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table

Operation: TypeAlias = Literal["and", "minus"]

_OPERATIONS: dict[str, Callable[[Ints, Ints], Ints]] = {"and": np.intersect1d, "minus": np.setdiff1d}


def combine_selections(cache_path: Path | str, out_path: Path, first: Path, operation: Operation, second: Path) -> int:
    """Write the samples of one selection that are also in another (`and`), or that are not (`minus`).

    The reasons are those of the first and, with `and`, of the second.

    Args:
        cache_path: cache of the selections.
        out_path: Parquet file to write.
        first: a selection, or a text file with one key per line.
        operation: `and` or `minus`.
        second: another selection.

    Returns:
        The number of samples.

    Raises:
        PathError: a file does not exist.
        CorruptError: a file cannot be read.
        DataError: a key is not in the cache, or no sample is left.
    """
    cache = Cache(cache_path)
    one, other = (read_reasons(path, cache) for path in (first, second))
    rows = _OPERATIONS[operation](*(np.array(sorted(found), np.int64) for found in (one, other)))
    if not len(rows):
        raise DataError(
            f"{first} {operation} {second} is empty: they select {len(one):,} and {len(other):,} samples of "
            f"{cache.path}, {len(one.keys() & other.keys()):,} of them both"
        )
    is_and = operation == "and"
    reasons = [f"{one[row]}; {other[row]}" if is_and else one[row] for row in rows.tolist()]
    record = {"method": operation, "selections": [str(first), str(second)]}
    write_selection(out_path, cache, Selection(rows=rows, reasons=reasons), record)
    return len(rows)


def sample_selection(cache_path: Path | str, out_path: Path, selection: Path, size: int, *, seed: int = 0) -> int:
    """Write a random sample of a selection, with its reasons.

    Args:
        cache_path: cache of the selection.
        out_path: Parquet file to write.
        selection: a selection, or a text file with one key per line.
        size: number of samples.
        seed: random seed.

    Returns:
        The number of samples.

    Raises:
        SettingError: the selection has fewer samples.
        DataError: a key is not in the cache.
    """
    cache = Cache(cache_path)
    found = read_reasons(selection, cache)
    if not 1 <= size <= len(found):
        raise SettingError(f"size: expected 1 to {len(found):,}, the number of samples of {selection}, got {size:,}")
    rows = draw_rows(np.array(sorted(found), np.int64), size, seed=seed)
    record = {"method": "sample", "selections": [str(selection)], "seed": seed}
    write_selection(out_path, cache, Selection(rows=rows, reasons=[found[row] for row in rows.tolist()]), record)
    return size


def read_reasons(path: Path, cache: Cache) -> dict[int, str]:
    """Read a selection as row -> reason; for a text file, the reason is its name.

    Raises:
        PathError: the file does not exist.
        CorruptError: it cannot be read.
        DataError: it names no key, or one that is not in the cache.
    """
    rows = read_selection(path, [cache])
    keys = cache.samples["key"].to_pylist()
    reasons: dict[str, str] = {}
    if path.suffix == ".parquet":
        table = read_table(path)
        if "reason" in table.column_names:
            reasons = dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return {row: reasons.get(keys[row], f"in {path.name}") for row in rows.tolist()}
