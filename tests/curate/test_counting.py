import copy
import tracemalloc
from collections.abc import Sequence
from decimal import Decimal
from functools import reduce
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Array, normalize
from embedcache.curate import counting
from embedcache.curate.counting import QUANTILES, CoverageCounter, PartialCoverage, TopItems, estimate_background
from embedcache.curate.coverage import measure_coverage
from embedcache.search.faiss_index import RowIndex, make_index
from tests.curate.test_near_duplicates import write_vectors
from tests.recorded import RecordedProgress


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


@pytest.mark.slow
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
    assert (partial.num_items.shape, partial.counts.shape) == ((2,), (2, len(thresholds)))
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


def test_tiles_are_of_about_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    make = counting._scratch_arrays
    monkeypatch.setattr(counting, "_scratch_arrays", lambda *shape: shapes.append(shape) or make(*shape))
    work = CoverageCounter(
        np.eye(3, dtype=np.float32),
        thresholds_C=np.zeros(3, np.float32),
        floors_C=np.zeros(3, np.float32),
        nearest_CJ=np.zeros((3, 1), int),
        k=1,
    )
    for tile, num_rows in ((12, 1), (12, 64), (12, 65), (12, 130), (300, 100), (300, 130)):
        monkeypatch.setattr(counting, "_TILE", tile)
        work.process(np.arange(num_rows), np.ones((num_rows, 3), np.float32))
    assert shapes == [(1, 3), (64, 3), (33, 3), (44, 3), (100, 3), (65, 3)]


def test_scratch_arrays_are_kept() -> None:
    counting._SCRATCH.__dict__.clear()
    sims, mask = counting._scratch_arrays(4, 3)
    assert (sims.shape, mask.shape, sims.dtype, mask.dtype) == ((4, 3), (4, 3), np.float32, bool)
    assert counting._scratch_arrays(4, 3)[0] is counting._scratch_arrays(2, 3)[0] is sims
    assert counting._scratch_arrays(5, 3)[0].shape == (5, 3)
    assert counting._scratch_arrays(4, 2)[0].shape == (4, 2)


def test_items_at_a_floor_are_candidates_and_those_at_a_threshold_do_not_count() -> None:
    work = CoverageCounter(
        np.eye(2, dtype=np.float32),
        thresholds_C=np.array([1, 2], np.float32),
        floors_C=np.ones(2, np.float32),
        nearest_CJ=np.array([[1], [0]]),
        k=2,
    )
    partial = work.process(np.arange(3), np.array([[1, 0], [2, 1], [0, 3]], np.float32))
    assert partial.counts.tolist() == partial.assigned.tolist() == [[1, 1]]
    assert [array.tolist() for array in partial.top.table()] == [[[2, 1], [3, 1]], [[1, 0], [2, 1]]]


def test_sizes_are_as_documented() -> None:
    documented = (measure_coverage, estimate_background, counting.count_indexed)
    text = " ".join(" ".join(str(function.__doc__) for function in documented).split())
    for words in (
        f"thresholds come from {counting.SAMPLE:,} items drawn at random",
        f"a tile of {Decimal(4 * counting._TILE) / 10**6} MB of similarities",
        f"the similarities of {counting._CONCEPTS_PER_BLOCK} concepts",
        f"the vectors of {counting._ITEMS_PER_BLOCK:,} items",
    ):
        assert words in text


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


@pytest.mark.slow
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


def test_top_items_hold_few_candidates() -> None:
    """Check that more than twice what is asked for is cut to that."""
    top, sizes = TopItems(3, 2), []
    assert [array.tolist() for array in top.table()] == [[[-np.inf] * 2] * 3, [[-1] * 2] * 3]
    for row in range(14):
        top.add(np.array([row % 3]), np.array([row], np.float32), np.array([row]))
        sizes.append(sum(len(part[0]) for part in top._parts))
    assert sizes == [*range(1, 13), 6, 7]
    assert top.table()[1].tolist() == [[12, 9], [13, 10], [11, 8]]


@pytest.mark.slow
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


def test_search_continues_while_there_are_more_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the results of an index against a pass over all items, and the searches for 30, 6 and 2 matches."""
    kinds = np.array([0, 1, *[0] * 29, *[1] * 5, 2, 2])
    vectors = np.eye(3, dtype=np.float32)[kinds]
    pool, concepts = write_vectors(tmp_path / "cache", vectors), np.eye(3, dtype=np.float32)
    work = CoverageCounter(
        concepts,
        thresholds_C=np.array([2, 0.5, 0.5], np.float32),
        floors_C=np.ones(3, np.float32),
        nearest_CJ=np.array([[1], [2], [0]]),
        k=3,
        is_selected_N=np.arange(38) % 2 == 0,
    )
    index, searches, progress = make_index("Flat", 3), [], RecordedProgress()
    index.add(np.arange(38), vectors)
    search = RowIndex.search

    def recorded(self: RowIndex, queries: Array, k: int, *rest: Any) -> tuple[Array, Array]:
        searches.append((len(queries), k))
        return search(self, queries, k, *rest)

    monkeypatch.setattr(RowIndex, "search", recorded)
    monkeypatch.setattr(counting, "_FIRST_K", 4)
    monkeypatch.setattr(counting, "_ITEMS_PER_BLOCK", 8)
    found = counting.count_indexed(pool, work, concepts, index, {}, progress)
    exact = work.process(np.arange(38), vectors)
    for name in ("num_items", "num_covered", "counts", "assigned", "shared"):
        assert np.array_equal(getattr(found, name), getattr(exact, name)), name
    assert found.counts.tolist() == [[0, 6, 2], [0, 2, 1]]
    assert [array.tolist() for array in found.top.table()] == [array.tolist() for array in exact.top.table()]
    assert searches == [(2, 4), (1, 4), (1, 8), (1, 8), (1, 16), (1, 16), (1, 32), (1, 38)]
    assert progress.started == [("searching", 3, "concepts")]
    assert sum(progress.advances) == 3


def test_searches_for_many_results_are_more_thorough() -> None:
    for tuned, k, expected in (
        ({"nprobe": 3}, 256, {"nprobe": 12}),
        ({"nprobe": 3, "k_factor": 2}, 257, {"nprobe": 24, "k_factor": 2}),
        ({"efSearch": 16}, 8, {"efSearch": 16}),
        ({"efSearch": 16}, 9, {"efSearch": 32}),
        ({"efSearch": 16}, 17, {"efSearch": 48}),
        ({}, 300, {}),
    ):
        assert counting._more_thorough(tuned, k) == expected
