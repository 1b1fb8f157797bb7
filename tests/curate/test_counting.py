import copy
import tracemalloc
from collections.abc import Sequence
from functools import reduce
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Array, normalize
from embedcache.curate import counting
from embedcache.curate.counting import QUANTILES, CoverageCounter, PartialCoverage, TopItems, estimate_background


def small(rng: np.random.Generator, *shape: int) -> Array:
    """Whole numbers from -2 to 2: products are exact in float32, and many tie."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def best_of(sims_NC: Array, k: int) -> tuple[Array, Array]:
    """Sort everything: scores and rows (C, k), ties in row order, padded with -inf and -1."""
    order = np.argsort(-sims_NC.T, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(sims_NC.T, order, axis=1)
    padding = ((0, 0), (0, k - order.shape[1]))
    return np.pad(scores, padding, constant_values=-np.inf), np.pad(order, padding, constant_values=-1)


def count(work: CoverageCounter, rows: Array, vectors: Array, cuts: Sequence[int]) -> PartialCoverage:
    parts = [work.process(*part) for part in zip(np.split(rows, cuts), np.split(vectors, cuts), strict=True)]
    return reduce(work.merge, parts)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Array]:
    num_items, num_concepts = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = np.sort(rng.permutation(num_items + 20)[:num_items])
    concepts, vectors = small(rng, num_concepts, 3), small(rng, num_items, 3)
    k = draw(st.integers(1, num_items))
    sampled = rng.permutation(num_items)[: draw(st.integers(k, num_items))]
    others = np.array([[n for n in range(num_concepts) if n != c] for c in range(num_concepts)], np.int64)
    return {
        "rows": rows,
        "vectors": vectors,
        "concepts": concepts,
        "thresholds": rng.integers(-5, 9, num_concepts).astype(np.float32),
        "floors": estimate_background(concepts, vectors[sampled], k).floors,
        "near": others.reshape(num_concepts, -1)[:, : draw(st.integers(0, max(0, num_concepts - 1)))],
        "selected": rng.random(num_items + 20) < draw(st.floats(0, 1)),
        "k": np.array(k),
        "cuts": np.sort(rng.integers(0, num_items + 1, draw(st.integers(0, 5)))),
    }


@given(problems())
def test_counter_equals_brute_force(problem: dict[str, Array]) -> None:
    rows, thresholds, near, k = problem["rows"], problem["thresholds"], problem["near"], int(problem["k"])
    work = CoverageCounter(
        problem["concepts"],
        thresholds_C=thresholds,
        floors_C=problem["floors"],
        nearest_CJ=near,
        k=k,
        is_selected_N=problem["selected"],
    )
    partial = count(work, rows, problem["vectors"], problem["cuts"].tolist())
    sims = problem["vectors"] @ problem["concepts"].T
    above, selected = sims > thresholds, problem["selected"][rows]
    top = np.where(above, sims, -np.inf).argmax(axis=1)
    for group, chosen in enumerate((np.ones(len(rows), bool), selected)):
        covered = above.any(axis=1) & chosen
        assigned = np.bincount(top[covered], minlength=len(thresholds))
        assert partial.num_items[group] == chosen.sum()
        assert partial.num_covered[group] == covered.sum()
        assert partial.counts[group].tolist() == above[chosen].sum(axis=0).tolist()
        assert partial.assigned[group].tolist() == assigned.tolist()
    for concept, others in enumerate(near):
        both = [int((above[:, concept] & above[:, other]).sum()) for other in others]
        assert partial.shared[concept].tolist() == both
    scores, places = best_of(sims, k)
    found = partial.top.table()
    assert np.array_equal(found[0], scores)
    assert np.array_equal(found[1], rows[places])


def test_tile_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    concepts, vectors, rows = small(rng, 5, 4), small(rng, 100, 4), np.arange(100)
    whole, tiled = [], []
    for found, tile in ((whole, 10**6), (tiled, 15)):
        monkeypatch.setattr(counting, "_TILE", tile)
        monkeypatch.setattr(counting, "_MIN_TILE_ROWS", 1)
        floors = estimate_background(concepts, vectors[:20], 3).floors
        work = CoverageCounter(
            concepts, thresholds_C=np.full(5, 1, np.float32), floors_C=floors, nearest_CJ=np.zeros((5, 1), int), k=3
        )
        partial = work.process(rows, vectors)
        found += [partial.counts, partial.assigned, partial.shared, *partial.top.table()]
    assert all(np.array_equal(one, other) for one, other in zip(whole, tiled, strict=True))


def test_merge_of_copied_read_only_parts() -> None:
    """As Ray returns them."""
    rng = np.random.default_rng(0)
    concepts, vectors = small(rng, 4, 3), small(rng, 30, 3)
    floors, near = estimate_background(concepts, vectors, 2).floors, np.zeros((4, 1), int)
    work = CoverageCounter(concepts, thresholds_C=np.zeros(4, np.float32), floors_C=floors, nearest_CJ=near, k=2)
    parts = [
        copy.deepcopy(work).process(np.arange(start, start + 10), vectors[start : start + 10]) for start in (0, 10, 20)
    ]
    parts = [copy.deepcopy(part) for part in parts]
    for array in (getattr(part, name) for part in parts for name in ("num_items", "counts", "assigned", "shared")):
        array.flags.writeable = False
    partial = reduce(work.merge, parts)
    assert partial.counts[0].tolist() == (vectors @ concepts.T > 0).sum(axis=0).tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3), st.integers(0, 99)), unique_by=lambda x: x[2]))
def test_top_items_ignore_order(candidates: list[tuple[int, int, int]]) -> None:
    best, merged = TopItems(4, 2), TopItems(4, 2)
    for concept, score, row in candidates:
        best.add(np.array([concept]), np.array([score], np.float32), np.array([row]))
        other = TopItems(4, 2)
        other.add(np.array([concept]), np.array([score], np.float32), np.array([row]))
        other.merge(merged)
        merged = other
    scores, rows = best.table()
    for concept in range(4):
        expected = sorted((-score, row) for number, score, row in candidates if number == concept)[:2]
        there = rows[concept] >= 0
        assert list(zip(-scores[concept][there], rows[concept][there], strict=True)) == expected
    assert np.array_equal(rows, merged.table()[1])


def test_memory_is_bounded() -> None:
    rng = np.random.default_rng(0)
    concepts = normalize(rng.standard_normal((40, 16)))
    peaks = []
    for num_chunks in (40, 400):
        floors = estimate_background(concepts, normalize(rng.standard_normal((1000, 16))), 5).floors
        near = np.tile(np.arange(8), (40, 1))
        work = CoverageCounter(
            concepts, thresholds_C=np.full(40, 0.8, np.float32), floors_C=floors, nearest_CJ=near, k=5
        )
        tracemalloc.start()
        partial = work.process(np.arange(0), concepts[:0])
        for chunk in range(num_chunks):
            vectors = normalize(rng.standard_normal((256, 16)))
            partial = work.merge(partial, work.process(np.arange(256) + 256 * chunk, vectors))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert partial.num_items[0] == 256 * num_chunks
    assert peaks[1] < 1.2 * peaks[0]


def test_background_quantiles() -> None:
    rng = np.random.default_rng(0)
    concepts, sample = normalize(rng.standard_normal((200, 8))), normalize(rng.standard_normal((1001, 8)))
    background = estimate_background(concepts, sample, 7)
    sims = concepts @ sample.T
    expected = np.quantile(sims, QUANTILES, axis=1, method="closest_observation").T
    np.testing.assert_allclose(background.quantiles[:, 0], np.median(sims, axis=1), atol=1e-6)
    np.testing.assert_allclose(background.quantiles, expected, atol=2e-2)
    assert (background.floors < np.sort(sims, axis=1)[:, -7]).all()
    assert (background.floors > np.sort(sims, axis=1)[:, -8] - 1e-4).all()


def test_threshold_is_robust_to_matches() -> None:
    """A tenth of the pool shows the concept: mean and deviation of all would put the threshold beyond most of it."""
    rng = np.random.default_rng(0)
    sims = np.where(np.arange(20_000) < 2000, rng.normal(0.5, 0.05, 20_000), rng.normal(0.1, 0.05, 20_000))
    background = estimate_background(np.ones((1, 1), np.float32), sims[:, None].astype(np.float32), 5)
    threshold = background.thresholds(4)[0]
    assert threshold == pytest.approx(0.1 + 4 * 0.05, abs=0.03)
    assert sims.mean() + 4 * sims.std() > 0.6
    passed = (sims[2000:] > threshold).mean()
    assert passed < 4 * NormalDist().cdf(-4)
    assert (sims[:2000] > threshold).mean() > 0.99
