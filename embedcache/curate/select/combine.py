"""Selections out of selections: in both, in one and not in another, or some drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.select.baselines import draw
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.errors import DataError, SettingError
from embedcache.store.cache import Cache
from embedcache.store.tables import read_table

Operation: TypeAlias = Literal["and", "minus"]

_OPERATIONS: dict[str, Callable[[Ints, Ints], Ints]] = {"and": np.intersect1d, "minus": np.setdiff1d}


def combine_selections(cache_path: Path | str, out_path: Path, first: Path, operation: Operation, second: Path) -> int:
    """Keep the samples of one selection that are also in another (`and`), or that are not (`minus`).

    The reasons are those of the first and, with `and`, of the second.

    Args:
        cache_path: the cache that they are of.
        out_path: Parquet.
        first: a selection, or a text with a key a line.
        operation: what to do.
        second: alike.

    Returns:
        How many samples were kept.

    Raises:
        PathError: there is no such file.
        CorruptError: it cannot be read.
        DataError: it names a key that the cache has not, or nothing is left.
    """
    cache = Cache(cache_path)
    one, other = (read_reasons(path, cache) for path in (first, second))
    rows = _OPERATIONS[operation](*(np.array(sorted(found), np.int64) for found in (one, other)))
    if not len(rows):
        raise DataError(
            f"{first} {operation} {second} is empty: they select {len(one):,} and {len(other):,} samples of "
            f"{cache.path}, {len(one.keys() & other.keys()):,} of them both"
        )
    joins = operation == "and"
    reasons = [f"{one[row]}; {other[row]}" if joins else one[row] for row in rows.tolist()]
    about = {"method": operation, "selections": [str(first), str(second)]}
    write_selection(out_path, cache, Selection(rows=rows, reasons=reasons), about)
    return len(rows)


def sample_selection(cache_path: Path | str, out_path: Path, selection: Path, size: int, *, seed: int = 0) -> int:
    """Draw some samples of a selection at random; their reasons stay.

    Args:
        cache_path: the cache that it is of.
        out_path: Parquet.
        selection: a selection, or a text with a key a line.
        size: how many.
        seed: of the draw.

    Returns:
        How many samples were drawn.

    Raises:
        SettingError: there are no more than that.
        DataError: it names a key that the cache has not.
    """
    cache = Cache(cache_path)
    found = read_reasons(selection, cache)
    if not 1 <= size <= len(found):
        raise SettingError(f"cannot draw {size:,} of the {len(found):,} samples of {selection}; give as many at most")
    rows = draw(np.array(sorted(found), np.int64), size, seed=seed)
    about = {"method": "sample", "selections": [str(selection)], "seed": seed}
    write_selection(out_path, cache, Selection(rows=rows, reasons=[found[row] for row in rows.tolist()]), about)
    return size


def read_reasons(path: Path, cache: Cache) -> dict[int, str]:
    """Read a selection: row -> reason; of a text, its name is the reason.

    Raises:
        PathError: there is no such file.
        CorruptError: it cannot be read.
        DataError: it names a key that the cache has not, or none.
    """
    rows = read_selection(path, [cache])
    keys = cache.samples["key"].to_pylist()
    reasons: dict[str, str] = {}
    if path.suffix == ".parquet":
        table = read_table(path)
        if "reason" in table.column_names:
            reasons = dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return {row: reasons.get(keys[row], f"in {path.name}") for row in rows.tolist()}
