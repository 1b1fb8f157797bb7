"""Our metrics beside those of other libraries, on the same similarities."""

import numpy as np
import pytest
import torch
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import coverage_error, top_k_accuracy_score

from embedcache.metrics import best_ranks, recall_at


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


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_matches_sklearn(k: int) -> None:
    rng = np.random.default_rng(0)
    scores, own = rng.standard_normal((300, 40)).astype(np.float32), rng.integers(40, size=300)
    ranks = best_ranks(*candidates_as_scores(scores), (np.arange(300), own))
    assert recall_at(ranks, k) == pytest.approx(top_k_accuracy_score(own, scores, k=k, labels=range(40)))
