"""The K best against a full sort; whatever the blocks, their order and ties."""

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints
from embedcache.neighbors import knn as module
from embedcache.neighbors.knn import KBest, knn, knn_of_blocks


def sort_best(scores_QC: Floats, k: int) -> tuple[Ints, Floats]:
    """Sort all candidates: rows and scores of the K best, ties in order of rows, padded with -1 and -inf."""
    padded_QX = np.pad(scores_QC, ((0, 0), (0, k)), constant_values=-np.inf)
    rows_QK = np.argsort(-padded_QX, axis=1, kind="stable")[:, :k]
    scores_QK = np.take_along_axis(padded_QX, rows_QK, axis=1)
    return np.where(np.isneginf(scores_QK), -1, rows_QK), scores_QK


@pytest.mark.slow
@given(st.integers(0, 12), st.integers(0, 40), st.integers(0, 45), st.integers(0, 999), st.integers(1, 7), st.data())
def test_neighbors_are_those_of_a_sort(
    num_queries: int, num_candidates: int, k: int, seed: int, tile: int, data: st.DataObject
) -> None:
    """Check whole numbers, of which many tie, with left-out candidates, in one array or in blocks."""
    rng = np.random.default_rng(seed)
    queries, candidates = (
        rng.integers(-2, 3, (count, 3)).astype(np.float32) for count in (num_queries, num_candidates)
    )
    scores = queries @ candidates.T
    own = groups = None
    if data.draw(st.booleans()):
        own = rng.integers(num_candidates + 1, size=num_queries)
        scores[own[:, None] == np.arange(num_candidates)] = -np.inf
    if data.draw(st.booleans()):
        groups = rng.integers(3, size=num_queries), rng.integers(3, size=num_candidates)
        scores[groups[0][:, None] == groups[1]] = -np.inf
    given_candidates = candidates if data.draw(st.booleans()) else [candidates[:5], candidates[5:5], candidates[5:]]
    with patch.object(module, "_TILE", tile), patch.object(module, "_CANDIDATES", 2 * tile):
        rows, sims = knn(queries, given_candidates, k, own=own, groups=groups)
    expected_rows, expected_sims = sort_best(scores, k)
    assert rows.dtype == np.int64
    assert rows.tolist() == expected_rows.tolist()
    assert np.array_equal(sims, expected_sims)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4), st.integers(0, 999))
def test_candidates_may_come_in_any_order_and_twice(num_rows: int, count: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.integers(-8, 9, (num_rows, count)) / 8).astype(np.float32)
    expected = sort_best(scores, k)
    blocked, single = KBest(num_rows, k, count), KBest(num_rows, k)
    for _ in range(2):
        rows = rng.permutation(num_rows)
        for columns in np.array_split(rng.permutation(count), 3):
            blocked.add_block(rows, columns, scores[np.ix_(rows, columns)])
    for part in np.array_split(rng.permutation(num_rows * count), 4):
        row, column = np.divmod(part, count)
        single.add(row, column, scores[row, column])
    for best in (blocked, single):
        assert best.numbers.tolist() == expected[0].tolist()
        assert np.array_equal(best.scores, expected[1])


def test_few_of_many_candidates_are_kept_by_partition() -> None:
    scores = np.random.default_rng(0).permutation(400).reshape(2, 200).astype(np.float32)
    best = KBest(2, 2)
    best.add_block(np.arange(2), np.arange(200), scores)
    assert best.numbers.tolist() == sort_best(scores, 2)[0].tolist()


def test_blocks_name_their_rows() -> None:
    eye = np.eye(5, dtype=np.float32)
    given_blocks = [(np.array([3, 7]), eye[:2]), (np.empty(0, np.int64), eye[:0]), (np.array([8, 9, 20]), eye[2:])]
    rows, sims = knn_of_blocks(eye[3:] + 0.5 * eye[[0, 2]], given_blocks, 2)
    assert (rows.tolist(), sims.tolist()) == ([[9, 3], [20, 8]], [[1, 0.5]] * 2)
    assert knn_of_blocks(eye, given_blocks, 9)[0].shape == (5, 5)


def test_products_of_tiles_are_held_at_once() -> None:
    shapes: list[tuple[int, int]] = []

    def products(left: Floats, right: Floats) -> Floats:
        shapes.append((len(left), len(right)))
        return left @ right.T

    one, many, wide = (np.ones((count, 1), np.float32) for count in (1, 1025, 4097))
    knn(many, one, 1, products=products)
    knn(one, wide, 1, products=products)
    assert shapes == [(1024, 1), (1, 1), (1, 4096), (1, 1)]
