"""Pairs, neighbors and groups, collected from tiles of cosines, against plain references; and their recall."""

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints
from embedcache.neighbors import pairs as module
from embedcache.neighbors.pairs import (
    CosineTile,
    GroupCollector,
    NeighborCollector,
    PairCollector,
    arrange,
    cosine_limit,
    find_clusters,
    measure_neighbor_recall,
    measure_recall,
)
from embedcache.progress import NullProgress
from tests.neighbors.made import brute, made_vectors, stored

LEVELS = [0.5, 0.75, 0.875]
LIMIT = 0.9
PROGRESS = NullProgress()


def made_cosines(count: int, seed: int) -> Floats:
    """Cosines of each pair in steps of 1/16, so that many are equal, and equal to a limit."""
    rng = np.random.default_rng(seed)
    half = np.triu(rng.integers(-16, 17, (count, count)) / np.float32(16), 1).astype(np.float32)
    return half + half.T + np.eye(count, dtype=np.float32)


def tiles(cosines_NN: Floats, size: int, seed: int) -> Iterator[CosineTile]:
    """All pairs, in tiles of items in random order, the last one smaller."""
    items: Ints = np.random.default_rng(seed).permutation(len(cosines_NN))
    starts = range(0, len(items), size)
    for a in starts:
        for b in starts[a // size :]:
            left, right = items[a : a + size], items[b : b + size]
            yield CosineTile(left=left, right=right, cosines=cosines_NN[np.ix_(left, right)], is_diagonal=a == b)


@given(st.integers(0, 20), st.integers(1, 7), st.integers(0, 999), st.integers(0, 60))
def test_pairs_are_all_above_the_lowest_level_that_fits(count: int, size: int, seed: int, most: int) -> None:
    cosines_NN = made_cosines(count, seed)
    collector = PairCollector(count, LEVELS, most)
    for tile in tiles(cosines_NN, size, seed):
        collector.add(tile)

    def above(level: float) -> list[tuple[int, int, float]]:
        pairs = [(a, b, float(cosines_NN[a, b])) for a in range(count) for b in range(a + 1, count)]
        return [(a, b, cosine) for a, b, cosine in pairs if cosine >= level]

    fitting = [level for level in LEVELS if len(above(level)) <= most]
    assert collector.limit == (fitting[0] if fitting else np.inf)
    assert list(zip(*map(np.ndarray.tolist, collector.pairs()), strict=True)) == above(collector.limit)
    np.fill_diagonal(cosines_NN, -2)
    assert collector.highest.tolist() == cosines_NN.max(axis=1, initial=-2).tolist()


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4), st.integers(0, 999))
def test_neighbors_are_those_of_a_sort(count: int, size: int, k: int, seed: int) -> None:
    cosines_NN = made_cosines(count, seed)
    collector = NeighborCollector(count, k)
    for tile in [*tiles(cosines_NN, size, seed), *tiles(cosines_NN, size + 1, seed + 1)]:  # each pair twice
        collector.add(tile)
    for item in range(count):
        others = sorted((-float(cosines_NN[item, other]), other) for other in range(count) if other != item)[:k]
        missing = k - len(others)
        assert collector.best.scores[item].tolist() == [-cosine for cosine, _ in others] + [-np.inf] * missing
        assert collector.best.numbers[item].tolist() == [other for _, other in others] + [-1] * missing


@given(st.integers(1, 40), st.integers(1, 24), st.integers(1, 30), st.integers(0, 999), st.sampled_from([0.5, 0.9375]))
def test_groups_are_connected_components(count: int, size: int, num_nodes: int, seed: int, cosine: float) -> None:
    """Check groups of nodes with several items each, some of which were in one group before; at the limit they stay."""
    rng = np.random.default_rng(seed)
    cosines_NN = made_cosines(count, seed)
    nodes, before = rng.integers(num_nodes, size=count), rng.integers(num_nodes, size=num_nodes)
    collector = GroupCollector(before, nodes, cosine)
    for tile in tiles(cosines_NN, size, seed):
        collector.add(tile)
    near = before[:, None] == before
    left, right = np.nonzero(cosines_NN > cosine)
    near[nodes[left], nodes[right]] = True
    _, expected = scipy.sparse.csgraph.connected_components(near)
    found = collector.merge()
    assert found.dtype == np.int64
    assert ((found[:, None] == found) == (expected[:, None] == expected)).all()


def test_limit_of_equal_vectors_leaves_room_for_rounding() -> None:
    assert [cosine_limit(cosine) for cosine in (1, 0.5, np.inf)] == [np.float32(1 - 1e-5), np.float32(0.5), np.inf]


@pytest.mark.parametrize("num_visits", [0, 16])
def test_recall_equals_brute_force(num_visits: int) -> None:
    """Without visits, as in SemDeDup, pairs that a border cuts are missed."""
    vectors = made_vectors(900, 5, width=8, noise=0.12)
    with patch.object(module, "MAX_VISITS", num_visits):
        found = find_clusters(stored(vectors), LIMIT, seed=0, progress=PROGRESS)
    pairs, nearest = PairCollector(900, [LIMIT], 10**6), NeighborCollector(900, 3)
    with arrange(stored(vectors), found, progress=PROGRESS) as arranged:
        for tile in arranged.tiles(PROGRESS):
            pairs.add(CosineTile(**{**vars(tile), "cosines": tile.cosines.copy()}))
            nearest.add(tile)
        left, right, _ = pairs.pairs()
        listed = set(zip(left.tolist(), right.tolist(), strict=True))

        def is_found(one: Ints, other: Ints) -> np.ndarray:
            return np.array(
                [(min(pair), max(pair)) in listed for pair in zip(one.tolist(), other.tolist(), strict=True)]
            )

        recall = measure_recall(arranged, LIMIT, is_found, seed=0, progress=PROGRESS)
        of_neighbors = measure_neighbor_recall(arranged, nearest.best, seed=0, progress=PROGRESS)
    true = brute(vectors, LIMIT)
    assert recall is not None
    assert recall.value is not None
    assert (recall.num_items, recall.num_pairs) == (900, pytest.approx(len(true), abs=3))  # rounded to float16
    assert recall.value == pytest.approx(len(listed & true) / len(true), abs=0.01)
    assert of_neighbors is not None
    assert of_neighbors.num_pairs == 3 * 900
    cosines = vectors @ vectors.T - 2 * np.eye(900)
    lowest = np.sort(cosines, axis=1)[:, [-3]]
    true_nearest = [len(set(np.flatnonzero(row >= low)) & set(own)) for row, low, own in
                    zip(cosines, lowest, nearest.best.numbers.tolist(), strict=True)]  # fmt: skip
    assert of_neighbors.num_found == pytest.approx(sum(true_nearest), abs=20)
    assert (recall.value > 0.97) == (num_visits > 0)


@pytest.mark.parametrize(("limit", "num_pairs"), [(0.600098, 0), (0.6000975, 0), (0.6, 1)])
def test_recall_leaves_out_pairs_at_the_limit(limit: float, num_pairs: int) -> None:
    """Check that a pair within 1e-6 of the limit, which rounding may move across it, is not counted as missed."""
    vectors = np.array([[1, 0], [0.6, 0.8]], np.float32)  # in float16 the cosine is 0.60009766
    found = find_clusters(stored(vectors), limit, seed=0, progress=PROGRESS)
    with arrange(stored(vectors), found, progress=PROGRESS) as arranged:
        recall = measure_recall(arranged, limit, lambda one, other: np.ones(len(one), bool), seed=0, progress=PROGRESS)
    assert recall is not None
    assert (recall.num_items, recall.num_pairs, recall.num_found) == (2, num_pairs, num_pairs)
    assert recall.to_json()["value"] == (1 if num_pairs else None)
    found = find_clusters(stored(vectors), limit, all_pairs=True, progress=PROGRESS)
    with arrange(stored(vectors), found, progress=PROGRESS) as arranged:
        assert measure_recall(arranged, limit, lambda one, _: one >= 0, seed=0, progress=PROGRESS) is None
