"""Which samples of a cache a search may find."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Bools
from embedcache.cache.cache import Cache
from embedcache.cache.selection import read_selection
from embedcache.errors import UnknownNameError
from embedcache.registry import unknown_name


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What is asked of a sample; all that is given must hold.

    Args:
        labels: values of the column `label`, one of which it must have.
        splits: values of the column `split`, alike.
        selection: a file that must name it, as `read_selection` reads it.
    """

    labels: Sequence[str] = ()
    splits: Sequence[str] = ()
    selection: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.labels or self.splits or self.selection)


def kept_samples(cache: Cache, keep: Filter) -> Bools:
    """Say of each sample whether a filter keeps it: (number of samples,) bool.

    Raises:
        UnknownNameError: the cache has no such column, or no sample has that label or split.
        PathError, CorruptError, DataError: the selection cannot be read, or names other keys.
    """
    kept = np.ones(cache.info.num_samples, bool)
    for column, values in (("label", keep.labels), ("split", keep.splits)):
        if values:
            kept &= _has(cache, column, values)
    if keep.selection is not None:
        selected = np.zeros_like(kept)
        selected[read_selection(keep.selection, [cache])] = True
        kept &= selected
    return kept


def _has(cache: Cache, column: str, values: Sequence[str]) -> Bools:
    if column not in cache.columns:
        raise UnknownNameError(
            f"the samples of {cache.path} have no column {column!r}, so --{column} cannot choose from them; "
            f"columns: {', '.join(cache.columns)}"
        )
    found = [None if value is None else str(value) for value in cache.samples[column].to_pylist()]
    known = {value for value in found if value is not None}
    for value in values:
        if value not in known:
            raise unknown_name(f"{column} in {cache.path}", value, known)
    return np.array([value in values for value in found], bool)
