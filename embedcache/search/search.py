"""Searching an index: texts, images, samples, concepts or vectors in, the nearest items that pass a filter out.

Hits have their keys and captions. They are rows of a table, and have thumbnails in a notebook.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from html import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array, Bools, Floats, Ints, blocks, concatenated_ranges
from embedcache.dataset.labels import label_text, require_column
from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import read_split
from embedcache.dataset.thumbnails import PICTURED, Thumbnails, credit
from embedcache.dataset.where import rows_where
from embedcache.errors import (
    DataError,
    EmbedcacheError,
    FingerprintError,
    SettingError,
    UnknownNameError,
    visible,
)
from embedcache.files import AnyPath, find_named
from embedcache.neighbors.knn import knn_of_blocks
from embedcache.processes import AUTO, products_on
from embedcache.progress import AnyProgress, NullProgress, Progress, to_progress, watch
from embedcache.registry import require, unknown_name
from embedcache.runs import SPLIT
from embedcache.search.faiss_index import may_hold_removed, open_row_index, read_card
from embedcache.search.queries import Queries, QueryEncoder
from embedcache.search.settings import LABEL, Filter, Match, SearchSettings
from embedcache.search.words import Words, fuse, open_words
from embedcache.settings import merge_settings
from embedcache.sources.files import file_name_beside_key
from embedcache.store.cache import Cache, RowReader
from embedcache.store.layout import SAMPLES
from embedcache.store.tables import to_array

if TYPE_CHECKING:
    import pandas

    from embedcache.options import SearchOptions

_MAX_CAPTIONS = 3
_MAX_QUERIES, _MAX_HITS = 8, 12  # that a notebook shows
_MAX_CHARACTERS = 120

_BATCH = 4096  # queries that are searched at once
_DEFAULT_K = 10
_FUSED_RANKS = 100
_COMPARE_ALL = 20_000  # up to this many filtered items, all are compared: fast, and a graph or lists would miss most
_NO_FILTER = Filter()
_OPTIONS = {"label": "label-value", "split": "part", "language": "language"}  # column -> option of `embedcache search`


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One search result.

    Args:
        score: cosine similarity to the query, from -1 to 1, or its estimate for an index of codes. With `match="words"`
            the BM25 score of the best caption, with `match="both"` the sum of reciprocal ranks.
        row: row of the item in the table of its modality.
        key: key of its sample.
        path: file of the item as its source names it, relative to the source if it lies below it. For bytes in a shard
            or a table, the path of the shard or table. None for a text, or if the source names no file.
        captions: at most three captions of its sample, in the language of the first. For a caption, only the caption.
        label: label of its sample, in the column `label` or another that was named, if the cache has it.
        languages: languages of all captions, starting with the language of `captions`. None is an unknown language.

    Example:
        >>> hit = embedcache.search_index("index", "yellow bar right on black", k=1)[0][0]
        >>> hit.key, hit.path, hit.captions
        ('00000', '00000.png', ['yellow bar right on black'])
    """

    score: float
    row: int
    key: str
    path: str | None = None
    captions: Sequence[str]
    label: str | None = None
    languages: Sequence[str | None] = ()

    @property
    def name(self) -> str:
        """What to call the item where it has no caption: its key, or its file if the key does not name that."""
        return file_name_beside_key(self.path, self.key) or self.key


class Hits(list[Hit]):
    """The hits of one query, best first: a list, shown with thumbnails in a notebook.

    Args:
        hits: the hits.
        query: name of the query: its text, path, key or concept, or the number of its image, row or vector.
        cache: cache of the items.
        modality: modality of the items.

    Example:
        >>> hits = embedcache.search_index("index", "yellow bar right on black", k=3)[0]
        >>> hits.query, len(hits)
        ('yellow bar right on black', 3)
        >>> hits[0].score > hits[1].score
        True
    """

    def __init__(self, hits: Iterable[Hit], *, query: str, cache: Cache, modality: str) -> None:
        super().__init__(hits)
        self.query = query
        self.cache = cache
        self.modality = modality

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a row per hit; the columns are those of `Hit`. Requires pandas."""
        return SearchResults([self]).to_pandas().drop(columns="query")

    def to_html(self) -> str:
        """Return the hits as HTML, as `SearchResults.to_html` does."""
        return SearchResults([self]).to_html()

    def _repr_html_(self) -> str:
        return self.to_html()


class SearchResults(list[Hits]):
    """The hits of each query, in the order of the queries: a list, shown with thumbnails in a notebook.

    Example:
        >>> results = embedcache.search_index("index", ["yellow bar right on black", "black bar bottom on yellow"], k=2)
        >>> [hits.query for hits in results]
        ['yellow bar right on black', 'black bar bottom on yellow']
        >>> results.to_pandas()["query"].value_counts().tolist()
        [2, 2]
    """

    def to_pandas(self) -> "pandas.DataFrame":
        """Return a data frame with a row per hit: `query`, and the columns of `Hit`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        rows = [{"query": hits.query, **asdict(hit)} for hits in self for hit in hits]
        columns = ["query", *(item.name for item in fields(Hit))]
        return require("pandas", package="pandas").DataFrame(rows, columns=columns)

    def to_html(self) -> str:
        """Return the first 12 hits of the first 8 queries as HTML, with images as thumbnails in the page.

        Recordings are shown as spectrograms, videos as their middle frame. They are read as `reopen_source` allows it.
        """
        parts = [part for hits in self[:_MAX_QUERIES] for part in _show(hits)]
        if len(self) > _MAX_QUERIES:
            parts.append(f"<p>… and {len(self) - _MAX_QUERIES:,} more queries</p>")

        # Queries of one cache share its credit, which is shown once.
        credited = dict.fromkeys(credit(hits.cache) for hits in self)
        parts += [f"<p><small>{_text(words)}</small></p>" for words in credited if words]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return self.to_html()


def _show(hits: Hits) -> list[str]:
    """Return the elements that show the hits of one query."""
    thumbnails: Thumbnails | None = None
    reason = ""
    cards = []
    for hit in hits[:_MAX_HITS]:
        image = ""

        # A hit whose file cannot be read is shown without a picture; the reason is given below all hits.
        try:
            if hits.modality in PICTURED:
                thumbnails = thumbnails or Thumbnails(hits.cache, hits.modality)
                url = thumbnails.data_url(hit.row)
                image = f'<img src="{url}" alt="{_text(hit.key)}" style="max-width: 100%"><br>'
        except EmbedcacheError as error:
            reason = str(error)

        file = file_name_beside_key(hit.path, hit.key)
        details = _text(" · ".join(filter(None, [hit.key, file, hit.label, *hit.captions])))
        words = _text(hit.captions[0] if hit.captions else hit.name)
        cards.append(
            f'<div title="{details}" style="width: 112px; margin: 4px; text-align: center; overflow-wrap: anywhere">'
            f"{image}<small><b>{hit.score:.3f}</b> {words}</small></div>"
        )
    parts = [f"<b>{_text(hits.query)}</b>", f'<div style="display: flex; flex-wrap: wrap">{"".join(cards)}</div>']
    if len(hits) > _MAX_HITS:
        parts.append(f"<p>… and {len(hits) - _MAX_HITS:,} more</p>")
    return [*parts, f"<p><small>{escape(visible(reason))}</small></p>"] if reason else parts


def _text(words: str) -> str:
    """Return text of a cache or a query as HTML: escaped, without control characters, cut if it is long."""
    cut = f"{words[:_MAX_CHARACTERS]}…" if len(words) > _MAX_CHARACTERS else words
    return escape(visible(cut))


class HitReader:
    """Looks up the keys, labels and captions of items, reading only the rows that it returns; see `RowReader`."""

    def __init__(self, cache: Cache, modality: str, *, label: str = "label") -> None:
        self._modality = modality
        self._label = label
        columns = {"key", label} & set(cache.columns)
        self._samples = RowReader(cache, SAMPLES, sorted(columns))
        self._texts = RowReader(cache, "text")
        self._items = self._texts if modality == "text" else RowReader(cache, modality, ["sample", "path"])

    def load(self) -> None:
        """Read all rows, for a process that looks up many: later lookups take microseconds per row."""
        for reader in (self._samples, self._items, self._texts):
            reader.load()

    def samples(self, rows_K: Ints) -> Ints:
        """Return the sample of each item: (K,) int64."""
        samples_K: Ints = self._items.take(rows_K)["sample"].to_numpy()
        return samples_K

    def find_key(self, key: str) -> int:
        """Return the sample of a key, -1 if there is none."""
        return self._samples.find_key(key)

    def find(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return the first item of each sample, and how many it has; see `RowReader.find`."""
        return self._items.find(samples)

    def read(self, scores_K: Floats, rows_K: Ints, languages: Sequence[str] = ()) -> list[Hit]:
        """Return the hits of one query, with captions in some languages (empty: all); rows of -1 are skipped."""
        scores = scores_K[rows_K >= 0].tolist()
        rows = rows_K[rows_K >= 0]

        samples = self._samples.take(self.samples(rows))
        labels = samples[self._label].to_pylist() if self._label in samples.column_names else [None] * len(rows)
        keys = samples["key"].to_pylist()
        paths = self.paths(rows)
        captions_of = self._captions(rows)

        hits = []
        for score, row, key, path, label, texts in zip(
            scores, rows.tolist(), keys, paths, labels, captions_of, strict=True
        ):
            if languages:
                texts = [(text, language) for text, language in texts if language in languages]

            # The languages are listed before the captions are reduced to those of the first.
            present = list(dict.fromkeys([language for _, language in texts]))
            if len(present) > 1:
                texts = [(text, language) for text, language in texts if language == present[0]]
            captions = [text for text, _ in texts[:_MAX_CAPTIONS]]

            hit = Hit(
                score=score,
                row=row,
                key=key,
                path=path,
                captions=captions,
                label=label_text(label),
                languages=present,
            )
            hits.append(hit)
        return hits

    def paths(self, rows_K: Ints) -> list[str | None]:
        """Return the file of each item as its source names it; None where there is none."""
        if self._modality == "text":
            return [None] * len(rows_K)
        return [path or None for path in self._items.take(rows_K)["path"].to_pylist()]

    def captions(self, row: int) -> list[dict[str, str | None]]:
        """Return `text` and `language` of the captions of an image's sample, or of a caption itself."""
        (texts,) = self._captions(np.array([row]))
        return [{"text": text, "language": language} for text, language in texts]

    def _captions(self, rows_K: Ints) -> list[list[tuple[str, str | None]]]:
        """Return text and language of the captions of each item."""
        if not len(self._texts):
            return [[]] * len(rows_K)

        # A caption has only itself; other items have all captions of their sample.
        if self._modality == "text":
            starts = rows_K
            counts = np.ones(len(rows_K), np.int64)
        else:
            starts, counts = self._texts.find(self.samples(rows_K))
        _, positions = concatenated_ranges(starts, counts)
        table = self._texts.take(positions)
        texts = list(zip(table["text"].to_pylist(), table["language"].to_pylist(), strict=True))

        ends = np.cumsum(counts).tolist()
        return [texts[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


def search(
    index: "OpenIndex | AnyPath",
    queries: str | Sequence[str] | Queries,
    settings: SearchSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Unpack["SearchOptions"],
) -> SearchResults:
    """Search an index for the items nearest to each query.

    Args:
        index: index built by `build_index`; to search more than once, an `OpenIndex`, which is opened once.
        queries: one text or several, or queries of all kinds.
        settings: number of results and filter. If the index is not open, also the device, the column of labels, and the
            paths of a run and a cache that have moved.
        progress: progress in queries, of thousands.
        options: settings by their names on the command line, which replace those of `settings`.

    Returns:
        A list of hits per query, best first; in a notebook it is shown with thumbnails.

    Raises:
        SettingError, DataError, UnknownNameError, FingerprintError, PathError, CorruptError: see `OpenIndex`.

    Example:
        >>> (hits,) = embedcache.search_index("index", "yellow bar right on black", k=3)
        >>> hits[0].key, hits[0].captions
        ('00000', ['yellow bar right on black'])
        >>> (hits,) = embedcache.search_index("index", embedcache.Queries(keys="00048"), k=1)
        >>> hits[0].captions
        ['black bar bottom on yellow']
    """
    settings = merge_settings(SearchSettings, settings, options)
    progress = to_progress(progress)
    if not isinstance(queries, Queries):
        queries = Queries(texts=queries)

    if not isinstance(index, OpenIndex):
        index = OpenIndex(
            index,
            run=settings.run,
            cache=settings.cache,
            adapter=settings.adapter,
            label=settings.label,
            device=settings.device,
        )

    return index.search(queries, k=settings.k, condition=settings.filter, match=settings.match, progress=progress)


class OpenIndex:
    """An index that is opened once and searched many times, by one thread.

    Encoders are opened when first needed. From the cache's tables, only blocks with the rows of hits and the columns of
    a filter are read. Memory: the index, these blocks (see `RowReader`), and for each of the 8 filters used last one
    byte per item, and the vectors that pass if they are few.

    Args:
        index: index built by `build_index`.
        run: where the run that projected the index is now, if it has moved.
        cache: where the cache is now, if it has moved.
        adapter: run of `fit_adapter` that maps queries of a new encoder into the space of the index.
        label: column of the labels that hits have and filters name.
        filter_timeout_s: most seconds to compute a condition for. If None, any.
        device: device that encoders run on, and batches of 64 queries or more if FAISS can search the index there.

    Raises:
        PathError: the index, its run or its cache does not exist.
        FingerprintError: the run or the cache is not the one that the index was built from, or the adapter maps into
            another space.
        UnknownNameError: the cache has no column of that name, other than the default.
        CorruptError: the card or a file of the index has changed.

    Example:
        >>> index = embedcache.OpenIndex("index")
        >>> len(index.rows), index.card.factory
        (60, 'Flat')
        >>> results = index.search(embedcache.Queries(texts="yellow bar right on black", keys="00048"), k=1)
        >>> [hits[0].key for hits in results]
        ['00000', '00048']
    """

    def __init__(
        self,
        index: AnyPath,
        *,
        run: AnyPath | None = None,
        cache: AnyPath | None = None,
        adapter: AnyPath | None = None,
        label: str = LABEL["default"],
        filter_timeout_s: float | None = None,
        device: str = AUTO,
    ) -> None:
        self.path = Path(index)
        self.card = read_card(self.path)

        if run is None and self.card.run is not None:
            run = find_named(self.card.run, self.path, "run")
        if cache is None:
            cache = find_named(self.card.cache, self.path, "cache")
        self.cache = Cache(cache)

        # The index stores rows, which name other items in a cache of other samples.
        if not self.cache.info.has_rows_of(self.card.index_digest):
            raise FingerprintError(
                f"index {self.path}: expected the samples of {self.cache.path}, got others; build it again"
            )
        self.run_path = None if run is None else Path(run)
        self.device = device
        self._index = open_row_index(self.path, self.card, device=device)
        self.query_encoder = QueryEncoder(self._index, self.card, self.cache, self.run_path, device, adapter=adapter)

        # The default column may be missing, as labels are optional; one that was named may not.
        if label != LABEL["default"]:
            require_column(self.cache, label)
        self.label = label
        self.filters = CacheFilters(
            self.cache, self.card.modality, self.run_path, label=label, timeout_s=filter_timeout_s
        )
        self.hits = HitReader(self.cache, self.card.modality, label=label)

        self._subset = lru_cache(maxsize=8)(self._apply)
        self._words: Words | None = None

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
        match: Match = "vectors",
        progress: Progress | None = None,
    ) -> SearchResults:
        """Search for the items nearest to each query: a list of hits per query, best first.

        `progress` counts the queries if there are thousands. Raises `SettingError` if k is above what the index holds
        and the filter passes, or a query other than a text is to match words, `DataError` if a query cannot be compared
        with the index or the filter passes nothing, and the errors of `QueryEncoder.encode` and `CacheFilters.mask`.
        """
        _check_k(k, self.card.num_vectors, f"the index holds {self.card.num_vectors} items")
        names = queries.names
        texts = queries.texts
        modality = self.card.modality

        # Only texts have words, and the words are loaded before the search so that their progress is shown.
        if match != "vectors":
            if len(texts) < len(names):
                raise SettingError(f"match: expected text queries to match {match}, got others; use --match vectors")
            self.load_words(progress)
        queries_QP = None if match == "words" else self.query_encoder.encode(queries, progress=progress)

        def search_part(part: slice) -> list[list[Hit]]:
            if queries_QP is None:
                return self.search_words(texts[part], k=k, condition=condition)
            fused = texts[part] if match == "both" else None
            return self.search_vectors(queries_QP[part], k=k, condition=condition, texts=fused)

        parts = list(blocks(len(names), _BATCH))
        shown = progress if progress is not None and len(parts) > 1 else NullProgress()
        watched = watch(parts, shown, "searching", len(names), "queries")
        rankings = chain.from_iterable(map(search_part, watched))
        return SearchResults(
            Hits(hits, query=name, cache=self.cache, modality=modality)
            for name, hits in zip(names, rankings, strict=True)
        )

    def search_vectors(
        self,
        queries_QP: Floats,
        *,
        k: int | None = None,
        condition: Filter | None = None,
        texts: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """Search with vectors of the index's space, (Q, P) float32 rows of length 1; as `search` otherwise.

        With the text of each query, its ranking is fused with that of `search_words` by their ranks, up to the 100th of
        each. Hits of equal scores are in the order of their rows.
        Raises `DataError` if they have another shape, or values that are no numbers.
        """
        queries_QP = np.asarray(queries_QP, np.float32)
        if queries_QP.ndim != 2 or queries_QP.shape[1] != self.card.width:
            raise DataError(f"queries: expected (Q, {self.card.width}) vectors for {self.path}, got {queries_QP.shape}")
        if not np.isfinite(queries_QP).all():
            raise DataError(f"queries: expected finite vectors for {self.path}, got NaN or infinite values")

        condition = _NO_FILTER if condition is None else condition
        subset = self._subset(condition)
        k = _choose_k(k, subset.num_items, len(self._index))
        # Below the first k of both rankings may be a row whose summed ranks are among the k best.
        depth = k if texts is None else min(max(k, _FUSED_RANKS), subset.num_items)
        scores_QK, rows_QK = self._search_subset(queries_QP, depth, subset)

        order_QK = np.lexsort((rows_QK, -scores_QK))  # of equal scores, FAISS returns the last row first
        scores_QK = np.take_along_axis(scores_QK, order_QK, axis=1)
        rows_QK = np.take_along_axis(rows_QK, order_QK, axis=1)
        rankings = zip(np.clip(scores_QK, -1, 1), rows_QK, strict=True)  # rounding exceeds 1
        if texts is None:
            return [self.hits.read(scores_K, rows_K, condition.language) for scores_K, rows_K in rankings]

        all_hits = []
        for (scores_K, rows_K), text in zip(rankings, texts, strict=True):
            is_hit_K = rows_K >= 0
            by_words = self._rank_words(text, depth, condition, subset)
            fused = fuse([(scores_K[is_hit_K], rows_K[is_hit_K]), by_words], k)
            all_hits.append(self.hits.read(*fused, condition.language))
        return all_hits

    def search_words(
        self, texts: Sequence[str], *, k: int | None = None, condition: Filter | None = None
    ) -> list[list[Hit]]:
        """Search the captions of the items for words, by BM25; as `search` otherwise. No encoder is needed.

        Hits have at least one word of the query in a caption, so that there may be fewer than k, or none.
        """
        condition = _NO_FILTER if condition is None else condition
        subset = self._subset(condition)
        k = _choose_k(k, subset.num_items, len(self._index))

        all_hits = []
        for text in texts:
            scores, rows = self._rank_words(text, k, condition, subset)
            all_hits.append(self.hits.read(scores[:k], rows[:k], condition.language))
        return all_hits

    def load_words(self, progress: Progress | None = None) -> Words:
        """Read the words of the captions once, or count and store them; see `open_words`."""
        if self._words is None:
            self._words = open_words(self.path, self.cache, progress)
        return self._words

    def _rank_words(self, text: str, depth: int, condition: Filter, subset: "_Subset") -> tuple[Floats, Ints]:
        """Return the BM25 scores, best first, of the items of the first ranks, ties included, and their rows."""
        scores_C = self.load_words().scores(text)
        scores_N = self.filters.best_captions(scores_C, condition.language)

        rows = self._index.rows
        rows = rows[scores_N[rows] > 0]
        if subset.is_allowed_N is not None:
            rows = rows[subset.is_allowed_N[rows]]

        # Items of equal scores are in the order of their rows, and a tie with the last rank is not cut.
        rows = rows[np.lexsort((rows, -scores_N[rows]))]
        scores = scores_N[rows]
        if len(rows) > depth:
            rows = rows[scores >= scores[depth - 1]]
        return scores[: len(rows)], rows

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
        # If all items pass the filter, the search needs no mask.
        is_passing_N = is_allowed_N[self._index.rows]
        num_items = int(is_passing_N.sum())
        if num_items == len(self._index):
            return _Subset(is_allowed_N=None, num_items=num_items, vectors=None)

        vectors = None
        if not self._index.is_exact and 0 < num_items <= _COMPARE_ALL:
            rows = np.sort(self._index.rows[is_passing_N])
            vectors = (rows, self.query_encoder.indexed.read(rows))
        return _Subset(is_allowed_N=is_allowed_N, num_items=num_items, vectors=vectors)

    def _search_subset(self, queries_QP: Floats, k: int, subset: "_Subset") -> tuple[Floats, Ints]:
        """Search the items that pass a filter: exactly if they are few, and more thoroughly the fewer they are."""
        if subset.vectors is not None:
            rows_QK, scores_QK = knn_of_blocks(queries_QP, [subset.vectors], k, products=products_on(self.device))
            return scores_QK, rows_QK

        # The smaller the part that passes, the more of the index is visited to find as many that do.
        fraction = subset.num_items / len(self._index)
        parameters = {name: round(value / fraction) for name, value in self.card.search.items()}
        is_allowed_N = subset.is_allowed_N
        scores_QK, rows_QK = self._index.search(queries_QP, k, parameters, is_allowed_N=is_allowed_N)
        if (rows_QK >= 0).all():
            return scores_QK, rows_QK

        # A row of -1 is a missing neighbor. An exhaustive search finds it.
        parameters |= {"nprobe": self._index.num_lists, "efSearch": len(self._index)}  # all of the index
        return self._index.search(queries_QP, k, parameters, is_allowed_N=is_allowed_N)


class CacheFilters:
    """Applies filters to the items of a cache; the columns they need are read on first use and kept.

    The split of the run at `run_path` is used if the samples have no column `split`. Labels are in the column `label`.
    A condition is computed for `timeout_s` seconds at most.
    """

    def __init__(
        self,
        cache: Cache,
        modality: str,
        run_path: Path | None = None,
        *,
        label: str = "label",
        timeout_s: float | None = None,
    ) -> None:
        self._cache = cache
        self._modality = modality
        self._label = label
        self._timeout_s = timeout_s
        self._run_path = run_path if run_path is not None and (run_path / SPLIT).is_file() else None
        self._column = lru_cache(maxsize=None)(self._read_column)
        self._selected = lru_cache(maxsize=16)(self._read_selection)

    def mask(self, condition: Filter) -> Bools:
        """Return for each item of the modality whether it passes a filter: (N,) bool.

        Raises `UnknownNameError` if the cache has no such column, label, part or language, and `SettingError` for a
        condition that cannot be computed.
        """
        mask_N = np.ones(self._cache.num_rows(self._modality), bool)
        if condition.where is not None:
            mask_N &= self._passing(condition.where)[self._samples]
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

        # An item may have captions in several languages, so it counts for each of them.
        if name == "language":
            return {value: int(self._has_language([value])[rows].sum()) for value in sorted(column.names)}

        # A missing value has code -1: it is counted first, and left out.
        counts = np.bincount(column.codes[self._samples[rows]] + 1, minlength=len(column.names) + 1)[1:]
        return dict(sorted(zip(column.names, counts.tolist(), strict=True)))

    def best_captions(self, scores_C: Floats, languages: Sequence[str]) -> Floats:
        """Return the best score of the captions of each item, in some languages (empty: all): (N,)."""
        if languages:
            scores_C = np.where(self._has_value("language", languages), scores_C, 0)
        if self._modality == "text":
            return scores_C

        captions = np.flatnonzero(scores_C)
        scores_S = np.zeros(self._cache.info.num_samples, np.float32)
        np.maximum.at(scores_S, self._caption_samples[captions], scores_C[captions])
        return scores_S[self._samples]

    @cached_property
    def _caption_samples(self) -> Ints:
        samples_C: Ints = self._cache.items("text", columns=["sample"])["sample"].to_numpy()
        return samples_C

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
        is_in_language_C = self._has_value("language", languages)
        if self._modality == "text":
            return is_in_language_C
        is_in_language_S = np.zeros(self._cache.info.num_samples, bool)
        is_in_language_S[self._caption_samples[is_in_language_C]] = True
        return is_in_language_S[self._samples]

    def _read_column(self, name: str) -> "_Column":
        """Read `language` of texts, or a column of the samples."""
        if name == "language" and "text" in self._cache.info.num_items:
            return _encode(self._cache.items("text", columns=["language"])["language"])

        # The cache's own column takes precedence over the split of the run.
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

    def _passing(self, where: str) -> Bools:
        is_passing = np.zeros(self._cache.info.num_samples, bool)
        is_passing[rows_where([self._cache], where, timeout_s=self._timeout_s)] = True
        return is_passing

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


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column as numbers: `names[code]` is the value as text, -1 stands for a missing one."""

    names: list[str]
    codes: Array


def _encode(values: pa.ChunkedArray) -> _Column:
    uniques = pc.unique(values).drop_null()
    texts = [label_text(value) for value in uniques.to_pylist()]

    # Values of the same text share a code.
    code_of = {text: code for code, text in enumerate(dict.fromkeys(filter(None, texts)))}
    code_F = np.array([*(code_of.get(text or "", -1) for text in texts), -1], np.int64)  # the last is that of null
    positions = pc.fill_null(pc.index_in(values, value_set=uniques), -1).to_numpy()
    return _Column(names=list(code_of), codes=code_F[positions])
