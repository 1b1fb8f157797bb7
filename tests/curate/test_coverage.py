"""What coverage counts and estimates, against plain counts, and which caches, answers and settings it refuses."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Array, Inputs, normalize
from embedcache.curate.coverage import ConceptCounts, CoverageReport, measure_coverage
from embedcache.curate.prevalence import Estimate, write_answers
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.maintain.remove import remove_samples
from embedcache.projectors.base import project
from embedcache.reports.coverage import concept_table
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.curate.conftest import of_texts
from tests.edits import read_rows, write_tables
from tests.search.test_concepts import NAMES, labeled_cache, prompt_cache
from tests.toy import TEXT


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_cache(tmp_path_factory.mktemp("labeled"), 60)


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
    assert f", open_toy/cls projected by {run_path.name}; 6 concepts of " in report.line()
    backs = [caption.split()[-1] for caption in Cache(cache_path).items("text")["text"].to_pylist()]
    right = [backs[row] == name for name, rows in zip(NAMES, report.rows, strict=True) for row in rows]
    assert np.mean(right) > 0.4  # chance is a sixth


def test_counts_by_prototypes(cache_path: Path, labeled: Path) -> None:
    report = measure_coverage(cache_path, labeled, CoverageSettings(feature="open_toy/cls", k=5))
    images = normalize(Cache(cache_path).feature("image", "open_toy/cls").load())
    check_counts(report, images @ report.concepts.vectors.T)
    assert "6 concepts of 5 to 14 examples" in report.line()


def test_estimates_hold_the_true_counts(clear: Path) -> None:
    report = of_texts(clear / "cache", clear / "concepts", k=5)
    estimate = report.pool_counts.estimate
    assert report.pool_counts.can_tell.tolist() == [True, True, False]
    np.testing.assert_allclose(estimate.counts[:2], [50, 10], rtol=0.1)
    assert (estimate.lows[:2] <= [50, 10]).all()
    assert (estimate.highs[:2] >= [50, 10]).all()
    assert (estimate.lows[:2] >= [30, 6]).all()
    assert all(np.isnan(bound[2]) for bound in (estimate.counts, estimate.lows, estimate.highs))
    assert report.pool_counts.gaps(10**6).tolist() == [1, 0]


def test_items_of_related_concepts_count_for_both(clear: Path, tmp_path: Path) -> None:
    """Check the geometric means of the items above the threshold and those that no other concept fits better."""
    (tmp_path / "prompts.json").write_text(json.dumps({"zebra": ["zebra"], "zebra and": ["zebra zebra zebra and"]}))
    extract(open_source(f"prompts:{tmp_path / 'prompts.json'}"), tmp_path / "concepts", text_encoder=[TEXT])
    found = of_texts(clear / "cache", tmp_path / "concepts", k=1).pool_counts
    assert found.above.tolist() == [50, 50]
    np.testing.assert_allclose(found.estimate.counts, np.sqrt([50 * 1, 50 * 49]), rtol=0.1)


@pytest.mark.slow
def test_chunk_size_changes_nothing(image_folder: Path, prompts: Path, cache_path: Path, tmp_path: Path) -> None:
    settings = ExtractSettings(features=("mean",), chunk_size=7)
    extract(open_source(image_folder), tmp_path / "small", text_encoder=[TEXT], settings=settings)
    one = of_texts(cache_path, prompts, k=5)
    other = measure_coverage(tmp_path / "small", prompts, CoverageSettings(modality="text", k=5))
    for name in ("above", "best", "certain"):
        assert np.array_equal(getattr(one.pool_counts, name), getattr(other.pool_counts, name)), name
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
    assert [(pair.first, pair.second, pair.num_items) for pair in one.overlaps] == [
        (pair.first, pair.second, pair.num_items) for pair in other.overlaps
    ]


def test_selection_reads_no_captions(cache_path: Path, prompts: Path, half: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_path, tmp_path / "cache"))
    write_tables(cache, text=read_rows(cache, "text").drop_columns(["text"]))
    report = of_texts(cache, prompts, selection=half, k=5)
    assert [counts.num_items for counts in report.all_counts] == [300, 150]


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


def test_overlaps_equal_brute_force(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, k=1)
    texts = normalize(Cache(cache_path).feature("text", "open_toy/mean").load())
    above, cosines = texts @ report.concepts.vectors.T > report.thresholds, report.concepts.vectors
    expected = []
    for first, second in combinations(range(len(NAMES)), 2):
        both, either = above[:, [first, second]].all(axis=1).sum(), above[:, [first, second]].any(axis=1).sum()
        if both:
            cosine = pytest.approx(cosines[first] @ cosines[second], abs=1e-5)
            expected.append((-both * both / either, first, second, both, pytest.approx(both / either), cosine))
    assert len(expected) > 3
    found = [(pair.first, pair.second, pair.num_items, pair.jaccard, pair.cosine) for pair in report.overlaps]
    assert found == [pair[1:] for pair in sorted(expected, key=lambda pair: pair[:3])]


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
    assert report.overlaps == []
    assert sorted(report.rows[0].tolist()) == list(range(300))
    assert concept_table(report, [0])[1][0][-1] == ""


def test_only_feature_of_the_concepts_is_used(cache_path: Path, prompts: Path) -> None:
    report = measure_coverage(cache_path, prompts, CoverageSettings(modality="text", k=5))
    assert report.pool.feature.name == "open_toy/mean"


def test_of_equal_items_nothing_is_told(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a red bar\n" * 9)
    extract(open_source(tmp_path / "texts.txt"), tmp_path / "cache", text_encoder=[TEXT])
    report = of_texts(tmp_path / "cache", prompts, k=3)
    assert not report.pool_counts.can_tell.any()
    assert report.warnings()[0].startswith("for 6 of 6 concepts the scores cannot tell")


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
    other = prompt_cache(tmp_path, NAMES, f"{TEXT},scale=2")
    with pytest.raises(UnknownNameError, match="tokens"):
        measure_coverage(cache_path, other, CoverageSettings(modality="text"))
    with pytest.raises(FingerprintError, match="weights"):
        of_texts(cache_path, other)
    (tmp_path / "keys.txt").write_text("nobody\n")
    with pytest.raises(DataError, match="nobody"):
        of_texts(cache_path, prompts, selection=tmp_path / "keys.txt")


def test_coverage_without_source(cache_path: Path, prompts: Path, run_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "moved")
    one, other = (measure_coverage(path, prompts, run=run_path) for path in (cache_path, tmp_path / "moved"))
    assert np.array_equal(one.pool_counts.above, other.pool_counts.above)
