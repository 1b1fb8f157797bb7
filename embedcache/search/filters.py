"""Filters: which items of a cache a search may return."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
from embedcache.search.settings import Filter
from embedcache.store.cache import Cache
from embedcache.store.columns import to_array

_OPTIONS = {"label": "label-value", "split": "part"}  # column -> option of `embedcache search`


class CacheFilters:
    """Applies filters to the items of a cache; the columns they need are read on first use and kept.

    The split of the run at `run_path` is used if the samples have no column `split`. Labels are in the column `label`.
    """

    def __init__(self, cache: Cache, modality: str, run_path: Path | None = None, *, label: str = "label") -> None:
        self._cache, self._modality, self._label = cache, modality, label
        self._run_path = run_path if run_path is not None and split_path(run_path).is_file() else None
        self._column = lru_cache(maxsize=None)(self._read_column)
        self._languages = lru_cache(maxsize=None)(self._read_languages)
        self._selected = lru_cache(maxsize=16)(self._read_selection)

    def mask(self, condition: Filter) -> Bools:
        """Return for each item of the modality whether it passes a filter: (N,) bool.

        Raises `UnknownNameError` if the cache has no such column, label, part or language.
        """
        mask_N = np.ones(self._cache.num_rows(self._modality), bool)
        if condition.label_value:
            mask_N &= self._has_value(self._column("label"), condition.label_value, "label")[self._samples]
        if condition.part:
            mask_N &= self._has_value(self._column("split"), condition.part, "part")[self._samples]
        if condition.language:
            mask_N &= self._has_language(condition.language)
        if condition.selection is not None:
            mask_N &= self._selected(Path(condition.selection))[self._samples]
        return mask_N

    def values(self, name: str) -> dict[str, int]:
        """Count the items by value of `label`, `split` or `language`, sorted by value; empty if the cache has none."""
        if not self._has_column(name):
            return {}
        if name == "language":
            column = self._languages()
            return {value: int(self._has_language([value]).sum()) for value in sorted(column.names)}
        column = self._column(name)
        counts = np.bincount(column.codes[self._samples] + 1, minlength=len(column.names) + 1)[1:]
        return dict(sorted(zip(column.names, counts.tolist(), strict=True)))

    @cached_property
    def _samples(self) -> Ints:
        samples_N: Ints = self._cache.items(self._modality, columns=["sample"])["sample"].to_numpy()
        return samples_N

    def _has_column(self, name: str) -> bool:
        if name == "language":
            return "text" in self._cache.info.num_items
        return self._column_of(name) in self._cache.columns or (name == "split" and self._run_path is not None)

    def _has_value(self, column: "_Column", values: Sequence[str], name: str) -> Bools:
        for value in values:
            if not column.names:
                option = _OPTIONS.get(name, name)
                raise UnknownNameError(
                    f"--{option}: {self._cache.path} names no {name}, expected {value!r}; search without --{option}"
                )
            if value not in column.names:
                raise unknown_name(name, value, column.names, where=f"in {self._cache.path}")
        has_value_N: Bools = np.isin(column.codes, [column.names.index(value) for value in values])
        return has_value_N

    def _has_language(self, languages: Sequence[str]) -> Bools:
        """Return whether each item, or a caption of its sample, is in one of the languages: (N,)."""
        is_in_language_T = self._has_value(self._languages(), languages, "language")
        if self._modality == "text":
            return is_in_language_T
        is_in_language_S = np.zeros(self._cache.info.num_samples, bool)
        is_in_language_S[self._cache.items("text", columns=["sample"])["sample"].to_numpy()[is_in_language_T]] = True
        return is_in_language_S[self._samples]

    def _column_of(self, name: str) -> str:
        """Return the column of the samples that holds their `label` or `split`."""
        return self._label if name == "label" else name

    def _read_column(self, name: str) -> "_Column":
        if self._column_of(name) in self._cache.columns:
            return _encode(self._cache.column(self._column_of(name)))
        if name == "split" and self._run_path is not None:
            parts = to_array(read_split(split_path(self._run_path), [self._cache]).parts, pa.string())
            return _encode(pa.chunked_array([pc.if_else(pc.equal(parts, ""), None, parts)]))
        raise UnknownNameError(
            f"--{_OPTIONS[name]}: expected a column {name!r} in {self._cache.path}, got the columns "
            f"{', '.join(self._cache.columns)}{'; name another one with --label' if name == 'label' else ''}"
        )

    def _read_languages(self) -> "_Column":
        if "text" not in self._cache.info.num_items:
            raise UnknownNameError(f"--language: expected captions in {self._cache.path}, got none")
        return _encode(self._cache.items("text", columns=["language"])["language"])

    def _read_selection(self, path: Path) -> Bools:
        is_selected = np.zeros(self._cache.info.num_samples, bool)
        is_selected[read_selection(path, [self._cache])] = True
        return is_selected


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column as numbers: `names[code]` is the value as text, -1 stands for null."""

    names: list[str]
    codes: Array


def _encode(values: pa.ChunkedArray) -> _Column:
    known = pc.unique(values).drop_null()
    codes = pc.fill_null(pc.index_in(values, value_set=known), -1).to_numpy()
    return _Column(names=[str(value) for value in known.to_pylist()], codes=codes)
