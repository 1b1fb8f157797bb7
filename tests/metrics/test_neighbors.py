from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from embedcache.arrays import Floats, normalize
from embedcache.metrics import neighbors
from embedcache.metrics.neighbors import find_closest, iterate_pairs_above, spherical_means, top_k, vote


def vectors(rng: np.random.Generator, num: int, width: int) -> Floats:
    return normalize(rng.standard_normal((num, width)))


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    num_queries=st.integers(0, 12),
    num_candidates=st.integers(1, 40),
    k=st.integers(1, 40),
    tile=st.integers(1, 7),
)
def test_top_k_matches_full_sort(seed: int, num_queries: int, num_candidates: int, k: int, tile: int) -> None:
    rng, k = np.random.default_rng(seed), min(k, num_candidates)
    # not a width of 5, see `test_visits_cover_all_neighbors`
    queries, candidates = vectors(rng, num_queries, 6), vectors(rng, num_candidates, 6)
    with patch.object(neighbors, "_TILE", tile), patch.object(neighbors, "_CANDIDATES", 2 * tile):
        rows, sims = top_k(queries, candidates, k)
    exact = queries @ candidates.T
    np.testing.assert_allclose(sims, -np.sort(-exact, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, rows, axis=1), sims, atol=1e-6)
    assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert [left.size for left, _ in iterate_pairs_above(np.eye(8, dtype=np.float32), 1.0)] == [0, 0]  # above, not at
    left, right = map(np.concatenate, zip(*iterate_pairs_above(units, 0.8), strict=True))
    expected = np.nonzero(units @ units.T > 0.8)
    assert (left.tolist(), right.tolist()) == (expected[0].tolist(), expected[1].tolist())


def test_products_of_tiles_are_held_at_once() -> None:
    shapes: list[tuple[int, int]] = []

    def products(left: Floats, right: Floats) -> Floats:
        shapes.append((len(left), len(right)))
        return left @ right.T

    one, many, wide = (np.ones((count, 1), np.float32) for count in (1, 1025, 16_385))
    top_k(many, one, 1, products=products)
    top_k(one, wide, 1, products=products)
    find_closest(many, [one], products=products)
    assert shapes == [(1024, 1), (1, 1), (1, 16_384), (1, 1), (1024, 1), (1, 1)]
    assert [(len(left), left[0], left[-1]) for left, _ in iterate_pairs_above(many, 0.5)] == [
        (1024 * 1025, 0, 1023),
        (1025, 1024, 1024),
    ]


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 1000), st.integers(1, 5))
def test_no_neighbor_is_of_the_same_group(queries: int, candidates: int, seed: int, num_groups: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal((count, 4)).astype(np.float32) for count in (queries, candidates))
    groups = rng.integers(num_groups, size=queries), rng.integers(num_groups, size=candidates)
    rows, sims = top_k(left, right, candidates, groups=groups)
    is_found = np.isfinite(sims)
    assert (groups[1][rows] != groups[0][:, None])[is_found].all()
    assert (is_found.sum(axis=1) == (groups[1] != groups[0][:, None]).sum(axis=1)).all()


def test_no_neighbors_or_no_candidates() -> None:
    rows = vectors(np.random.default_rng(0), 3, 4)
    assert top_k(rows, rows, 0)[0].shape == (3, 0)
    assert top_k(rows[:0], rows, 2)[1].shape == (0, 2)
    assert find_closest(rows, [rows[:0]]).rows.tolist() == [-1] * 3
    assert find_closest(rows, []).sims.tolist() == [-np.inf] * 3


def test_closest_are_counted_across_blocks() -> None:
    rng = np.random.default_rng(1)
    queries, candidates = vectors(rng, 7, 3), vectors(rng, 20, 3)
    with patch.object(neighbors, "_TILE", 3):
        found = find_closest(queries, [candidates[:5], candidates[5:5], candidates[5:]])
    exact = queries @ candidates.T
    assert found.rows.tolist() == exact.argmax(axis=1).tolist()
    np.testing.assert_allclose(found.sims, exact.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(found.candidate_sims, exact.max(axis=0), atol=1e-6)
    equal = find_closest(queries[:1], [queries[:1], queries[:1]])
    assert equal.rows.tolist() == [0]  # the first of equal ones


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 999), st.integers(1, 8))
@example(200, 30, 0, 64)  # clusters still change after ten iterations
def test_centroids_equal_plain_k_means(count: int, num_clusters: int, seed: int, tile: int) -> None:
    rows = vectors(np.random.default_rng(seed), count, 3)
    with patch.object(neighbors, "_TILE", tile):
        found = spherical_means(rows, num_clusters, seed=seed)
    chosen = np.random.default_rng(seed).choice(count, min(num_clusters, count), replace=False)
    centroids = rows[np.sort(chosen)].copy()
    for _ in range(10):
        nearest = (rows @ centroids.T).argmax(axis=1)
        for number in range(len(centroids)):
            if (nearest == number).any():  # an empty cluster keeps its centroid
                centroids[number] = normalize(rows[nearest == number].sum(axis=0, keepdims=True))[0]
    np.testing.assert_allclose(found, centroids, atol=1e-4)
