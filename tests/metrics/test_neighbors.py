from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from embedcache.arrays import Floats, normalize
from embedcache.metrics import neighbors
from embedcache.metrics.neighbors import find_closest, iterate_pairs_above, note_duration, top_k, vote
from tests.recorded import RecordedProgress


def vectors(rng: np.random.Generator, num: int, width: int) -> Floats:
    return normalize(rng.standard_normal((num, width)))


@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 12),
    num_candidates=st.integers(1, 40),
    k=st.integers(1, 40),
    tile=st.integers(1, 7),
)
def test_top_k_matches_full_sort(seed: int, num_queries: int, num_candidates: int, k: int, tile: int) -> None:
    rng, k = np.random.default_rng(seed), min(k, num_candidates)
    queries, candidates = vectors(rng, num_queries, 5), vectors(rng, num_candidates, 5)
    with patch.object(neighbors, "_TILE", tile), patch.object(neighbors, "_CANDIDATES", 2 * tile):
        rows, sims = top_k(queries, candidates, k)
    exact = queries @ candidates.T
    np.testing.assert_allclose(sims, -np.sort(-exact, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, axis=1), sims, atol=1e-6)
    assert all(len(set(row)) == k for row in rows.tolist())


@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(2, 6), k=st.integers(1, 25))
def test_vote_matches_sklearn(seed: int, num_classes: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    candidates, queries = vectors(rng, 30, 4), vectors(rng, 9, 4)
    labels = np.concatenate([np.arange(num_classes), rng.integers(num_classes, size=30 - num_classes)])
    model = KNeighborsClassifier(
        n_neighbors=k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(candidates, labels)
    rows, sims = top_k(queries, candidates, k)
    votes = vote(labels[rows], sims, num_classes, temperature=0.07)
    expected = model.predict_proba(queries)
    np.testing.assert_allclose(votes / votes.sum(axis=1, keepdims=True), expected, atol=1e-4)


def test_vote_at_low_temperature() -> None:
    labels, sims = np.array([[1, 0, 0]]), np.array([[0.9, 0.8, 0.8]], np.float32)
    assert vote(labels, sims, 3, temperature=1.0).argmax() == 0
    assert vote(labels, sims, 3, temperature=0.01).argmax() == 1
    assert vote(labels, sims, 3, temperature=1e-6).tolist() == [[0.0, 1.0, 0.0]]
    assert vote(labels, sims, 3, temperature=0.07)[0, 2] == 0


@given(
    values=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=9),
    k=st.integers(1, 8),
    tile=st.integers(1, 6),
    exclude_self=st.booleans(),
)
def test_ties_go_to_the_lower_row(values: list[list[int]], k: int, tile: int, exclude_self: bool) -> None:
    scores = np.array(values, np.float32)
    candidates = np.eye(9, dtype=np.float32)
    expected = np.where(np.eye(len(scores), 9, dtype=bool) & exclude_self, -np.inf, scores)
    with patch.object(neighbors, "_TILE", tile), patch.object(neighbors, "_CANDIDATES", tile):
        rows, _ = top_k(scores, candidates, k, exclude_self=exclude_self)
        best = find_closest(scores, [candidates[:4], candidates[4:]]).rows
    assert rows.tolist() == np.argsort(-expected, axis=1, kind="stable")[:, :k].tolist()
    assert best.tolist() == scores.argmax(axis=1).tolist()


def test_pairs_above_matches_full_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_TILE", 7)
    units = vectors(np.random.default_rng(0), 30, 3)
    left, right = map(np.concatenate, zip(*iterate_pairs_above(units, 0.8), strict=True))
    expected = np.nonzero(units @ units.T > 0.8)
    assert (left.tolist(), right.tolist()) == (expected[0].tolist(), expected[1].tolist())


def test_duration_is_that_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shapes = [0.0], []

    def compare(queries: Floats, candidates: Floats) -> None:
        shapes.append((queries.shape, candidates.shape))
        clock[0] += 2.0

    monkeypatch.setattr(neighbors.time, "perf_counter", lambda: clock[0])
    progress = RecordedProgress()
    for num_pairs in (60, 61, 60_000):
        note_duration(progress, "comparing", num_pairs, 3, compare=compare, timed=(2, 6))
    assert shapes == [((2, 3), (6, 3))] * 3
    assert progress.notes == [
        "comparing: 61 pairs of vectors, about 10 s",
        "comparing: 60,000 pairs of vectors, about 3 hours",
    ]
