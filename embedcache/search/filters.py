"""Which items of a cache a search may find.

What an index found, with what the cache says of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Ints
from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import read_split
from embedcache.errors import UnknownNameError
from embedcache.projectors.saved import split_path
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache

_KEPT_SELECTIONS = 16


_OPTIONS = {"label": "label-value", "split": "part"}
"""Column -> option of `embedcache search` that filters by it."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What is asked of an item; all that is given must hold.

    Args:
        labels: values of the column `label`, one of which its sample must have.
        splits: values of the column `split`, alike; where there is no such column, parts of the run's split.
        languages: of a caption, one of which it must have; of an image, one of which a caption of its sample must have.
        selection: a file that must name its sample, as `read_selection` reads it.
    """

    labels: Sequence[str] = ()
    splits: Sequence[str] = ()
    languages: Sequence[str] = ()
    selection: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.labels or self.splits or self.languages or self.selection)

    @property
    def key(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], Path | None]:
        """What two filters that ask for the same have in common."""
        return tuple(self.labels), tuple(self.splits), tuple(self.languages), self.selection


class CacheFilters:
    """The filters of one cache: what they choose by is read on first use, and kept.

    Args:
        cache: the cache.
        modality: `image` or `text`, of the items that are chosen from.
        run_path: whose split is asked for where samples have no column `split`.
    """

    def __init__(self, cache: Cache, modality: str, run_path: Path | None = None) -> None:
        self._cache, self._modality, self._run_path = cache, modality, run_path
        self._samples: Ints = cache.items(modality)["sample"].to_numpy()
        self._column = lru_cache(maxsize=None)(self._read_column)
        self._languages = lru_cache(maxsize=None)(self._read_languages)
        self._selected = lru_cache(maxsize=_KEPT_SELECTIONS)(self._read_selection)

    def kept(self, keep: Filter) -> Bools:
        """Say of each item of the modality whether a filter keeps it: (N,) bool.

        Raises:
            UnknownNameError: the cache has no such column, or no sample has that label, split or language.
            PathError, CorruptError, DataError: the selection cannot be read, or names other keys.
        """
        kept_N = np.ones(len(self._samples), bool)
        for name, values in (("label", keep.labels), ("split", keep.splits)):
            if values:
                kept_N &= self._has(self._column(name), values, name)[self._samples]
        if keep.languages:
            kept_N &= self._speaks(keep.languages)
        if keep.selection is not None:
            kept_N &= self._selected(keep.selection)[self._samples]
        return kept_N

    def values(self, name: str) -> dict[str, int]:
        """Count the items by value of `label`, `split` or `language`, in the order of the values; empty where the cache
        has none."""
        if not self._can(name):
            return {}
        if name == "language":
            column = self._languages()
            return {value: int(self._speaks([value]).sum()) for value in sorted(column.names)}
        column = self._column(name)
        counts = np.bincount(column.codes[self._samples] + 1, minlength=len(column.names) + 1)[1:]
        return dict(sorted(zip(column.names, counts.tolist(), strict=True)))

    def _can(self, name: str) -> bool:
        if name == "language":
            return "text" in self._cache.info.num_items
        return name in self._cache.columns or (name == "split" and self._has_run_split())

    def _has_run_split(self) -> bool:
        return self._run_path is not None and split_path(self._run_path).is_file()

    def _has(self, column: "_Column", values: Sequence[str], name: str) -> Bools:
        for value in values:
            if value not in column.names:
                raise unknown_name(f"{name} in {self._cache.path}", value, column.names)
        found: Bools = np.isin(column.codes, [column.names.index(value) for value in values])
        return found

    def _speaks(self, languages: Sequence[str]) -> Bools:
        """Say of each item whether it, or a caption of its sample, is in one of the languages."""
        is_asked_T = self._has(self._languages(), languages, "language")
        if self._modality == "text":
            return is_asked_T
        has_one = np.zeros(self._cache.info.num_samples, bool)
        has_one[self._cache.items("text")["sample"].to_numpy()[is_asked_T]] = True
        return has_one[self._samples]

    def _read_column(self, name: str) -> "_Column":
        if name in self._cache.columns:
            return _coded(self._cache.samples[name])
        if name == "split" and self._run_path is not None and self._has_run_split():
            parts = read_split(split_path(self._run_path), [self._cache]).parts
            return _coded(pa.chunked_array([pa.array([part or None for part in parts], pa.string())]))
        raise UnknownNameError(
            f"the samples of {self._cache.path} have no column {name!r}, so --{_OPTIONS[name]} cannot choose from "
            f"them; columns: {', '.join(self._cache.columns)}"
        )

    def _read_languages(self) -> "_Column":
        if "text" not in self._cache.info.num_items:
            raise UnknownNameError(f"{self._cache.path} has no captions, so --language cannot choose by theirs")
        return _coded(self._cache.items("text")["language"])

    def _read_selection(self, path: Path) -> Bools:
        is_selected = np.zeros(self._cache.info.num_samples, bool)
        is_selected[read_selection(path, [self._cache])] = True
        return is_selected


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column as numbers: `names[code]` is the value as text, and -1 is none."""

    names: list[str]
    codes: Array


def _coded(values: pa.ChunkedArray) -> _Column:
    known = pc.unique(values).drop_null()
    codes = pc.fill_null(pc.index_in(values, value_set=known), -1).to_numpy()
    return _Column(names=[str(value) for value in known.to_pylist()], codes=codes)
