"""Selections from selections: intersection, difference, or a random sample."""

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from embedcache.curate.select.baselines import draw_rows
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.errors import DataError, SettingError
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table

Operation: TypeAlias = Literal["and", "minus"]


def combine_selections(cache_path: Path | str, out_path: Path, first: Path, operation: Operation, second: Path) -> int:
    """Write the samples of one selection that are also in another (`and`) or not (`minus`), and return their number.

    The reasons are those of the first and, with `and`, of the second. A selection is Parquet, or a text file with one
    key per line.

    Raises `DataError` if a key is not in the cache, or no sample is left.
    """
    cache = Cache(cache_path)
    one, other = (read_reasons(path, cache) for path in (first, second))
    is_and = operation == "and"
    rows = np.array(sorted(one.keys() & other.keys() if is_and else one.keys() - other.keys()), np.int64)
    if not len(rows):
        raise DataError(
            f"{first} {operation} {second} is empty: they select {len(one):,} and {len(other):,} samples of "
            f"{cache.path}, {len(one.keys() & other.keys()):,} of them both"
        )
    reasons = [f"{one[row]}; {other[row]}" if is_and else one[row] for row in rows.tolist()]
    record = {"method": operation, "selections": [str(first), str(second)]}
    write_selection(out_path, cache, Selection(rows=rows, reasons=reasons), record)
    return len(rows)


def sample_selection(cache_path: Path | str, out_path: Path, selection: Path, size: int, *, seed: int = 0) -> int:
    """Write a random sample of a selection, with its reasons, and return the number of samples.

    Raises `SettingError` if the selection has fewer samples, and `DataError` if a key is not in the cache.
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
    """Read a selection as row -> reason; for a text file, the reason is its name."""
    rows = read_selection(path, [cache])
    keys = cache.samples["key"].to_pylist()
    reasons: dict[str, str] = {}
    if path.suffix == ".parquet":
        table = read_table(path)
        if "reason" in table.column_names:
            reasons = dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return {row: reasons.get(keys[row], f"in {path.name}") for row in rows.tolist()}
