"""Similar pairs and neighbors, from tiles of cosines, against plain references."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints
from embedcache.dataset.similar_pairs import (
    NOT_COMPARED,
    CosineTile,
    NeighborCollector,
    PairCollector,
    SimilarPairs,
    cosine_limit,
)

LEVELS = [0.5, 0.75, 0.875]


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
            cosines_BR = cosines_NN[np.ix_(left, right)]
            yield CosineTile(left=left, right=right, cosines=cosines_BR, is_diagonal=a == b)


def listed(pairs: SimilarPairs) -> list[tuple[int, int, float]]:
    return list(zip(pairs.left.tolist(), pairs.right.tolist(), pairs.cosines.tolist(), strict=True))


def pairs_above(cosines_NN: Floats, low: float, high: float = np.inf) -> list[tuple[int, int, float]]:
    count = len(cosines_NN)
    pairs = [(a, b, float(cosines_NN[a, b])) for a in range(count) for b in range(a + 1, count)]
    return [(a, b, cosine) for a, b, cosine in pairs if low <= cosine < high]


@given(st.integers(0, 20), st.integers(1, 7), st.integers(0, 999), st.integers(0, 60))
def test_pairs_are_all_above_the_lowest_level_that_fits(count: int, size: int, seed: int, most: int) -> None:
    cosines_NN = made_cosines(count, seed)
    collector = PairCollector(count, LEVELS, most)
    for tile in tiles(cosines_NN, size, seed):
        collector.add(tile)
    fitting = [level for level in LEVELS if len(pairs_above(cosines_NN, level)) <= most]
    assert collector.limit == (fitting[0] if fitting else np.inf)
    found = collector.pairs()
    assert listed(found) == pairs_above(cosines_NN, collector.limit)
    assert listed(found.between(0.75, 0.9375)) == pairs_above(cosines_NN, max(0.75, collector.limit), 0.9375)
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
        assert collector.cosines[item].tolist() == [-cosine for cosine, _ in others] + [-2] * missing
        best = {other for cosine, other in others if cosine < others[-1][0]}  # of equal ones at the end any may be kept
        assert best <= set(collector.items[item].tolist())
        assert collector.items[item].tolist().count(-1) == missing


def test_few_of_many_candidates_are_kept_by_partition() -> None:
    cosines = np.random.default_rng(0).permutation(400).reshape(2, 200).astype(np.float32) / 400
    collector = NeighborCollector(202, 2)
    collector.add(CosineTile(left=np.arange(2), right=np.arange(2, 202), cosines=cosines.copy()))
    assert collector.items[:2].tolist() == (np.argsort(-cosines, axis=1)[:, :2] + 2).tolist()
    assert collector.items[2:, 1].tolist() == (cosines.argmin(axis=0)).tolist()


def test_limit_of_equal_vectors_leaves_room_for_rounding() -> None:
    assert cosine_limit(1) == np.float32(1 - 1e-5)
    assert cosine_limit(0.5) == np.float32(0.5)
    assert cosine_limit(np.inf) == np.inf
    pairs = SimilarPairs(
        left=np.array([0]), right=np.array([1]), cosines=np.array([1], np.float32), distances=np.array([NOT_COMPARED])
    )
    assert len(pairs.between(1).left) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_items_that_were_not_compared_have_no_neighbor(count: int) -> None:
    collector = NeighborCollector(count, 1)
    tile = CosineTile(left=np.arange(1), right=np.arange(1), cosines=np.ones((1, 1), np.float32), is_diagonal=True)
    collector.add(tile)
    assert collector.items.tolist() == [[-1]] * count
    assert collector.cosines.tolist() == [[-2]] * count
