"""Methods that select by clusters: from which ones, how many of each, and which samples are farthest from others."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.curate.select.methods import (
    default_levels,
    divide_budget,
    draw_balanced,
    farthest_first,
    find_centroids,
    find_near_target,
)
from embedcache.errors import DataError, SettingError
from embedcache.progress import NullProgress


def test_near_target() -> None:
    samples, clusters = np.array([0, 1, 1, 2, 3]), np.array([5, 1, 2, 3, 2])
    kept, cluster = find_near_target(samples, clusters, np.array([2, 2, 3]))
    assert (kept.tolist(), cluster.tolist()) == ([1, 2, 3], [2, 3, 2])


def test_image_based_takes_the_clusters_of_the_target(chosen: Any) -> None:
    whole = chosen("image-based:clusters=30")
    counts = dict(zip(whole.columns["cluster"].tolist(), whole.columns["num_target_items"].tolist(), strict=True))
    assert sum(counts.values()) == 12
    drawn = chosen("image-based:clusters=30", budget=len(whole.rows))
    assert drawn.rows.tolist() == whole.rows.tolist()
    assert pa.table(drawn.columns).equals(pa.table(whole.columns))
    with pytest.raises(DataError, match=f"{len(whole.rows)} of 300"):
        chosen("image-based:clusters=30", budget=len(whole.rows) + 1)


def test_hierarchical_names_the_path_from_the_top(chosen: Any) -> None:
    found = chosen("hierarchical:clusters=20+4", budget=300)
    assert found.rows.tolist() == list(range(300))
    leaves, tops = Counter(), {}
    assert list(found.columns) == ["cluster_1", "cluster_2", "cluster_size"]
    for top, leaf, size in zip(*(values.tolist() for values in found.columns.values()), strict=True):
        assert top < 4
        assert tops.setdefault(leaf, top) == top
        leaves[leaf, size] += 1
    assert len(leaves) <= 20
    assert all(count == size for (_, size), count in leaves.items())
    assert sum(leaves.values()) == 300


def test_as_many_clusters_as_vectors_of_any_seed() -> None:
    options: dict[str, Any] = {"progress": NullProgress(), "device": "cpu"}
    assert sorted(find_centroids(np.eye(3, dtype=np.float32), 3, seed=0, **options).tolist()) == [
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
    ]
    with pytest.raises(SettingError, match="clusters: expected at most the 3 vectors, got 4"):
        find_centroids(np.eye(3, dtype=np.float32), 4, seed=0, **options)
    vectors = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    low, high, other = (find_centroids(vectors, 5, seed=seed, **options) for seed in (7, 2**31 + 7, 8))
    assert np.array_equal(low, high)
    assert not np.array_equal(low, other)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_divide_budget(sizes: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(sizes)))
    found = divide_budget(np.array(sizes), budget)
    assert found.sum() == budget
    assert (found <= sizes).all()
    open_ones = [share for share, size in zip(found.tolist(), sizes, strict=True) if share < size]
    assert not open_ones or max(found.tolist()) - min(open_ones) <= 1


@given(st.integers(0, 99), st.integers(0, 40))
def test_balanced_divides_equally(seed: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    leaf = np.repeat(np.arange(4), [5, 20, 5, 10])
    labels = np.stack([leaf, np.array([0, 0, 1, 1])[leaf]], axis=1)
    shuffled = rng.permutation(40)
    kept = draw_balanced(labels[shuffled], budget, seed=seed)
    assert len(set(kept.tolist())) == len(kept) == budget
    tops = np.bincount(labels[shuffled][kept, 1], minlength=2)
    assert abs(tops[0] - tops[1]) <= max(1, budget - 30)  # the second has 15 samples
    leaves = np.bincount(labels[shuffled][kept, 0], minlength=4)
    for small, large, size in ((0, 1, 5), (2, 3, 5)):
        assert abs(leaves[small] - leaves[large]) <= 1 or leaves[small] == size


def test_balanced_draw_of_a_seed_stays_the_same() -> None:
    """Check that a branch which is taken whole draws no random numbers."""
    labels = np.stack([np.repeat([0, 1, 2, 3], [2, 1, 7, 7]), np.repeat([0, 1], [3, 14])], axis=1)
    assert draw_balanced(labels, 6, seed=2).tolist() == [0, 1, 2, 6, 7, 15]


def test_default_levels() -> None:
    assert default_levels(10**9) == (10_000, 1000, 100, 10)
    assert default_levels(40_000) == (1000, 100, 10)
    assert default_levels(800) == (20, 2)
    assert default_levels(30) == (1,)


@given(st.integers(0, 99))
def test_farthest_first(seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((9, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen, cosines = farthest_first(vectors, 9)
    assert sorted(chosen.tolist()) == list(range(9))
    assert (chosen[0], cosines[0]) == (0, -1)
    assert (np.diff(cosines[1:]) >= -1e-6).all()
    for number in range(1, 9):
        nearest = (vectors @ vectors[chosen[:number]].T).max(axis=1)
        nearest[chosen[:number]] = np.inf
        assert nearest[chosen[number]] == pytest.approx(nearest.min(), abs=1e-6)


def test_farthest_first_takes_copies_last() -> None:
    chosen, cosines = farthest_first(np.tile(np.array([[1, 0]], np.float32), (5, 1)), 5)
    assert sorted(chosen.tolist()) == list(range(5))
    assert cosines[1:].tolist() == [1, 1, 1, 1]
