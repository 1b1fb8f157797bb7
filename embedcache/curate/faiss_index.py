"""FAISS behind one door: build an index from streamed vectors, search it, measure it."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.disk import replacing
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.registry import require

_ROUNDING = 1e-5  # two ways of summing one cosine in float32
FLAT_LIMIT = 200_000
"""Up to this many vectors the default index is exact: a query takes tens of milliseconds on one core."""


def choose_factory(num_vectors: int) -> str:
    """Choose a FAISS factory string: exact where that is quick, else a graph."""
    return "Flat" if num_vectors <= FLAT_LIMIT else "HNSW32"


def build(factory: str, width: int, training_NP: Floats, blocks: Iterable[tuple[Ints, Floats]]) -> Any:
    """Build an inner-product index whose ids are our rows.

    Args:
        factory: a FAISS factory string.
        width: P.
        training_NP: vectors to train on, for the kinds that train.
        blocks: rows (B,) and their vectors (B, P) of length 1.

    Raises:
        SettingError: FAISS does not know the factory string, or cannot train it on this little.
    """
    faiss = import_faiss()
    try:
        index = faiss.IndexIDMap2(faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT))
        if not index.is_trained:
            index.train(training_NP)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise SettingError(
            f"FAISS cannot make an index {factory!r} of width {width}: {reason}; try --factory Flat"
        ) from error
    for rows, vectors_BP in blocks:
        index.add_with_ids(np.ascontiguousarray(vectors_BP), rows)
    return index


def search(index: Any, queries_QP: Floats, k: int) -> tuple[Floats, Ints]:
    """Get the k best rows of each query, best first: scores (Q, K) float32, rows (Q, K) int64 (-1: none left)."""
    scores, rows = index.search(np.ascontiguousarray(queries_QP), k)
    return scores, rows


def exact_search(queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], k: int) -> Floats:
    """Get the true k best scores of each query, best first, by going through all vectors: (Q, K) float32."""
    scores = np.empty((len(queries_QP), 0), np.float32)
    for _, vectors_BP in blocks:
        scores = np.concatenate([scores, queries_QP @ vectors_BP.T], axis=1)
        scores = -np.sort(-scores, axis=1)[:, :k]
    return scores


def recall_against(exact_QK: Floats, found_QK: Floats) -> float:
    """Share of the k found that score no less than the true k-th best, 0 to 1: which of equals is found is all one."""
    return float(np.mean(found_QK >= exact_QK[:, -1:] - _ROUNDING))


def latency_ms(index: Any, queries_QP: Floats, k: int) -> float:
    """Median milliseconds of single queries."""
    seconds = []
    search(index, queries_QP[:1], k)  # the first one starts threads
    for query in queries_QP:
        started = time.perf_counter()
        search(index, query[None], k)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def write_index(path: Path, index: Any) -> None:
    """Write an index, whole or not at all."""
    with replacing(path) as temporary:
        import_faiss().write_index(index, str(temporary))


def read_index(path: Path) -> Any:
    """Read an index.

    Raises:
        PathError: there is none.
        CorruptError: FAISS cannot read it.
    """
    if not path.is_file():
        raise PathError(f"{path} does not exist; make an index with: embedcache curate index CACHE {path.parent}")
    try:
        return import_faiss().read_index(str(path))
    except RuntimeError as error:
        raise CorruptError(f"{path} is no FAISS index: {str(error).splitlines()[-1]}") from error


def import_faiss() -> Any:
    """Import faiss.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require("faiss", extra="cpu")
