"""What coverage counts and estimates, against plain counts, and which caches, answers and settings it refuses."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Array, Inputs, normalize
from embedcache.curate import coverage
from embedcache.curate.coverage import (
    POSSIBLE,
    ConceptCounts,
    CoverageCounter,
    CoverageReport,
    Estimate,
    PartialCoverage,
    estimate_background,
    measure_coverage,
    measure_coverage_by_modality,
    strip_ranks,
    write_answers,
)
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError
from embedcache.extract.extract import extract
from embedcache.maintain.remove import remove_samples
from embedcache.projectors.base import project
from embedcache.reports.coverage import coverage_json
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.curate.conftest import of_texts
from tests.search.test_concepts import NAMES, prompt_cache
from tests.toy import TEXT


def check_counts(report: CoverageReport, sims: Array) -> None:
    """Compare a report with the similarities (N, C) of all items."""
    above, best = sims > report.thresholds, sims.argmax(axis=1)
    is_certain = sims.max(axis=1) > report.background.certain[best]
    assert report.pool_counts.above.tolist() == above.sum(axis=0).tolist()
    assert report.pool_counts.num_covered == above.any(axis=1).sum()
    assert report.pool_counts.best.tolist() == np.bincount(best, minlength=len(NAMES)).tolist()
    assert report.pool_counts.certain.tolist() == np.bincount(best[is_certain], minlength=len(NAMES)).tolist()
    np.testing.assert_allclose(report.scores, -np.sort(-sims, axis=0)[: report.settings.k].T, atol=1e-5)
    medians = np.sort(sims, axis=0)[round((len(sims) - 1) / 2)]
    np.testing.assert_allclose(report.background.scale.medians, medians, atol=1e-5)


def test_counts_of_texts_equal_brute_force(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, k=5)
    texts = normalize(Cache(cache_path).feature("text", "open_toy/mean").load())
    check_counts(report, texts @ report.concepts.vectors.T)
    cosines = report.concepts.vectors @ report.concepts.vectors.T - 2 * np.eye(len(NAMES))
    assert report.nearest.tolist() == cosines.argmax(axis=1).tolist()
    captions = Cache(cache_path).items("text")["text"].to_pylist()
    for name, rows in zip(NAMES, report.rows, strict=True):
        assert all(name in captions[row] for row in rows)
    strips = np.take_along_axis(texts @ report.concepts.vectors.T, report.strip_rows.T, axis=0).T
    np.testing.assert_allclose(strips, report.background.strip_cosines, atol=1e-5)


def test_counts_of_projected_images(cache_path: Path, prompts: Path, run_path: Path) -> None:
    report = measure_coverage(cache_path, prompts, CoverageSettings(run=run_path, k=3, min_count=10))
    images = project(Run.open(run_path).pair.image, Inputs(Cache(cache_path).feature("image", "open_toy/cls").load()))
    check_counts(report, images @ report.concepts.vectors.T)


def test_estimates_hold_the_true_counts(clear: Path) -> None:
    report = of_texts(clear / "cache", clear / "concepts", k=5)
    estimate = report.pool_counts.estimate
    assert report.pool_counts.can_tell.tolist() == [True, True, False]
    np.testing.assert_allclose(estimate.counts[:2], [50, 10], rtol=0.1)
    assert (estimate.lows[:2] <= [50, 10]).all()
    assert (estimate.highs[:2] >= [50, 10]).all()
    assert (estimate.lows[:2] >= [30, 6]).all()
    assert all(np.isnan(bound[2]) for bound in (estimate.counts, estimate.lows, estimate.highs))
    assert "1 of 3" in report.warnings()[0]
    assert report.pool_counts.gaps(60).tolist() == [1]
    assert report.pool_counts.gaps(10**6).tolist() == [1, 0]
    (zebra, _, gnu) = json.loads(json.dumps(coverage_json(report), allow_nan=False))["concepts"]
    assert zebra["low"] <= zebra["count"] == 50 <= zebra["high"]
    assert (gnu["count"], gnu["low"], gnu["high"]) == (None, None, None)


def test_items_of_related_concepts_count_for_both(clear: Path, tmp_path: Path) -> None:
    """Check the geometric means of the items above the threshold and those that no other concept fits better."""
    (tmp_path / "prompts.json").write_text(json.dumps({"zebra": ["zebra"], "zebra and": ["zebra zebra zebra and"]}))
    extract(open_source(f"prompts:{tmp_path / 'prompts.json'}"), tmp_path / "concepts", text_encoder=[TEXT])
    found = of_texts(clear / "cache", tmp_path / "concepts", k=1).pool_counts
    assert found.above.tolist() == [50, 50]
    np.testing.assert_allclose(found.estimate.counts, np.sqrt([50 * 1, 50 * 49]), rtol=0.1)


def test_selection_uses_thresholds_of_pool(clear: Path) -> None:
    report = of_texts(clear / "cache", clear / "concepts", k=2, selection=clear / "half.parquet")
    pool, part = report.all_counts
    above = (
        normalize(report.pool.cache.feature("text", "open_toy/mean").load()) @ report.concepts.vectors.T
        > report.thresholds
    )
    assert [(counts.name, counts.num_items) for counts in (pool, part)] == [("all texts", 600), ("half.parquet", 300)]
    assert part.above.tolist() == above[::2].sum(axis=0).tolist()
    np.testing.assert_allclose(part.estimate.counts[:2], [25, 5], rtol=0.25)
    assert (part.estimate.highs[:2] >= [25, 5]).all()
    assert (part.estimate.highs[:2] < pool.estimate.highs[:2]).all()
    alone = of_texts(clear / "cache", clear / "concepts", k=2)
    np.testing.assert_array_equal(alone.pool_counts.estimate.counts, pool.estimate.counts)
    assert alone.selection_counts is None


def test_gaps_are_concepts_whose_upper_bound_is_below_the_least_count() -> None:
    counts, zeros = np.array([5.0, 2.0, 0.5, np.nan, 2.0]), np.zeros(5, int)
    highs = np.array([9.0, 3.0, 2.0, np.nan, 2.5])
    estimate = Estimate(counts=counts, lows=counts, highs=highs)
    columns = {"above": np.array([9, 4, 2, 0, 3]), "best": zeros, "certain": zeros}
    part = ConceptCounts(name="", num_items=9, num_covered=9, estimate=estimate, prior=estimate, **columns)
    assert part.gaps(3).tolist() == [2, 4]
    assert part.gaps(4).tolist() == [2, 4, 1]


def test_captions_of_one_language_are_counted(prompts: Path, tmp_path: Path) -> None:
    rows = [
        "caption,language",
        *(f"{name} bar {number},{'en' if number % 2 else 'de'}" for name in NAMES for number in range(6)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    extract(open_source(tmp_path / "t.csv"), tmp_path / "cache", text_encoder=[TEXT])
    german, both = (of_texts(tmp_path / "cache", prompts, language=name, k=5) for name in ("de", "any"))
    assert (german.pool_counts.num_items, both.pool_counts.num_items) == (3 * len(NAMES), 6 * len(NAMES))
    assert "texts in de, open_toy/mean" in german.line()
    languages = Cache(tmp_path / "cache").items("text")["language"].to_pylist()
    assert {languages[row] for row in german.rows.ravel()} == {"de"}


def test_single_concept(cache_path: Path, tmp_path: Path) -> None:
    report = of_texts(cache_path, prompt_cache(tmp_path, ["red"]), k=300)
    assert report.nearest.tolist() == [-1]
    assert sorted(report.rows[0].tolist()) == list(range(300))


def answered(report: CoverageReport, name: str, *, shows: bool) -> dict[str, dict[int, bool]]:
    number = report.concepts.names.index(name)
    return {name: dict.fromkeys(report.strip_rows[number].tolist(), shows)}


def test_answers_settle_a_concept_and_no_other(clear: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"k": 3, "selection": clear / "half.parquet"}
    before = of_texts(clear / "cache", clear / "concepts", **options)
    for shows in (True, False):
        answers = answered(before, "gnu", shows=shows)
        write_answers(tmp_path / "a.json", answers, before.pool.cache, "text")
        after = of_texts(clear / "cache", clear / "concepts", **options, answers=tmp_path / "a.json")
        assert after.answers == answers
        for one, other in zip(before.all_counts, after.all_counts, strict=True):
            np.testing.assert_array_equal(one.estimate.counts[:2], other.estimate.counts[:2])
            assert other.can_tell.all()
            assert other.estimate.lows[2] <= other.estimate.counts[2] <= other.estimate.highs[2] <= other.num_items
            assert (other.estimate.counts[2] > one.prior.counts[2]) == shows
        assert after.thresholds[:2].tolist() == before.thresholds[:2].tolist()
        assert (after.thresholds[2] < before.thresholds[2]) == shows
        assert after.thresholds[2] <= after.scores[2, 0]
        assert after.warnings() == []


def test_answers_about_removed_items_are_left_out(clear: Path, tmp_path: Path) -> None:
    report = of_texts(clear / "cache", clear / "concepts", k=3)
    answers = answered(report, "zebra", shows=True)
    write_answers(tmp_path / "a.json", {**answers, "other": {0: True}}, report.pool.cache, "text")
    cache = Path(shutil.copytree(clear / "cache", tmp_path / "cache"))
    keys = Cache(cache).column("key").to_pylist()
    first, second, *others = answers["zebra"]
    remove_samples(cache, [keys[first], keys[second]])
    found = of_texts(cache, clear / "concepts", k=3, answers=tmp_path / "a.json")
    assert found.answers == {"zebra": dict.fromkeys(others, True)}


def test_answers_about_other_items_raise(clear: Path, cache_path: Path, prompts: Path, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.json", Cache(cache_path)
    with pytest.raises(PathError, match="exist"):
        of_texts(cache_path, prompts, answers=path)
    write_answers(path, {"red": {0: True}}, Cache(clear / "cache"), "text")
    with pytest.raises(FingerprintError, match="samples"):
        of_texts(cache_path, prompts, answers=path)
    write_answers(path, {"red": {0: True}}, cache, "image")
    with pytest.raises(DataError, match="images"):
        of_texts(cache_path, prompts, answers=path)
    path.write_text("{}")
    with pytest.raises(CorruptError):
        of_texts(cache_path, prompts, answers=path)


def test_invalid_coverage_raises(cache_path: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="301"):
        of_texts(cache_path, prompts, k=301)
    (tmp_path / "keys.txt").write_text("nobody\n")
    with pytest.raises(DataError, match="nobody"):
        of_texts(cache_path, prompts, selection=tmp_path / "keys.txt")


@pytest.mark.slow
def test_both_modalities_are_those_of_each_alone(cache_path: Path, prompts: Path, run_path: Path) -> None:
    reports = measure_coverage_by_modality(cache_path, prompts, modality="both", run=run_path)
    assert list(reports) == ["image", "text"]
    for modality, report in reports.items():
        alone = measure_coverage(cache_path, prompts, modality=modality, run=run_path)
        assert coverage_json(report) == coverage_json(alone)
    with pytest.raises(SettingError, match="both"):
        measure_coverage(cache_path, prompts, modality="both", run=run_path)


def small(rng: np.random.Generator, *shape: int) -> Array:
    """Whole numbers from -2 to 2: products are exact in float32, and many tie."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def counter(concepts: Array, sample: Array, *, k: int, **limits: Any) -> CoverageCounter:
    """A counter with other thresholds, limits of certainty or floors than those of the sample."""
    selected = limits.pop("selected", None)
    given = {name: np.broadcast_to(np.float32(limit), len(concepts)) for name, limit in limits.items()}
    background = replace(estimate_background(concepts, sample, k), **given)
    return CoverageCounter(concepts, background, k=k, is_selected_N=selected)


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
    return {
        "rows": rows,
        "vectors": vectors,
        "concepts": concepts,
        "sample": vectors[sampled],
        "thresholds": rng.integers(-5, 9, num_concepts),
        "certain": rng.integers(-5, 9, num_concepts),
        "selected": rng.random(num_items + 20) < draw(st.floats(0, 1)),
        "k": np.array(k),
        "cuts": np.sort(rng.integers(0, num_items + 1, draw(st.integers(0, 5)))),
    }


@pytest.mark.slow
@given(problems())
def test_counter_equals_brute_force(problem: dict[str, Array]) -> None:
    rows, thresholds, k = problem["rows"], problem["thresholds"], int(problem["k"])
    limits = {name: problem[name] for name in ("thresholds", "certain", "selected")}
    work = counter(problem["concepts"], problem["sample"], k=k, **limits)
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
    scores, places = best_of(sims, k)
    assert np.array_equal(partial.top.scores, scores)
    assert np.array_equal(partial.top.numbers, rows[places])


def test_tile_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    concepts, vectors, rows = small(rng, 5, 4), small(rng, 100, 4), np.arange(100)
    whole, tiled = [], []
    for found, tile in ((whole, 10**6), (tiled, 15)):
        monkeypatch.setattr(coverage, "_TILE", tile)
        monkeypatch.setattr(coverage, "_MIN_TILE_ROWS", 1)
        partial = counter(concepts, vectors[:20], k=3, thresholds=1, certain=2).process(rows, vectors)
        found += [partial.above, partial.best, partial.assigned, partial.certain]
        found += [partial.top.scores, partial.top.numbers]
    assert all(np.array_equal(one, other) for one, other in zip(whole, tiled, strict=True))


def test_items_at_a_floor_are_candidates_and_those_at_a_threshold_do_not_count() -> None:
    eye = np.eye(2, dtype=np.float32)
    work = counter(eye, eye, k=2, thresholds=[1, 2], certain=[2, 3], floors=1)
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
    sims = (concepts @ sample.T)[:, : coverage.STRIP_SAMPLE]
    assert background.strips.shape == background.strip_cosines.shape == (40, 24)
    np.testing.assert_allclose(np.take_along_axis(sims, background.strips, axis=1), background.strip_cosines, atol=1e-6)
    np.testing.assert_allclose(background.strip_cosines, -np.sort(-sims)[:, strip_ranks(sims.shape[1])], atol=1e-6)
