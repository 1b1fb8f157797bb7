"""Ranks and recalls against plain loops, and against other libraries on the same similarities."""

from itertools import permutations

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, coverage_error

from embedcache import metrics as ranks_module
from embedcache.arrays import dot_products, normalize
from embedcache.errors import DataError
from embedcache.metrics import (
    average_precisions,
    best_ranks,
    negatives_before,
    rank_labels,
    recall_at,
    tied_chance_recall,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Queries and candidates of small integers, so that ties are frequent, each query with a positive."""
    num_queries, num_candidates = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    queries = rng.integers(-2, 3, (num_queries, 2)).astype(np.float32)
    candidates = rng.integers(-2, 3, (num_candidates, 2)).astype(np.float32)
    relation = rng.random((num_queries, num_candidates)) < 0.3
    relation[np.arange(num_queries), rng.integers(num_candidates, size=num_queries)] = True
    return queries, candidates, np.nonzero(relation)


@given(problems(), st.integers(1, 200))
def test_ranks_match_loop(
    problem: tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]], block_bytes: int
) -> None:
    queries, candidates, (query_M, candidate_M) = problem
    ranks = []
    for number, query in enumerate(queries):
        positives = set(candidate_M[query_M == number])
        best = max(float(query @ candidates[positive]) for positive in positives)
        before = [c for c in range(len(candidates)) if c not in positives and float(query @ candidates[c]) >= best]
        ranks.append(1 + len(before))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "_BLOCK_BYTES", block_bytes)  # any tiling gives the same
        assert best_ranks(queries, candidates, (query_M, candidate_M)).tolist() == ranks


def test_constant_embedding_ranks_last() -> None:
    same = np.ones((50, 4), np.float32)
    ranks = best_ranks(same, same, (np.arange(50), np.arange(50)))
    assert recall_at(ranks, 10) == 0


@pytest.mark.parametrize("width", [33, 100, 256, 257, 384])
@pytest.mark.parametrize("count", [5, 7, 17])
def test_equal_candidates_rank_last(width: int, count: int) -> None:
    """A matrix product sums some of equal columns in another order, and rounds them otherwise."""
    queries, row = normalize(np.random.default_rng(width).standard_normal((count + 1, width))), slice(count, None)
    same = np.repeat(queries[row], count, axis=0)
    everyone = np.arange(count), np.arange(count)
    assert negatives_before(queries[:count], same, everyone).tolist() == [count - 1] * count
    scores = dot_products(queries[:count], same)
    scores[:, 0] = np.nextafter(scores[:, 0], np.float32(2))
    assert rank_labels(scores, np.zeros(count, np.int64)).tolist() == [count] * count


@pytest.mark.parametrize("where", ["queries", "candidates", "both"])
def test_nan_embedding_ranks_last(where: str) -> None:
    good, bad = np.eye(20, dtype=np.float32), np.full((20, 20), np.nan, np.float32)
    queries, candidates = good if where == "candidates" else bad, good if where == "queries" else bad
    ranks = best_ranks(queries, candidates, (np.arange(20), np.arange(20)))
    assert recall_at(ranks, 10) == 0


def test_query_without_positive_raises() -> None:
    one = np.ones((2, 1), np.float32)
    with pytest.raises(DataError, match="got none for 1, first query 1"):
        best_ranks(one, one, (np.array([0]), np.array([0])))
    four = np.ones((4, 1), np.float32)
    with pytest.raises(DataError, match="got none for 2, first query 1"):
        best_ranks(four, four, (np.array([0, 3]), np.array([0, 3])))


@pytest.mark.slow
@given(st.lists(st.integers(1, 4), min_size=2, max_size=6), st.integers(1, 8), st.integers(0, 1000))
def test_tied_chance_matches_enumeration(sizes: list[int], k: int, seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    relation = rng.random((3, len(sizes))) < 0.4
    relation[np.arange(3), rng.integers(len(sizes), size=3)] = True
    counted = []
    for positive in relation:
        for order in permutations(range(len(sizes))):
            first = next(place for place, group in enumerate(order) if positive[group])
            counted.append(sum(sizes[group] for group in order[:first]) < k)
    assert tied_chance_recall(np.nonzero(relation[:, groups]), groups * 7, k) == pytest.approx(np.mean(counted))


def test_tied_chance_is_a_probability() -> None:
    """One that is certain is 1 in spite of rounding: the interval of a little more would be NaN."""
    chances = [tied_chance_recall((np.arange(count),) * 2, np.arange(count), 10) for count in range(1, 11)]
    assert max(chances) == 1
    assert min(chances) == pytest.approx(1)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 15))
def test_average_precision_matches_sklearn(seed: int, num_queries: int, num_candidates: int) -> None:
    rng = np.random.default_rng(seed)
    queries, candidates = (
        rng.standard_normal((count, 3)).astype(np.float32) for count in (num_queries, num_candidates)
    )
    relation = rng.random((num_queries, num_candidates)) < 0.4
    relation[np.arange(num_queries), rng.integers(num_candidates, size=num_queries)] = True
    positives = np.nonzero(relation)
    shuffled = rng.permutation(len(positives[0]))
    positives = (positives[0][shuffled], positives[1][shuffled])  # in any order
    found = average_precisions(positives[0], negatives_before(queries, candidates, positives))
    scores = queries @ candidates.T
    expected = [average_precision_score(own, row) for own, row in zip(relation, scores, strict=True)]
    assert found == pytest.approx(expected)


def candidates_as_scores(scores_QC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries and candidates whose dot products are these very numbers."""
    return scores_QC, np.eye(scores_QC.shape[1], dtype=np.float32)


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(6, 40), st.sampled_from([1, 3, 6]))
def test_recall_matches_clip_benchmark(seed: int, num_queries: int, num_candidates: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.arange(num_queries * num_candidates)).reshape(num_queries, -1).astype(np.float32)
    is_positive = rng.random(scores.shape) < 0.2
    is_positive[np.arange(num_queries), rng.integers(num_candidates, size=num_queries)] = True
    found = recall_at_k(torch.from_numpy(scores), torch.from_numpy(is_positive), k)
    ranks = best_ranks(*candidates_as_scores(scores), np.nonzero(is_positive))
    assert recall_at(ranks, k) == pytest.approx((found > 0).float().mean().item())


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(3, 40))
def test_ranks_match_sklearn_with_ties(seed: int, num_queries: int, num_candidates: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (num_queries, num_candidates)).astype(np.float32)  # many ties
    queries, own = np.arange(num_queries), rng.integers(num_candidates, size=num_queries)
    ranks = best_ranks(*candidates_as_scores(scores), (queries, own))
    assert ranks.mean() == pytest.approx(coverage_error(np.eye(num_candidates)[own], scores))
