"""Searching an index: texts, images, samples, concepts or vectors in, the nearest items that pass a filter out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.dataset.labels import label_text, require_column
from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.files import AnyPath, is_url
from embedcache.neighbors.knn import knn_of_blocks
from embedcache.processes import AUTO, products_on
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress, watch
from embedcache.registry import unknown_name
from embedcache.runs import MANIFEST, SPLIT
from embedcache.search.card import may_hold_removed, open_row_index, read_card
from embedcache.search.hits import Hit, HitReader, Hits, SearchResults
from embedcache.search.queries import Queries, QueryEncoder
from embedcache.search.settings import LABEL, Filter, SearchSettings
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.tables import to_array

if TYPE_CHECKING:
    from embedcache.options import SearchOptions

_BATCH = 4096  # queries that are searched at once
_DEFAULT_K = 10
_COMPARE_ALL = 20_000  # up to this many filtered items, all are compared: fast, and a graph or lists would miss most
_NO_FILTER = Filter()
_OPTIONS = {"label": "label-value", "split": "part", "language": "language"}  # column -> option of `embedcache search`


def search(
    index: "OpenIndex | AnyPath",
    queries: str | Sequence[str] | Queries,
    settings: SearchSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["SearchOptions"],
) -> SearchResults:
    """Search an index.

    Args:
        index: index built by `build_index`; to search more than once, an `OpenIndex`, which is opened once.
        queries: one text or several, or queries of all kinds.
        settings: number of results and filter; device, column of labels, and where the run and the cache are if they
            have moved, unless the index is open.
        progress: progress in queries, of thousands.
        options: settings by their names on the command line, which replace those of `settings`.

    Returns:
        A list of hits per query, best first; in a notebook it is shown with thumbnails.

    Raises:
        SettingError, DataError, UnknownNameError, FingerprintError, PathError, CorruptError: see `OpenIndex`.
    """
    settings, progress = merge_settings(SearchSettings, settings, options), to_progress(progress)
    if not isinstance(queries, Queries):
        queries = Queries(texts=queries)
    if not isinstance(index, OpenIndex):
        index = OpenIndex(index, run=settings.run, cache=settings.cache, label=settings.label, device=settings.device)
    return index.search(queries, k=settings.k, condition=settings.filter, progress=progress)


class OpenIndex:
    """An index that is opened once and searched many times, by one thread.

    Encoders are opened when first needed. Of the cache's tables only the rows of hits are read, in blocks, and the
    columns of a filter. Memory: the index, those blocks (see `RowReader`), and for each of the 8 filters used last one
    byte per item, and the vectors that pass if they are few.

    Args:
        index: index built by `build_index`.
        run: where the run that projected the index is now, if it has moved.
        cache: where the cache is now, if it has moved.
        label: column of the labels that hits have and filters name.
        device: device that encoders run on, and batches of 64 queries or more if FAISS can search the index there.

    Raises:
        PathError: the index, its run or its cache does not exist.
        FingerprintError: the run or the cache is not the one that the index was built from.
        UnknownNameError: the cache has no column of that name, other than the default.
        CorruptError: the card or a file of the index has changed.
    """

    def __init__(
        self,
        index: AnyPath,
        *,
        run: AnyPath | None = None,
        cache: AnyPath | None = None,
        label: str = LABEL["default"],
        device: str = AUTO,
    ) -> None:
        self.path = Path(index)
        self.card = read_card(self.path)
        if run is None and self.card.run is not None:
            run = _require_file(self.path / self.card.run, MANIFEST, "run")
        if cache is None and is_url(self.card.cache):
            cache = self.card.cache
        elif cache is None:
            cache = _require_file(self.path / self.card.cache, "cache.json", "cache")
        self.cache = Cache(cache)
        if not self.cache.info.has_rows_of(self.card.index_digest):
            raise FingerprintError(
                f"index {self.path}: expected the samples of {self.cache.path}, got others; build it again"
            )
        self.run_path = None if run is None else Path(run)
        self.device = device
        self._index = open_row_index(self.path, self.card, device=device)
        self.query_encoder = QueryEncoder(self._index, self.card, self.cache, self.run_path, device)
        if label != LABEL["default"]:
            require_column(self.cache, label)
        self.label = label
        self.filters = CacheFilters(self.cache, self.card.modality, self.run_path, label=label)
        self.hits = HitReader(self.cache, self.card.modality, label=label)
        self._subset = lru_cache(maxsize=8)(self._apply)

    @property
    def rows(self) -> Ints:
        """Rows of the items that a search finds, in the order of the index, without those removed since: (N,) int64."""
        rows = self._index.rows
        is_allowed_N = self._subset(_NO_FILTER).is_allowed_N
        return rows if is_allowed_N is None else rows[is_allowed_N[rows]]

    def search(
        self,
        queries: Queries,
        *,
        k: int | None = None,
        condition: Filter | None = None,
        progress: Progress | None = None,
    ) -> SearchResults:
        """Search for the items nearest to each query: a list of hits per query, best first.

        `progress` counts the queries if there are thousands. Raises `SettingError` if k is above what the index holds
        and the filter passes, `DataError` if a query cannot be compared with the index or the filter passes nothing,
        and the errors of `QueryEncoder.encode` and `CacheFilters.mask`.
        """
        _check_k(k, self.card.num_vectors, f"the index holds {self.card.num_vectors} items")
        queries_QP, modality = self.query_encoder.encode(queries), self.card.modality
        parts = [queries_QP[part] for part in blocks(len(queries_QP), _BATCH)]
        shown = progress if progress is not None and len(parts) > 1 else NullProgress()
        watched = watch(parts, shown, "searching", len(queries_QP), "queries")
        found = chain.from_iterable(self.search_vectors(part_BP, k=k, condition=condition) for part_BP in watched)
        return SearchResults(
            Hits(hits, query=name, cache=self.cache, modality=modality)
            for name, hits in zip(queries.names, found, strict=True)
        )

    def search_vectors(
        self, queries_QP: Floats, *, k: int | None = None, condition: Filter | None = None
    ) -> list[list[Hit]]:
        """Search with vectors of the index's space, (Q, P) float32 rows of length 1; as `search` otherwise.

        Hits of equal scores are in the order of their rows.
        Raises `DataError` if they have another shape, or values that are no numbers.
        """
        queries_QP = np.asarray(queries_QP, np.float32)
        if queries_QP.ndim != 2 or queries_QP.shape[1] != self.card.width:
            raise DataError(f"queries: expected (Q, {self.card.width}) vectors for {self.path}, got {queries_QP.shape}")
        if not np.isfinite(queries_QP).all():
            raise DataError(f"queries: expected finite vectors for {self.path}, got NaN or infinite values")
        condition = _NO_FILTER if condition is None else condition
        subset = self._subset(condition)
        scores_QK, rows_QK = self._search_subset(queries_QP, _choose_k(k, subset.num_items, len(self._index)), subset)
        order_QK = np.lexsort((rows_QK, -scores_QK))  # of equal scores, FAISS returns the last row first
        scores_QK = np.take_along_axis(scores_QK, order_QK, axis=1)
        rows_QK = np.take_along_axis(rows_QK, order_QK, axis=1)
        return [
            self.hits.read(scores_K, rows_K, condition.language)
            for scores_K, rows_K in zip(scores_QK, rows_QK, strict=True)
        ]

    def count(self, condition: Filter) -> int:
        """Count the items that pass a filter."""
        return self._subset(condition).num_items

    def values(self, name: str) -> dict[str, int]:
        """Count the items that a search finds by value of `label`, `split` or `language`; see `CacheFilters.values`."""
        return self.filters.values(name, self.rows)

    def _apply(self, condition: Filter) -> "_Subset":
        """Apply a filter; if few items pass, read their vectors, as a search of the index would miss most of them."""
        has_removed = may_hold_removed(self.card, self.cache)
        if not (condition or has_removed):
            return _Subset(is_allowed_N=None, num_items=len(self._index), vectors=None)
        is_allowed_N = self.filters.mask(condition)
        if has_removed:
            is_allowed_N &= ~self.cache.removed_items(self.card.modality)
        is_found_N = is_allowed_N[self._index.rows]
        num_items = int(is_found_N.sum())
        if num_items == len(self._index):
            return _Subset(is_allowed_N=None, num_items=num_items, vectors=None)
        vectors = None
        if not self._index.is_exact and 0 < num_items <= _COMPARE_ALL:
            rows = np.sort(self._index.rows[is_found_N])
            vectors = (rows, self.query_encoder.indexed.read(rows))
        return _Subset(is_allowed_N=is_allowed_N, num_items=num_items, vectors=vectors)

    def _search_subset(self, queries_QP: Floats, k: int, subset: "_Subset") -> tuple[Floats, Ints]:
        """Search the items that pass a filter: exactly if they are few, and more thoroughly the fewer they are."""
        if subset.vectors is not None:
            rows_QK, scores_QK = knn_of_blocks(queries_QP, [subset.vectors], k, products=products_on(self.device))
            return scores_QK, rows_QK
        fraction = subset.num_items / len(self._index)
        parameters = {name: round(value / fraction) for name, value in self.card.search.items()}
        is_allowed_N = subset.is_allowed_N
        scores_QK, rows_QK = self._index.search(queries_QP, k, parameters, is_allowed_N=is_allowed_N)
        if (rows_QK >= 0).all():
            return scores_QK, rows_QK
        parameters |= {"nprobe": self._index.num_lists, "efSearch": len(self._index)}  # all of the index
        return self._index.search(queries_QP, k, parameters, is_allowed_N=is_allowed_N)


class CacheFilters:
    """Applies filters to the items of a cache; the columns they need are read on first use and kept.

    The split of the run at `run_path` is used if the samples have no column `split`. Labels are in the column `label`.
    """

    def __init__(self, cache: Cache, modality: str, run_path: Path | None = None, *, label: str = "label") -> None:
        self._cache, self._modality, self._label = cache, modality, label
        self._run_path = run_path if run_path is not None and (run_path / SPLIT).is_file() else None
        self._column = lru_cache(maxsize=None)(self._read_column)
        self._selected = lru_cache(maxsize=16)(self._read_selection)

    def mask(self, condition: Filter) -> Bools:
        """Return for each item of the modality whether it passes a filter: (N,) bool.

        Raises `UnknownNameError` if the cache has no such column, label, part or language.
        """
        mask_N = np.ones(self._cache.num_rows(self._modality), bool)
        if condition.label_value:
            mask_N &= self._has_value("label", condition.label_value)[self._samples]
        if condition.part:
            mask_N &= self._has_value("split", condition.part)[self._samples]
        if condition.language:
            mask_N &= self._has_language(condition.language)
        if condition.selection is not None:
            mask_N &= self._selected(Path(condition.selection))[self._samples]
        return mask_N

    def values(self, name: str, rows: Ints | slice = slice(None)) -> dict[str, int]:
        """Count items, by default all, by value of `label`, `split` or `language`: sorted; empty if there is none."""
        try:
            column = self._column(name)
        except UnknownNameError:
            return {}
        if name == "language":
            return {value: int(self._has_language([value])[rows].sum()) for value in sorted(column.names)}
        counts = np.bincount(column.codes[self._samples[rows]] + 1, minlength=len(column.names) + 1)[1:]
        return dict(sorted(zip(column.names, counts.tolist(), strict=True)))

    @cached_property
    def _samples(self) -> Ints:
        samples_N: Ints = self._cache.items(self._modality, columns=["sample"])["sample"].to_numpy()
        return samples_N

    def _has_value(self, name: str, values: Sequence[str]) -> Bools:
        column = self._column(name)
        for value in values:
            if value not in column.names:
                raise unknown_name(_OPTIONS[name], value, column.names, where=f"in {self._cache.path}")
        has_value: Bools = np.isin(column.codes, [column.names.index(value) for value in values])
        return has_value

    def _has_language(self, languages: Sequence[str]) -> Bools:
        """Return whether each item, or a caption of its sample, is in one of the languages: (N,)."""
        is_in_language_T = self._has_value("language", languages)
        if self._modality == "text":
            return is_in_language_T
        is_in_language_S = np.zeros(self._cache.info.num_samples, bool)
        is_in_language_S[self._cache.items("text", columns=["sample"])["sample"].to_numpy()[is_in_language_T]] = True
        return is_in_language_S[self._samples]

    def _read_column(self, name: str) -> "_Column":
        """Read `language` of texts, or a column of the samples."""
        if name == "language" and "text" in self._cache.info.num_items:
            return _encode(self._cache.items("text", columns=["language"])["language"])
        column = self._label if name == "label" else name
        if name != "language" and column in self._cache.columns:
            return _encode(self._cache.column(column))
        if name == "split" and self._run_path is not None:
            parts = to_array(read_split(self._run_path / SPLIT, [self._cache]).parts, pa.string())
            return _encode(pa.chunked_array([pc.if_else(pc.equal(parts, ""), None, parts)]))
        raise UnknownNameError(
            f"--{_OPTIONS[name]}: expected a column {column!r} in {self._cache.path}, got the columns "
            f"{', '.join(self._cache.columns)}; leave the option out, or name the column of labels with --label"
        )

    def _read_selection(self, path: Path) -> Bools:
        is_selected = np.zeros(self._cache.info.num_samples, bool)
        is_selected[read_selection(path, [self._cache])] = True
        return is_selected


@dataclass(frozen=True, kw_only=True)
class _Subset:
    """Items of an index that pass a filter."""

    is_allowed_N: Bools | None  # which rows of the cache; None: all
    num_items: int
    vectors: tuple[Ints, Floats] | None  # rows and vectors, if all of them are to be compared


def _check_k(k: int | None, largest: int, reason: str) -> None:
    if k is not None and not 1 <= k <= largest:
        raise SettingError(f"k: expected a whole number from 1 to {largest}, as {reason}, got {k}")


def _choose_k(k: int | None, num_allowed: int, num_items: int) -> int:
    if not num_allowed:
        raise DataError(
            f"filter: expected items that pass, got none of the {num_items} of the index; give fewer conditions"
        )
    _check_k(k, num_allowed, f"{num_allowed} of {num_items} items pass the filter")
    return min(_DEFAULT_K, num_allowed) if k is None else k


def _require_file(path: Path, file: str, option: str) -> Path:
    """Return a path that an index names relative to itself."""
    if not (path / file).is_file():
        raise PathError(
            f"{option} {path}, which the index was built from, does not exist; if it has moved, give --{option}"
        )
    return path.resolve()


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column as numbers: `names[code]` is the value as text, -1 stands for a missing one."""

    names: list[str]
    codes: Array


def _encode(values: pa.ChunkedArray) -> _Column:
    known = pc.unique(values).drop_null()
    texts = [label_text(value) for value in known.to_pylist()]
    code_of = {text: code for code, text in enumerate(dict.fromkeys(filter(None, texts)))}
    code_F = np.array([*(code_of.get(text or "", -1) for text in texts), -1], np.int64)  # the last is that of null
    return _Column(names=list(code_of), codes=code_F[pc.fill_null(pc.index_in(values, value_set=known), -1).to_numpy()])
