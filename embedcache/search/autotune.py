"""Index selection: candidate configurations and their memory, measured recall, and search parameters that reach it."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.dataset.vectors import Vectors
from embedcache.errors import SettingError
from embedcache.neighbors.knn import knn_of_blocks
from embedcache.processes import AUTO, products_on
from embedcache.progress import NullProgress, Progress
from embedcache.search.faiss_index import RowIndex

_FLAT_LIMIT = 200_000  # up to this many vectors, an exact query takes tens of milliseconds on one core
_ID_BYTES = 8
_LINK_BYTES = 272  # HNSW32: 64 neighbors of 4 bytes on the lowest level, about 2 above, and 12 bytes of bookkeeping
_LIST_BYTES = 24  # where a list on disk is in its file
_MANY_LISTS = 2**14  # from here on a graph over the centroids is faster than comparing with all of them
_POINTS_PER_LIST = 39  # with fewer, FAISS warns that k-means has too few training vectors


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A kind of index for a given number of vectors."""

    factory: str
    memory_bytes: int  # of the finished index by formula
    is_on_disk: bool = False  # the inverted lists are a file, which does not count as memory


def in_memory_configurations(num_vectors: int, width: int) -> list[Configuration]:
    """Return candidates in the order to try: exact if that is fast, a graph, then ever smaller codes in lists."""
    exact = Configuration(factory="Flat", memory_bytes=num_vectors * (4 * width + _ID_BYTES))
    graph = Configuration(factory="HNSW32", memory_bytes=num_vectors * (4 * width + _LINK_BYTES + _ID_BYTES))
    coarse, coarse_bytes = _coarse_quantizer(num_vectors, width)
    candidates = [exact, graph] if num_vectors <= _FLAT_LIMIT else [graph]
    codes = [("SQfp16", 2 * width, 0), ("SQ8", width, 8 * width), ("SQ6", width * 6 / 8, 8 * width)]
    if width % 4 == 0 and num_vectors >= 256 * _POINTS_PER_LIST:
        codes.append((f"PQ{width // 4}", width / 4, 4 * 256 * width))
    for code, vector_bytes, table_bytes in codes:
        size = round(num_vectors * (vector_bytes + 2 * _ID_BYTES)) + coarse_bytes + table_bytes
        candidates.append(Configuration(factory=f"{coarse},{code}", memory_bytes=size))
    return candidates


def on_disk_configurations(num_vectors: int, width: int) -> list[Configuration]:
    """Return the one candidate whose vectors stay on disk, as float16; centroids and rows (twice) are in memory."""
    coarse, coarse_bytes = _coarse_quantizer(num_vectors, width)
    size = num_vectors * 2 * _ID_BYTES + coarse_bytes + num_lists(num_vectors) * _LIST_BYTES
    return [Configuration(factory=f"{coarse},SQfp16", memory_bytes=size, is_on_disk=True)]


def fit_memory(candidates: Sequence[Configuration], memory_bytes: int | None) -> list[Configuration]:
    """Return the candidates that fit a memory; the `SettingError` names the smallest if none fits."""
    fitting = [candidate for candidate in candidates if memory_bytes is None or candidate.memory_bytes <= memory_bytes]
    if not fitting:
        smallest = min(candidates, key=lambda candidate: candidate.memory_bytes)
        needed_kb = math.ceil(smallest.memory_bytes / 1024)
        alternative = "" if smallest.is_on_disk else ", or leave the vectors on disk with --on-disk"
        raise SettingError(
            f"memory: expected at least {smallest.memory_bytes:,} bytes, which the smallest index of these vectors, "
            f"{smallest.factory}, takes, got {memory_bytes:,}: give --memory {needed_kb}K or more{alternative}"
        )
    return fitting


def num_lists(num_vectors: int) -> int:
    """Return the number of inverted lists for N vectors: the power of two nearest to 2 √N, with enough vectors each."""
    power = round(math.log2(2 * math.sqrt(num_vectors)))
    return int(max(1, min(2**power, num_vectors // _POINTS_PER_LIST)))


def _coarse_quantizer(num_vectors: int, width: int) -> tuple[str, int]:
    """Return the part of the factory string that finds lists, and the bytes of its centroids."""
    lists = num_lists(num_vectors)
    if lists < _MANY_LISTS:
        return f"IVF{lists}", lists * 4 * width
    return f"IVF{lists}_HNSW32", lists * (4 * width + _LINK_BYTES)


_K = 10
_NUM_QUERIES = 2000
_NUM_TIMED = 200
_NUM_TRUE = 100  # stored of the true ranking, so that results that tie with the k-th count as found too
_ROUNDING = 1e-5  # two ways of summing one cosine in float32
_PLATEAU = 0.002
_MAX_EF_SEARCH = 1024


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """Q queries with their T true nearest neighbors, best first."""

    vectors: Floats  # (Q, P) rows of length 1
    own: Ints | None  # (Q,) the row that each query itself is, which is no neighbor; None: of another modality
    scores: Floats  # (Q, T)
    rows: Ints  # (Q, T)

    @property
    def k(self) -> int:
        """Number of neighbors that count: 10, or all if there are fewer."""
        return min(_K, int(self.rows.shape[1]))

    def half(self, odd: int) -> "QuerySet":
        """Return every other query: the even ones (0) tune, the odd ones (1) measure."""
        part = slice(odd, None, 2) if len(self.vectors) > 1 else slice(None)
        own = None if self.own is None else self.own[part]
        return QuerySet(vectors=self.vectors[part], own=own, scores=self.scores[part], rows=self.rows[part])

    def search(self, index: RowIndex, parameters: Mapping[str, int]) -> Ints:
        """Search an index with all queries: rows (Q, K)."""
        if self.own is None:
            return index.search(self.vectors, self.k, parameters)[1]
        return drop_own(index.search(self.vectors, self.k + 1, parameters)[1], self.own)

    def recall(self, found_QK: Ints, k: int) -> float:
        """Return the fraction of the first k results that score no less than the true k-th; ties count as found."""
        is_near = self.scores >= self.scores[:, k - 1 : k] - _ROUNDING
        near_QT = np.where(is_near, self.rows, -2)
        hits = (found_QK[:, :k, None] == near_QT[:, None, :]).any(axis=2)
        return float(hits.mean())


def draw_query_set(vectors: Vectors, progress: Progress) -> QuerySet:
    """Draw queries and find their true neighbors: items of the other modality if a run gives it, else the items' own.

    Memory: 2,000 queries, a chunk of the feature, and 8 bytes per vector.
    """
    queries = vectors
    if vectors.other_modality is not None:
        queries = Vectors(
            vectors.cache.path,
            vectors.other_modality,
            run_path=vectors.run_path,
            width=vectors.width,
            device=vectors.device,
        )
    rows = np.random.default_rng(1).permutation(queries.rows)[:_NUM_QUERIES]
    own = rows if vectors.run_path is None and len(vectors.rows) > 1 else None
    searched = vectors.blocks("searching exactly", progress)
    return make_query_set(queries.read(rows), searched, own=own, device=vectors.device)


def make_query_set(
    queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], *, own: Ints | None, device: str = AUTO
) -> QuerySet:
    """Find the true neighbors of queries by exact search. Memory: as of `knn_of_blocks`."""
    rows, scores = knn_of_blocks(queries_QP, blocks, _NUM_TRUE, products=products_on(device))
    if own is not None:
        last = _own_last(rows, own)
        scores = np.take_along_axis(scores, last, axis=1)[:, :-1]
        rows = np.take_along_axis(rows, last, axis=1)[:, :-1]
    return QuerySet(vectors=queries_QP, own=own, scores=scores, rows=rows)


def drop_own(rows_QK: Ints, own_Q: Ints) -> Ints:
    """Drop each query's own row, or the last result if it was not found: (Q, K) -> (Q, K - 1)."""
    return np.take_along_axis(rows_QK, _own_last(rows_QK, own_Q), axis=1)[:, :-1]


def _own_last(rows_QK: Ints, own_Q: Ints) -> Ints:
    is_own: Bools = rows_QK == own_Q[:, None]
    return np.argsort(is_own, axis=1, kind="stable")


def measure_index(
    index: RowIndex, queries: QuerySet, min_recall: float, progress: Progress | None = None
) -> dict[str, Any]:
    """Tune on half of the queries to a little more than the requested recall, and measure on the other half.

    Returns the fields of `IndexCard` on recall and latency.
    """
    progress = progress or NullProgress()
    parameters = tune_search(index, queries.half(0), min_recall + (1 - min_recall) / 4, progress)
    test = queries.half(1)
    rows_QK = test.search(index, parameters)
    return {
        "search": parameters,
        "recall_at_1": test.recall(rows_QK, 1),
        "recall_at_10": test.recall(rows_QK, test.k),
        "num_queries": len(test.vectors),
        "latency_ms": measure_latency_ms(index, test.vectors[:_NUM_TIMED], test.k, parameters),
    }


def measure_latency_ms(index: RowIndex, queries_QP: Floats, k: int, parameters: Mapping[str, int]) -> float:
    """Measure the median milliseconds of single queries."""
    index.search(queries_QP[:1], k, parameters)  # the first search starts threads
    seconds = []
    for query in queries_QP:
        started = time.perf_counter()
        index.search(query[None], k, parameters)
        seconds.append(time.perf_counter() - started)
    return round(1000 * float(np.median(seconds)), 4)


def tune_search(index: RowIndex, queries: QuerySet, target: float, progress: Progress | None = None) -> dict[str, int]:
    """Return the fastest search parameters that reach a recall; if none does, the fastest near the best recall."""
    progress = progress or NullProgress()
    best: tuple[float, dict[str, int]] = (-1.0, {})
    recalls: list[float] = []
    choices = parameter_choices(index)
    if len(choices) == 1:
        return choices[0]
    progress.start("tuning the search", 0, "settings")  # how many are needed is not known
    for parameters in choices:
        recalls.append(queries.recall(queries.search(index, parameters), queries.k))
        best = max(best, (recalls[-1], parameters), key=lambda pair: pair[0])
        progress.advance(1)
        if recalls[-1] >= target or _is_flat(recalls):
            break
    progress.finish()
    return best[1]


def parameter_choices(index: RowIndex) -> list[dict[str, int]]:
    """Return the search parameters of an index, from fast to thorough."""
    if index.is_graph:
        return [{"efSearch": ef} for ef in _doubling(16, _MAX_EF_SEARCH)]
    if not index.num_lists:
        return [{}]
    return [{"nprobe": nprobe} for nprobe in _doubling(1, index.num_lists)]


def _doubling(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] < last:
        values.append(min(2 * values[-1], last))
    return values


def _is_flat(recalls: list[float]) -> bool:
    """Return whether the last two doublings of work found nothing more; early steps may be flat at a low recall."""
    return len(recalls) > 2 and recalls[-1] > 0.5 and max(recalls) - max(recalls[:-2]) < _PLATEAU
