"""How good an index is: recall against exact search, at the least effort that reaches what is asked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
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
class Questions:
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

    def half(self, odd: int) -> "Questions":
        """Take every other one: the even ones (0) tune, the odd ones (1) measure."""
        part = slice(odd, None, 2) if len(self.vectors) > 1 else slice(None)
        own = None if self.own is None else self.own[part]
        return Questions(vectors=self.vectors[part], own=own, scores=self.scores[part], rows=self.rows[part])

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
class Measured:
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


def pose(vectors: Vectors) -> Questions:
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
    return answer(asked.read(rows), vectors.blocks(), own=own)


def answer(queries_QP: Floats, blocks: Iterable[tuple[Ints, Floats]], *, own: Ints | None) -> Questions:
    """Find the true answers to queries by exact search."""
    scores, rows = exact_search(queries_QP, blocks, _NUM_TRUE)
    if own is not None:
        last = _own_last(rows, own)
        scores = np.take_along_axis(scores, last, axis=1)[:, :-1]
        rows = np.take_along_axis(rows, last, axis=1)[:, :-1]
    return Questions(vectors=queries_QP, own=own, scores=scores, rows=rows)


def without(rows_QK: Ints, own_Q: Ints) -> Ints:
    """Leave each query's own row out, or the last where it was not found: (Q, K) -> (Q, K - 1)."""
    return np.take_along_axis(rows_QK, _own_last(rows_QK, own_Q), axis=1)[:, :-1]


def _own_last(rows_QK: Ints, own_Q: Ints) -> Ints:
    is_own: Bools = rows_QK == own_Q[:, None]
    return np.argsort(is_own, axis=1, kind="stable")


def measure(index: RowIndex, questions: Questions, min_recall: float) -> Measured:
    """Tune on one half of the queries until the recall is a little more than asked, and measure on the other half."""
    effort = tune(index, questions.half(0), min_recall + (1 - min_recall) / 4)
    held = questions.half(1)
    found = held.ask(index, effort)
    single, batch = index.latency_ms(held.vectors[:_NUM_TIMED], held.k, effort)
    return Measured(
        effort=effort,
        recall_at_1=held.recall(found, 1),
        recall_at_10=held.recall(found, held.k),
        num_queries=len(held.vectors),
        latency_ms=round(single, 4),
        batch_latency_ms=round(batch, 4),
    )


def tune(index: RowIndex, questions: Questions, target: float) -> dict[str, int]:
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
