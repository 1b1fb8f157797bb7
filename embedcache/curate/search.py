"""Asking an index with texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Floats, Inputs, Ints, normalize
from embedcache.cache.cache import Cache
from embedcache.cache.side import inputs_of
from embedcache.curate import faiss_index
from embedcache.curate.index import IndexCard, read_card
from embedcache.encoders.open import feature_names, open_again
from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.paths import is_url
from embedcache.projectors.saved import load_pair, project

_USUAL_HITS = 10
_MOST_CAPTIONS = 3


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One item that an index found.

    Args:
        score: cosine to the query.
        row: of the item in its modality's table.
        key: of its sample.
        captions: of an image, its sample's, at most three; of a caption, itself.
    """

    score: float
    row: int
    key: str
    captions: Sequence[str]


def search(
    index_path: Path | str,
    queries: Sequence[str],
    *,
    k: int | None = None,
    run_path: Path | str | None = None,
    cache_path: Path | str | None = None,
    device: str = "cpu",
) -> list[list[Hit]]:
    """Find the items that fit each query best.

    Args:
        index_path: what `build_index` made.
        queries: texts.
        k: how many hits a query; None is 10, or all where there are fewer.
        run_path: where the run that projected the index is now, if it has moved away from the index.
        cache_path: where the cache is now, alike.
        device: where the text encoder runs.

    Returns:
        A list of hits for each query, best first.

    Raises:
        SettingError: no query, or k below 1.
        DataError: an empty query, k beyond the size of the index, or an index that no text can be compared with.
        FingerprintError: the run, the encoder or the cache is not the one that the index was made from.
    """
    index_path = Path(index_path)
    card = read_card(index_path)
    k = min(_USUAL_HITS, card.num_vectors) if k is None else k
    _check_queries(queries, k, card)
    if run_path is None and card.run is not None:
        run_path = index_path / card.run
    if cache_path is None:
        cache_path = card.cache if is_url(card.cache) else index_path / card.cache
    answers = _Answers(_open_cache(cache_path, card), card.modality)
    vectors = _embed(queries, card, run_path, device)
    index = faiss_index.read_index(index_path / "index.faiss")
    scores, rows = faiss_index.search(index, vectors, k)
    return [answers.hits(score_K, row_K) for score_K, row_K in zip(scores, rows, strict=True)]


def _check_queries(queries: Sequence[str], k: int, card: IndexCard) -> None:
    if not queries:
        raise SettingError("no query; give at least one text")
    if any(not query.strip() for query in queries):
        raise DataError("a query is empty; give some words")
    if not 1 <= k <= card.num_vectors:
        raise SettingError(f"k is {k}; the index holds {card.num_vectors} items, so k must be 1 to {card.num_vectors}")


def _open_cache(path: Path | str, card: IndexCard) -> Cache:
    cache = Cache(path)
    if not cache.info.has_rows_of(card.spine):
        raise FingerprintError(f"the index was made from other samples than {path} holds; build it again")
    return cache


def _embed(queries: Sequence[str], card: IndexCard, run_path: Path | str | None, device: str) -> Floats:
    if card.run is None or run_path is None:
        if run_path is not None:
            raise FingerprintError(
                f"the index was made from the plain feature {card.feature}, not from run {run_path}; leave --run out"
            )
        if card.modality != "text":
            raise DataError(
                f"the index holds the plain image feature {card.feature}, which no text can be compared with; "
                "build one with: embedcache curate index CACHE INDEX --projected RUN"
            )
        return normalize(encode_texts(queries, card.feature, card.spec, card.fingerprint, device).values)
    pair, config = load_pair(Path(run_path))
    if config.weights != card.run_weights:
        raise FingerprintError(
            f"the index was made from another run than {run_path}: "
            f"weights {card.run_weights} there, {config.weights} here; "
            "build the index again with: embedcache curate index CACHE INDEX --projected RUN"
        )
    side = config.text
    return project(pair.text, encode_texts(queries, side.feature, side.spec, side.fingerprint, device))


def encode_texts(
    texts: Sequence[str],
    feature: str,
    spec: str,
    fingerprint: Mapping[str, Any],
    device: str = "cpu",
) -> Inputs:
    """Encode texts with the very encoder that made a cached feature: Q items, float32, not normalised.

    Args:
        texts: what to encode.
        feature: `encoder/feature`, or several with `+` between.
        spec: what opens the encoder.
        fingerprint: what the encoder must be.
        device: where it runs.

    Raises:
        FingerprintError: the encoder that opens now is another.
    """
    encoder = open_again(spec, modality="text", feature=feature, fingerprint=fingerprint, device=device)
    names = feature_names(feature)
    encoded = encoder.encode(encoder.prepare(list(texts)), names)
    return inputs_of([encoded[name] for name in names])


class _Answers:
    """Turns rows into hits; reads each table of the cache once."""

    def __init__(self, cache: Cache, modality: str) -> None:
        self._modality = modality
        self._keys = cache.samples["key"]
        self._samples = cache.items(modality)["sample"].to_numpy()
        self._texts = cache.items("text") if "text" in cache.info.num_items else None

    def hits(self, scores_K: Floats, rows_K: Ints) -> list[Hit]:
        pairs = zip(scores_K.tolist(), rows_K.tolist(), strict=True)
        return [self._hit(score, row) for score, row in pairs if row >= 0]

    def _hit(self, score: float, row: int) -> Hit:
        sample = int(self._samples[row])
        captions = self._captions(row, sample)[:_MOST_CAPTIONS]
        return Hit(score=score, row=row, key=self._keys[sample].as_py(), captions=captions)

    def _captions(self, row: int, sample: int) -> list[str]:
        if self._texts is None:
            return []
        if self._modality == "text":
            return [self._texts["text"][row].as_py()]
        start, stop = np.searchsorted(self._texts["sample"].to_numpy(), [sample, sample + 1])
        captions: list[str] = self._texts["text"][start:stop].to_pylist()
        return captions
