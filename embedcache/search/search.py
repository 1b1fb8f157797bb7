"""Asking an index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Bools, Floats, Ints, concatenated_ranges
from embedcache.errors import DataError, FingerprintError, PathError, SettingError
from embedcache.files import is_url
from embedcache.search.faiss_index import exact_search, read_index
from embedcache.search.filters import CacheFilters, Filter
from embedcache.search.index import IndexCard, read_card
from embedcache.search.queries import Queries, QueryEncoder
from embedcache.store.cache import Cache
from embedcache.store.tables import ITEM_SCHEMAS

_USUAL_HITS = 10
_KEPT_FILTERS = 8
_FEW = 20_000
"""Of so many items that a filter keeps, each is compared: it is quick, and a graph or lists would miss most."""


def search(
    index_path: Path | str,
    queries: Sequence[str] | Queries,
    *,
    k: int | None = None,
    keep: Filter | None = None,
    run_path: Path | str | None = None,
    cache_path: Path | str | None = None,
    device: str = "cpu",
) -> list[list["Hit"]]:
    """Open an index, and find the items that fit each query best: see `OpenIndex`, which answers more than once.

    Args:
        index_path: what `build_index` made.
        queries: texts, or all kinds of queries.
        k: how many hits a query; None is 10, or all where there are fewer.
        keep: which items may be found; None is all.
        run_path: where the run that projected the index is now, if it has moved away from the index.
        cache_path: where the cache is now, alike.
        device: where encoders run.

    Returns:
        A list of hits for each query, best first.
    """
    if not isinstance(queries, Queries):
        queries = Queries(texts=queries)
    index = OpenIndex(index_path, run_path=run_path, cache_path=cache_path, device=device)
    return index.search(queries, k=k, keep=keep)


class OpenIndex:
    """An index that is opened once and asked many times, by one thread.

    Encoders are opened when first needed. An index larger than half of the machine's memory is searched where it lies.
    Memory: the index, the cache's keys and captions, and for each of the 8 filters that were used last a byte a vector
    and the vectors that are kept, where they are few.

    Args:
        index_path: what `build_index` made.
        run_path: where the run that projected the index is now, if it has moved away from the index.
        cache_path: where the cache is now, alike.
        device: where encoders run.

    Raises:
        PathError: the index, its run or its cache is not there.
        FingerprintError: the run or the cache is not the one that the index was made from.
        CorruptError: FAISS cannot read the index.
    """

    def __init__(
        self,
        index_path: Path | str,
        *,
        run_path: Path | str | None = None,
        cache_path: Path | str | None = None,
        device: str = "cpu",
    ) -> None:
        self.path = Path(index_path)
        self.card = read_card(self.path)
        if run_path is None and self.card.run is not None:
            run_path = _not_moved(self.path / self.card.run, "config.json", "run")
        if cache_path is None and is_url(self.card.cache):
            cache_path = self.card.cache
        elif cache_path is None:
            cache_path = _not_moved(self.path / self.card.cache, "cache.json", "cache")
        self.cache = _open_cache(cache_path, self.card)
        self.run_path = None if run_path is None else Path(run_path)
        self.query_encoder = QueryEncoder(self.card, self.cache, self.run_path, device)
        self.filters = CacheFilters(self.cache, self.card.modality, self.run_path)
        self.hits = HitReader(self.cache, self.card.modality)
        self._index = read_index(self.path / "index.faiss")
        self._kept = lru_cache(maxsize=_KEPT_FILTERS)(self._keep)

    def search(self, queries: Queries, *, k: int | None = None, keep: Filter | None = None) -> list[list["Hit"]]:
        """Find the items that fit each query best.

        Args:
            queries: what to ask for.
            k: how many hits a query; None is 10, or all where there are fewer.
            keep: which items may be found; None is all.

        Returns:
            A list of hits for each query, best first.

        Raises:
            SettingError: k below 1 or beyond what the index holds and the filter keeps.
            DataError: a query that the index cannot be compared with, or a filter that keeps nothing.
            UnknownNameError: a label, split, language, key, row or concept that is not there.
            FingerprintError: the encoder that opens now is not the one that made the index.
        """
        _check_k(k, self.card.num_vectors, f"the index holds {self.card.num_vectors} items")
        return self.find(self.query_encoder.vectors(queries), k=k, keep=keep)

    def find(self, queries_QP: Floats, *, k: int | None = None, keep: Filter | None = None) -> list[list["Hit"]]:
        """Do as `search`, for vectors of the index's space: (Q, P) float32, rows of length 1."""
        keep = keep or Filter()
        kept = self._kept(keep.key)
        scores_QK, rows_QK = self._find(queries_QP, _choose_k(k, kept.num, len(self._index)), kept)
        return [
            self.hits.of(scores_K, rows_K, keep.languages) for scores_K, rows_K in zip(scores_QK, rows_QK, strict=True)
        ]

    def num_kept(self, keep: Filter) -> int:
        """Count the items that a filter keeps."""
        return self._kept(keep.key).num

    def _keep(self, key: tuple[Sequence[str], Sequence[str], Sequence[str], Path | None]) -> "_Kept":
        """Find what a filter keeps, and read the vectors of little: most of an index would be searched in vain."""
        labels, splits, languages, selection = key
        keep = Filter(labels=labels, splits=splits, languages=languages, selection=selection)
        if not keep:
            return _Kept(is_kept_N=None, num=len(self._index), few=None)
        is_kept_N = self.filters.kept(keep)[self._index.rows]
        num = int(is_kept_N.sum())
        if num == len(self._index):
            return _Kept(is_kept_N=None, num=num, few=None)
        few = None
        if not self._index.is_exact and 0 < num <= _FEW:
            rows = np.sort(self._index.rows[is_kept_N])
            few = rows, self.query_encoder.indexed.read(rows)
        return _Kept(is_kept_N=is_kept_N, num=num, few=few)

    def _find(self, queries_QP: Floats, k: int, kept: "_Kept") -> tuple[Floats, Ints]:
        """Search among what is kept: all of it where that is little, and longer the less of an index it is."""
        if kept.few is not None:
            return exact_search(queries_QP, [kept.few], k)
        share = kept.num / len(self._index)
        effort = {
            name: value if name == "k_factor" else round(value / share) for name, value in self.card.search.items()
        }
        return self._thoroughly_if_short(queries_QP, k, effort, kept.is_kept_N)

    def _thoroughly_if_short(
        self, queries_QP: Floats, k: int, effort: Mapping[str, int], kept_N: Bools | None
    ) -> tuple[Floats, Ints]:
        """Search again, everywhere, where a query found fewer than k."""
        index = self._index
        found = index.search(queries_QP, k, effort, kept_N=kept_N)
        if (found[1] >= 0).all():
            return found
        everywhere = {"nprobe": max(1, index.num_lists), "efSearch": len(index), "k_factor": effort.get("k_factor", 1)}
        return index.search(queries_QP, k, everywhere, kept_N=kept_N)


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a filter keeps of an index.

    Args:
        is_kept_N: which vectors, in the order of its rows; None is all.
        num: how many.
        few: their rows and vectors, where each shall be compared.
    """

    is_kept_N: Bools | None
    num: int
    few: tuple[Ints, Floats] | None


def _check_k(k: int | None, most: int, why: str) -> None:
    if k is not None and not 1 <= k <= most:
        raise SettingError(f"k is {k}; {why}, so k must be 1 to {most}")


def _choose_k(k: int | None, num_kept: int, num: int) -> int:
    if not num_kept:
        raise DataError(f"the filter keeps none of the {num} items of the index; ask for less")
    _check_k(k, num_kept, f"the filter keeps {num_kept} of {num} items")
    return min(_USUAL_HITS, num_kept) if k is None else k


def _not_moved(path: Path, sign: str, what: str) -> Path:
    if not (path / sign).is_file():
        raise PathError(f"{what} {path}, which the index was made from, does not exist; if it has moved, give --{what}")
    return path


def _open_cache(path: Path | str, card: IndexCard) -> Cache:
    cache = Cache(path)
    if not cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(f"the index was made from other samples than {path} holds; build it again")
    return cache


_MOST_CAPTIONS = 3


_NO_TEXTS = ITEM_SCHEMAS["text"].empty_table()


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One item that an index found.

    Args:
        score: cosine to the query; of an index of codes, its estimate.
        row: of the item in its modality's table.
        key: of its sample.
        captions: of an image, its sample's, at most three; of a caption, itself.
        label: of its sample, where the cache has the column.
    """

    score: float
    row: int
    key: str
    captions: Sequence[str]
    label: str | None = None


class HitReader:
    """Turns rows into hits. Keys, labels and captions are read once and looked up by row: they are kept in memory.

    Args:
        cache: the cache.
        modality: `image` or `text`, of the rows.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self._modality = modality
        self._keys = _whole(cache.samples["key"])
        self._labels = _whole(cache.samples["label"]) if "label" in cache.columns else None
        self.samples: Ints = cache.items(modality)["sample"].to_numpy()
        texts = cache.items("text") if "text" in cache.info.num_items else _NO_TEXTS
        self._texts, self._languages = _whole(texts["text"]), _whole(texts["language"])
        self._text_samples: Ints = texts["sample"].to_numpy()

    def of(self, scores_K: Floats, rows_K: Ints, languages: Sequence[str] = ()) -> list[Hit]:
        """Give the hits of one query; a row of -1 is none.

        Args:
            scores_K: (K,) best first.
            rows_K: (K,) alike.
            languages: show captions in these only; none is all.
        """
        scores, rows = scores_K[rows_K >= 0].tolist(), rows_K[rows_K >= 0]
        samples = self.samples[rows]
        labels = [None] * len(rows) if self._labels is None else _taken(self._labels, samples)
        captions = self._captions(rows, None if languages else _MOST_CAPTIONS)
        return [
            Hit(
                score=score,
                row=row,
                key=key,
                captions=[text for text, language in said if not languages or language in languages][:_MOST_CAPTIONS],
                label=None if label is None else str(label),
            )
            for score, row, key, label, said in zip(
                scores, rows.tolist(), _taken(self._keys, samples), labels, captions, strict=True
            )
        ]

    def captions(self, row: int) -> list[dict[str, str | None]]:
        """Give the captions of the sample of an image, or a caption itself: `text` and `language` of each."""
        (said,) = self._captions(np.array([row]), None)
        return [{"text": text, "language": language} for text, language in said]

    def _captions(self, rows_K: Ints, most: int | None) -> list[list[tuple[str, str | None]]]:
        """Give text and language of the captions of each item, or of the first of them."""
        if self._modality == "text":
            starts, counts = rows_K, np.ones(len(rows_K), np.int64)
        else:
            samples = self.samples[rows_K]
            starts = np.searchsorted(self._text_samples, samples)
            counts = np.searchsorted(self._text_samples, samples + 1) - starts
        counts = counts if most is None else np.minimum(counts, most)
        _, places = concatenated_ranges(starts, counts)
        said = list(zip(_taken(self._texts, places), _taken(self._languages, places), strict=True))
        ends = np.cumsum(counts).tolist()
        return [said[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """Join a column's chunks, so that a row is found without looking for its chunk; text may pass 2 GiB."""
    return (column.cast(pa.large_string()) if pa.types.is_string(column.type) else column).combine_chunks()


def _taken(column: pa.Array, places: Ints) -> list[Any]:
    values: list[Any] = column.take(pa.array(places)).to_pylist()
    return values
