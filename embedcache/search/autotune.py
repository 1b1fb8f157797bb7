"""How good an index is: recall against exact search, at the least effort that reaches what is asked.

The kinds of index that are tried, and the bytes that each takes: arithmetic only.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.errors import SettingError
from embedcache.search.faiss_index import RowIndex, exact_search
from embedcache.search.vectors import Vectors

_K = 10
_NUM_QUERIES = 2000
_NUM_TIMED = 200
_NUM_TRUE = 100  # kept of the true ranking, so that what scores the same as the k-th counts as found too
_ROUNDING = 1e-5  # two ways of summing one cosine in float32
_PLATEAU = 0.002
_MOST_EFFORT = 1024


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """Queries and the true answers to them.

    Args:
        vectors: (Q, P) float32, of length 1.
        own: (Q,) the row that a query is itself, which is no answer; None where queries are of another kind.
        scores: (Q, T) of the true best, best first.
        rows: (Q, T) alike.
    """

    vectors: Floats
    own: Ints | None
    scores: Floats
    rows: Ints

    @property
    def k(self) -> int:
        """Answers that are looked at: 10, or all where there are fewer."""
        return min(_K, int(self.rows.shape[1]))

    def half(self, odd: int) -> "QuerySet":
        """Take every other one: the even ones (0) tune, the odd ones (1) measure."""
        part = slice(odd, None, 2) if len(self.vectors) > 1 else slice(None)
        own = None if self.own is None else self.own[part]
        return QuerySet(vectors=self.vectors[part], own=own, scores=self.scores[part], rows=self.rows[part])

    def ask(self, index: RowIndex, effort: Mapping[str, int]) -> Ints:
        """Get what an index answers: rows (Q, K)."""
        if self.own is None:
            return index.search(self.vectors, self.k, effort)[1]
        return without(index.search(self.vectors, self.k + 1, effort)[1], self.own)

    def recall(self, found_QK: Ints, k: int) -> float:
        """Share of the k first found that score no less than the true k-th, 0 to 1: any of equals will do."""
        is_good = self.scores >= self.scores[:, k - 1 : k] - _ROUNDING
        good_QT = np.where(is_good, self.rows, -2)
        hits = (found_QK[:, :k, None] == good_QT[:, None, :]).any(axis=2)
        return float(hits.mean())


@dataclass(frozen=True, kw_only=True)
class IndexQuality:
    """Figures of an index, on queries that tuned nothing.

    Args:
        effort: search parameters that the tuning chose.
        recall_at_1: share of queries whose best answer is found first.
        recall_at_10: share of the true 10 best that are found.
        num_queries: how many were asked.
        latency_ms: median of single queries.
        batch_latency_ms: a query, of all in one batch.
    """

    effort: Mapping[str, int]
    recall_at_1: float
    recall_at_10: float
    num_queries: int
    latency_ms: float
    batch_latency_ms: float


def draw_query_set(vectors: Vectors) -> QuerySet:
    """Take what people will ask with, and answer: the other modality where a run gives it, else the items themselves.

    Memory: 2,000 queries and a chunk of the feature.
    """
    rng = np.random.default_rng(1)
    asked = vectors
    if vectors.run_path is not None:
        other = "text" if vectors.modality == "image" else "image"
        asked = Vectors(vectors.cache.path, other, run_path=vectors.run_path)
    rows = rng.permutation(asked.rows)[:_NUM_QUERIES]
    own = rows if vectors.run_path is None and len(vectors.rows) > 1 else None
    return make_query_set(asked.read(rows), vectors.blocks(), own=own)


def make_query_set(queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], *, own: Ints | None) -> QuerySet:
    """Find the true answers to queries by exact search."""
    scores, rows = exact_search(queries_QP, blocks, _NUM_TRUE)
    if own is not None:
        last = _own_last(rows, own)
        scores = np.take_along_axis(scores, last, axis=1)[:, :-1]
        rows = np.take_along_axis(rows, last, axis=1)[:, :-1]
    return QuerySet(vectors=queries_QP, own=own, scores=scores, rows=rows)


def without(rows_QK: Ints, own_Q: Ints) -> Ints:
    """Leave each query's own row out, or the last where it was not found: (Q, K) -> (Q, K - 1)."""
    return np.take_along_axis(rows_QK, _own_last(rows_QK, own_Q), axis=1)[:, :-1]


def _own_last(rows_QK: Ints, own_Q: Ints) -> Ints:
    is_own: Bools = rows_QK == own_Q[:, None]
    return np.argsort(is_own, axis=1, kind="stable")


def measure(index: RowIndex, questions: QuerySet, min_recall: float) -> IndexQuality:
    """Tune on one half of the queries until the recall is a little more than asked, and measure on the other half."""
    effort = tune(index, questions.half(0), min_recall + (1 - min_recall) / 4)
    held = questions.half(1)
    found = held.ask(index, effort)
    single, batch = index.latency_ms(held.vectors[:_NUM_TIMED], held.k, effort)
    return IndexQuality(
        effort=effort,
        recall_at_1=held.recall(found, 1),
        recall_at_10=held.recall(found, held.k),
        num_queries=len(held.vectors),
        latency_ms=round(single, 4),
        batch_latency_ms=round(batch, 4),
    )


def tune(index: RowIndex, questions: QuerySet, target: float) -> dict[str, int]:
    """Find the least effort that reaches a recall; where none does, that of the best, or of the first near the best."""
    best: tuple[float, dict[str, int]] = (-1.0, {})
    recalls: list[float] = []
    choices = efforts(index)
    if len(choices) == 1:
        return choices[0]
    for effort in choices:
        recalls.append(questions.recall(questions.ask(index, effort), questions.k))
        best = max(best, (recalls[-1], effort), key=lambda pair: pair[0])
        if recalls[-1] >= target or _is_flat(recalls, num_steps=6 if index.is_refined else 2):
            break
    return best[1]


def efforts(index: RowIndex) -> list[dict[str, int]]:
    """List the search parameters of an index, from quick to thorough."""
    if index.is_graph:
        return [{"efSearch": ef} for ef in _doubling(16, _MOST_EFFORT)]
    if not index.num_lists:
        return [{}]
    probes = [{"nprobe": nprobe} for nprobe in _doubling(1, index.num_lists)]
    if not index.is_refined:
        return probes
    factors = (4, 16, 64)  # of how many times k the fine codes are compared
    pairs = [{**probe, "k_factor": factor} for probe in probes for factor in factors]
    list_length = len(index) / index.num_lists
    return sorted(pairs, key=lambda effort: effort["nprobe"] * list_length + 8 * _K * effort["k_factor"])


def _doubling(first: int, last: int) -> list[int]:
    values = [first]
    while values[-1] < last:
        values.append(min(2 * values[-1], last))
    return values


def _is_flat(recalls: list[float], num_steps: int) -> bool:
    """Say whether twice the work, and twice that, found nothing more; an early step may be flat at a low recall."""
    return len(recalls) > num_steps and recalls[-1] > 0.5 and max(recalls) - max(recalls[:-num_steps]) < _PLATEAU


FLAT_LIMIT = 200_000
"""Up to this many vectors the default index is exact: a query takes tens of milliseconds on one core."""

_ID = 8
_LINKS = 272  # HNSW32: 64 neighbors of 4 bytes on the ground, about 2 above, and 12 bytes of book-keeping
_DISK_LIST = 24  # where a list lies in its file
_RABITQ = 20  # factors that RaBitQ keeps beside a vector's bits; 8 with one bit a number
_MANY_LISTS = 2**14  # from here on a graph over the centroids is quicker than comparing with all
_POINTS_A_LIST = 39  # fewer, and FAISS warns that k-means has too little to go by


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A kind of index for a given number of vectors.

    Args:
        factory: FAISS factory string.
        memory_bytes: of the finished index, as far as a formula says.
        bits: kept of each number: with fewer, no search however long finds more.
        is_on_disk: whether its lists lie in a file of their own, which is not counted as memory.
    """

    factory: str
    memory_bytes: int
    bits: int
    is_on_disk: bool = False

    @property
    def is_graph(self) -> bool:
        """Whether what it misses is due to its edges, not to its bits."""
        return self.factory.startswith("HNSW")


def configurations(num_vectors: int, width: int) -> list[Configuration]:
    """List the kinds in the order they are tried: exact where that is quick, a graph, then ever smaller codes in lists.

    Args:
        num_vectors: N.
        width: P.
    """
    exact = Configuration(factory="Flat", memory_bytes=num_vectors * (4 * width + _ID), bits=32)
    graph = Configuration(factory="HNSW32", memory_bytes=num_vectors * (4 * width + _LINKS + _ID), bits=32)
    return [*([exact] if num_vectors <= FLAT_LIMIT else []), graph, *_in_lists(num_vectors, width)]


def on_disk(num_vectors: int, width: int) -> list[Configuration]:
    """List the kinds whose vectors stay on the disk: one, as near to exact as float16 is.

    In memory are the centroids, and the items' rows twice.
    """
    coarse, fixed = _coarse(num_vectors, width)
    size = num_vectors * 2 * _ID + fixed + num_lists(num_vectors) * _DISK_LIST
    return [Configuration(factory=f"{coarse},SQfp16", memory_bytes=size, bits=16, is_on_disk=True)]


def fit_memory(every: Sequence[Configuration], memory_bytes: int | None) -> list[Configuration]:
    """Choose those that fit a memory; None is any.

    Raises:
        SettingError: none does; says what the smallest takes.
    """
    found = [one for one in every if memory_bytes is None or one.memory_bytes <= memory_bytes]
    if not found:
        smallest = min(every, key=lambda one: one.memory_bytes)
        least_kb = math.ceil(smallest.memory_bytes / 1024)
        raise SettingError(
            f"no index of these vectors fits {memory_bytes:,} bytes of memory; the smallest, {smallest.factory}, takes "
            f"{smallest.memory_bytes:,}: give --memory {least_kb}K or more{_elsewhere(smallest)}"
        )
    return found


def _elsewhere(smallest: Configuration) -> str:
    return "" if smallest.is_on_disk else ", or leave the vectors --on-disk"


def remaining_candidates(rest: Sequence[Configuration], failed: Configuration) -> list[Configuration]:
    """Leave out what keeps fewer bits of each number than lists that missed the recall when all were searched."""
    return [one for one in rest if failed.is_graph or one.bits >= failed.bits]


def num_lists(num_vectors: int) -> int:
    """Get the number of lists for N vectors: the power of two next to 2 √N, with enough vectors for each."""
    power = round(math.log2(2 * math.sqrt(num_vectors)))
    return int(max(1, min(2**power, num_vectors // _POINTS_A_LIST)))


def _in_lists(num_vectors: int, width: int) -> Iterator[Configuration]:
    coarse, fixed = _coarse(num_vectors, width)
    for codes, bits, code_bytes, table_bytes in _codes(num_vectors, width):
        size = round(num_vectors * (code_bytes + 2 * _ID)) + fixed + table_bytes
        yield Configuration(factory=f"{coarse},{codes}", memory_bytes=size, bits=bits)


def _coarse(num_vectors: int, width: int) -> tuple[str, int]:
    """Name the part of a factory string that finds lists, and the bytes of its centroids."""
    lists = num_lists(num_vectors)
    if lists < _MANY_LISTS:
        return f"IVF{lists}", lists * 4 * width
    return f"IVF{lists}_HNSW32", lists * (4 * width + _LINKS)


def _codes(num_vectors: int, width: int) -> Iterator[tuple[str, int, float, int]]:
    """Name, bits a number, bytes a vector, and bytes beside the vectors."""
    yield "SQfp16", 16, 2 * width, 0
    yield "RaBitQ,Refine(SQ8)", 8, width / 8 + 8 + width, 8 * width
    yield "SQ8", 8, width, 8 * width
    yield "SQ6", 6, width * 6 / 8, 8 * width
    yield "RaBitQ4", 4, width / 2 + _RABITQ, 0
    if width % 4 == 0 and num_vectors >= 256 * _POINTS_A_LIST:
        yield f"PQ{width // 4}", 2, width / 4, 4 * 256 * width
    yield "RaBitQ", 1, width / 8 + 8, 0
