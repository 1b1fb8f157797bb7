import copy
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Array, normalize
from embedcache.curate import counting
from embedcache.curate.counting import CoverageCounter, PartialCoverage, estimate_background
from embedcache.curate.prevalence import POSSIBLE, strip_ranks


def small(rng: np.random.Generator, *shape: int) -> Array:
    """Whole numbers from -2 to 2: products are exact in float32, and many tie."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def counter(concepts: Array, sample: Array, *, k: int, nearest: Any = None, **limits: Any) -> CoverageCounter:
    """A counter with other thresholds, limits of certainty or floors than those of the sample."""
    selected = limits.pop("selected", None)
    given = {name: np.broadcast_to(np.float32(limit), len(concepts)) for name, limit in limits.items()}
    background = replace(estimate_background(concepts, sample, k), **given)
    nearest = np.zeros((len(concepts), 1), int) if nearest is None else np.array(nearest)
    return CoverageCounter(concepts, background, nearest_CJ=nearest, k=k, is_selected_N=selected)


def best_of(sims_NC: Array, k: int) -> tuple[Array, Array]:
    """Sort everything: scores and rows (C, k), ties in row order, padded with -inf and -1."""
    order = np.argsort(-sims_NC.T, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(sims_NC.T, order, axis=1)
    padding = ((0, 0), (0, k - order.shape[1]))
    return np.pad(scores, padding, constant_values=-np.inf), np.pad(order, padding, constant_values=-1)


def count(work: CoverageCounter, rows: Array, vectors: Array, cuts: Sequence[int]) -> PartialCoverage:
    parts = [work.process(*part) for part in zip(np.split(rows, cuts), np.split(vectors, cuts), strict=True)]
    return reduce(work.merge, parts, work.empty())


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
        "sample": vectors[sampled],
        "thresholds": rng.integers(-5, 9, num_concepts),
        "certain": rng.integers(-5, 9, num_concepts),
        "near": others.reshape(num_concepts, -1)[:, : draw(st.integers(0, max(0, num_concepts - 1)))],
        "selected": rng.random(num_items + 20) < draw(st.floats(0, 1)),
        "k": np.array(k),
        "cuts": np.sort(rng.integers(0, num_items + 1, draw(st.integers(0, 5)))),
    }


@pytest.mark.slow
@given(problems())
def test_counter_equals_brute_force(problem: dict[str, Array]) -> None:
    rows, thresholds, near, k = problem["rows"], problem["thresholds"], problem["near"], int(problem["k"])
    limits = {name: problem[name] for name in ("thresholds", "certain", "selected")}
    work = counter(problem["concepts"], problem["sample"], k=k, nearest=near, **limits)
    partial = count(work, rows, problem["vectors"], problem["cuts"].tolist())
    sims = problem["vectors"] @ problem["concepts"].T
    above, best, highest = sims > thresholds, sims.argmax(axis=1), sims.max(axis=1)
    assert (partial.num_items.shape, partial.above.shape) == ((2,), (2, len(thresholds)))
    for group, chosen in enumerate((np.ones(len(rows), bool), problem["selected"][rows])):
        assert partial.num_items[group] == chosen.sum()
        assert partial.num_covered[group] == (above.any(axis=1) & chosen).sum()
        assert partial.above[group].tolist() == above[chosen].sum(axis=0).tolist()
        for name, mask in (
            ("best", chosen),
            ("assigned", chosen & (highest > thresholds[best])),
            ("certain", chosen & (highest > problem["certain"][best])),
        ):
            expected = np.bincount(best[mask], minlength=len(thresholds))
            assert getattr(partial, name)[group].tolist() == expected.tolist(), name
    for concept, others in enumerate(near):
        both = [int((above[:, concept] & above[:, other]).sum()) for other in others]
        assert partial.shared[concept].tolist() == both
    scores, places = best_of(sims, k)
    assert np.array_equal(partial.top.scores, scores)
    assert np.array_equal(partial.top.numbers, rows[places])


def test_tile_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    concepts, vectors, rows = small(rng, 5, 4), small(rng, 100, 4), np.arange(100)
    whole, tiled = [], []
    for found, tile in ((whole, 10**6), (tiled, 15)):
        monkeypatch.setattr(counting, "_TILE", tile)
        monkeypatch.setattr(counting, "_MIN_TILE_ROWS", 1)
        partial = counter(concepts, vectors[:20], k=3, thresholds=1, certain=2).process(rows, vectors)
        found += [partial.above, partial.best, partial.assigned, partial.certain, partial.shared]
        found += [partial.top.scores, partial.top.numbers]
    assert all(np.array_equal(one, other) for one, other in zip(whole, tiled, strict=True))


def test_tiles_are_of_about_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    make = counting._scratch_arrays
    monkeypatch.setattr(counting, "_scratch_arrays", lambda *shape: shapes.append(shape) or make(*shape))
    work = counter(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), k=1)
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
    eye = np.eye(2, dtype=np.float32)
    work = counter(eye, eye, k=2, nearest=[[1], [0]], thresholds=[1, 2], certain=[2, 3], floors=1)
    partial = work.process(np.arange(3), np.array([[1, 0], [2, 1], [0, 3]], np.float32))
    assert partial.above.tolist() == partial.assigned.tolist() == [[1, 1]]
    assert (partial.best.tolist(), partial.certain.tolist()) == ([[2, 1]], [[0, 0]])
    assert (partial.top.scores.tolist(), partial.top.numbers.tolist()) == ([[2, 1], [3, 1]], [[1, 0], [2, 1]])


def test_merge_of_copied_read_only_parts() -> None:
    """As Ray returns them."""
    rng = np.random.default_rng(0)
    concepts, vectors = small(rng, 4, 3), small(rng, 30, 3)
    work = counter(concepts, vectors, k=2, thresholds=0)
    parts = [
        copy.deepcopy(work).process(np.arange(start, start + 10), vectors[start : start + 10]) for start in (0, 10, 20)
    ]
    parts = [copy.deepcopy(part) for part in parts]
    for array in (array for part in parts for array in vars(part).values() if isinstance(array, np.ndarray)):
        array.flags.writeable = False
    partial = reduce(work.merge, parts, work.empty())
    assert partial.above[0].tolist() == (vectors @ concepts.T > 0).sum(axis=0).tolist()


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    rng = np.random.default_rng(0)
    concepts = normalize(rng.standard_normal((40, 16)))
    peaks = []
    for num_chunks in (40, 400):
        near, sample = np.tile(np.arange(8), (40, 1)), normalize(rng.standard_normal((1000, 16)))
        work = counter(concepts, sample, k=5, nearest=near, thresholds=0.8)
        tracemalloc.start()
        partial = work.process(np.arange(0), concepts[:0])
        for chunk in range(num_chunks):
            vectors = normalize(rng.standard_normal((256, 16)))
            partial = work.merge(partial, work.process(np.arange(256) + 256 * chunk, vectors))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert partial.num_items[0] == 256 * num_chunks
    assert peaks[1] < 1.2 * peaks[0]


def test_background_of_a_sample() -> None:
    rng = np.random.default_rng(0)
    concepts, sample = normalize(rng.standard_normal((200, 8))), normalize(rng.standard_normal((5001, 8)))
    background = estimate_background(concepts, sample, 7)
    sims = concepts @ sample.T
    np.testing.assert_allclose(background.scale.medians, np.median(sims, axis=1), atol=1e-6)
    assert ((np.median(sims, axis=1) < background.thresholds) & (background.thresholds < background.certain)).all()
    assert (background.certain < sims.max(axis=1)).all()
    possible = sims > background.scale.cosines(POSSIBLE)[:, None]
    np.testing.assert_allclose(background.possible, possible.sum(axis=1), atol=1)
    assert (background.floors < np.sort(sims, axis=1)[:, -7]).all()
    assert (background.floors > np.sort(sims, axis=1)[:, -8] - 1e-4).all()


def test_strips_are_items_of_all_ranks() -> None:
    rng = np.random.default_rng(0)
    concepts, sample = normalize(rng.standard_normal((40, 8))), normalize(rng.standard_normal((5001, 8)))
    background = estimate_background(concepts, sample, 7)
    sims = (concepts @ sample.T)[:, : counting.STRIP_SAMPLE]
    assert background.strips.shape == background.strip_cosines.shape == (40, 24)
    np.testing.assert_allclose(np.take_along_axis(sims, background.strips, axis=1), background.strip_cosines, atol=1e-6)
    np.testing.assert_allclose(background.strip_cosines, -np.sort(-sims)[:, strip_ranks(sims.shape[1])], atol=1e-6)
