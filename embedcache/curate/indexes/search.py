"""Asking an index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints
from embedcache.cache.cache import Cache
from embedcache.curate.indexes.faiss_index import RowIndex, exact_search, read_index
from embedcache.curate.indexes.filters import Filter, kept_samples
from embedcache.curate.indexes.index import IndexCard, read_card
from embedcache.curate.indexes.queries import Asker, Queries
from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.paths import is_url

_USUAL_HITS = 10
_MOST_CAPTIONS = 3
_FEW = 20_000
"""Of so many items that a filter keeps, each is compared: it is quick, and a graph or lists would miss most."""


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


def search(
    index_path: Path | str,
    queries: Sequence[str] | Queries,
    *,
    k: int | None = None,
    keep: Filter | None = None,
    run_path: Path | str | None = None,
    cache_path: Path | str | None = None,
    device: str = "cpu",
) -> list[list[Hit]]:
    """Find the items that fit each query best.

    An index larger than half of the machine's memory is searched where it lies.

    Args:
        index_path: what `build_index` made.
        queries: texts, or all kinds of queries.
        k: how many hits a query; None is 10, or all where there are fewer.
        keep: which samples may be found; None is all.
        run_path: where the run that projected the index is now, if it has moved away from the index.
        cache_path: where the cache is now, alike.
        device: where encoders run.

    Returns:
        A list of hits for each query, best first.

    Raises:
        SettingError: no query, or k below 1 or beyond what the index holds and the filter keeps.
        DataError: an empty query, an index that such a query cannot be compared with, or a filter that keeps nothing.
        UnknownNameError: a label, split, key or concept that is not there.
        FingerprintError: the run, the encoder or the cache is not the one that the index was made from.
    """
    index_path, keep = Path(index_path), keep or Filter()
    card = read_card(index_path)
    if not isinstance(queries, Queries):
        queries = Queries(texts=queries)
    _check_k(k, card.num_vectors, f"the index holds {card.num_vectors} items")
    if run_path is None and card.run is not None:
        run_path = index_path / card.run
    if cache_path is None:
        cache_path = card.cache if is_url(card.cache) else index_path / card.cache
    cache = _open_cache(cache_path, card)
    answers = _Answers(cache, card.modality)
    asker = Asker(card, cache, None if run_path is None else Path(run_path), device)
    vectors = asker.vectors(queries)
    index = read_index(index_path / "index.faiss")
    kept_N = kept_samples(cache, keep)[answers.samples[index.rows]] if keep else np.ones(len(index), bool)
    scores, rows = _find(index, vectors, _choose_k(k, kept_N), card.search, kept_N, asker)
    return [answers.hits(score_K, row_K) for score_K, row_K in zip(scores, rows, strict=True)]


def _check_k(k: int | None, most: int, why: str) -> None:
    if k is not None and not 1 <= k <= most:
        raise SettingError(f"k is {k}; {why}, so k must be 1 to {most}")


def _choose_k(k: int | None, kept_N: Bools) -> int:
    num_kept = int(kept_N.sum())
    if not num_kept:
        raise DataError(f"the filter keeps none of the {len(kept_N)} items of the index; ask for less")
    _check_k(k, num_kept, f"the filter keeps {num_kept} of {len(kept_N)} items")
    return min(_USUAL_HITS, num_kept) if k is None else k


def _find(
    index: RowIndex, queries_QP: Floats, k: int, effort: Mapping[str, int], kept_N: Bools, asker: Asker
) -> tuple[Floats, Ints]:
    """Search among what is kept: all of it where that is little, and longer the less of an index it is."""
    if kept_N.all():
        return _thoroughly_if_short(index, queries_QP, k, effort, None)
    if not index.is_exact and kept_N.sum() <= _FEW:
        rows = np.sort(index.rows[kept_N])
        return exact_search(queries_QP, [(rows, asker.indexed.read(rows))], k)
    share = kept_N.mean()
    longer = {name: value if name == "k_factor" else round(value / share) for name, value in effort.items()}
    return _thoroughly_if_short(index, queries_QP, k, longer, kept_N)


def _thoroughly_if_short(
    index: RowIndex, queries_QP: Floats, k: int, effort: Mapping[str, int], kept_N: Bools | None
) -> tuple[Floats, Ints]:
    """Search again, everywhere, where a query found fewer than k."""
    found = index.search(queries_QP, k, effort, kept_N=kept_N)
    if (found[1] >= 0).all():
        return found
    everywhere = {"nprobe": max(1, index.num_lists), "efSearch": len(index), "k_factor": effort.get("k_factor", 1)}
    return index.search(queries_QP, k, everywhere, kept_N=kept_N)


def _open_cache(path: Path | str, card: IndexCard) -> Cache:
    cache = Cache(path)
    if not cache.info.has_rows_of(card.spine):
        raise FingerprintError(f"the index was made from other samples than {path} holds; build it again")
    return cache


class _Answers:
    """Turns rows into hits; reads each table of the cache once."""

    def __init__(self, cache: Cache, modality: str) -> None:
        self._modality = modality
        self._keys = cache.samples["key"]
        self._labels = cache.samples["label"] if "label" in cache.columns else None
        self.samples = cache.items(modality)["sample"].to_numpy()
        self._texts = cache.items("text") if "text" in cache.info.num_items else None

    def hits(self, scores_K: Floats, rows_K: Ints) -> list[Hit]:
        pairs = zip(scores_K.tolist(), rows_K.tolist(), strict=True)
        return [self._hit(score, row) for score, row in pairs if row >= 0]

    def _hit(self, score: float, row: int) -> Hit:
        sample = int(self.samples[row])
        captions = self._captions(row, sample)[:_MOST_CAPTIONS]
        label = None if self._labels is None else self._labels[sample].as_py()
        key = self._keys[sample].as_py()
        return Hit(score=score, row=row, key=key, captions=captions, label=None if label is None else str(label))

    @cached_property
    def _text_samples(self) -> Array:
        assert self._texts is not None
        samples: Array = self._texts["sample"].to_numpy()
        return samples

    def _captions(self, row: int, sample: int) -> list[str]:
        if self._texts is None:
            return []
        if self._modality == "text":
            return [self._texts["text"][row].as_py()]
        start, stop = np.searchsorted(self._text_samples, [sample, sample + 1])
        captions: list[str] = self._texts["text"][start:stop].to_pylist()
        return captions
