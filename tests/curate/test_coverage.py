"""What coverage counts, against plain counts, and which caches, indexes and settings it refuses."""

import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Inputs, normalize
from embedcache.curate import counting
from embedcache.curate.coverage import ConceptCounts, measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import DataError, FingerprintError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import load_pair, project
from embedcache.reports.coverage import concept_table
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.curate.conftest import FIXED, of_texts
from tests.edits import damage_column
from tests.search.test_concepts import NAMES, labeled_cache, prompt_cache
from tests.toy import TEXT


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_cache(tmp_path_factory.mktemp("labeled"), 60)


def test_counts_of_texts_equal_brute_force(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, **FIXED)
    texts = normalize(Cache(cache_path).feature("text", "open_toy/mean").load())
    sims = texts @ report.concepts.vectors.T
    cosines = report.concepts.vectors @ report.concepts.vectors.T - 2 * np.eye(len(NAMES))
    assert report.nearest.tolist() == cosines.argmax(axis=1).tolist()
    assert report.pool_counts.num_items == 300
    assert report.pool_counts.counts.tolist() == (sims > 0.45).sum(axis=0).tolist()
    assert report.pool_counts.num_covered == (sims > 0.45).any(axis=1).sum()
    np.testing.assert_allclose(report.scores, -np.sort(-sims, axis=0)[:5].T, atol=1e-5)
    captions = Cache(cache_path).items("text")["text"].to_pylist()
    for name, rows in zip(NAMES, report.rows, strict=True):
        assert all(name in captions[row] for row in rows)
    np.testing.assert_allclose(report.background.quantiles[:, 0], np.median(sims, axis=0), atol=0.02)


def test_counts_of_projected_images(cache_path: Path, prompts: Path, run_path: Path) -> None:
    settings = CoverageSettings(run=run_path, deviations=1.5, k=3, min_count=10)
    report = measure_coverage(cache_path, prompts, settings)
    images = project(load_pair(run_path)[0].image, Inputs(Cache(cache_path).feature("image", "open_toy/cls").load()))
    sims = images @ report.concepts.vectors.T
    ordered = np.sort(sims, axis=0)
    expected = ordered[150] + 1.5 * (ordered[150] - ordered[47])
    np.testing.assert_allclose(report.thresholds, expected, atol=0.02)
    assert report.pool_counts.counts.tolist() == (sims > report.thresholds).sum(axis=0).tolist()
    assert f", open_toy/cls projected by {run_path.name}; 6 concepts of " in report.line()
    backs = [caption.split()[-1] for caption in Cache(cache_path).items("text")["text"].to_pylist()]
    right = [backs[row] == name for name, rows in zip(NAMES, report.rows, strict=True) for row in rows]
    assert np.mean(right) > 0.4  # chance is a sixth


def test_counts_by_prototypes(cache_path: Path, labeled: Path) -> None:
    report = measure_coverage(cache_path, labeled, CoverageSettings(feature="open_toy/cls", deviations=1, k=5))
    images = normalize(Cache(cache_path).feature("image", "open_toy/cls").load())
    sims = images @ report.concepts.vectors.T
    assert report.pool_counts.counts.tolist() == (sims > report.thresholds).sum(axis=0).tolist()
    np.testing.assert_allclose(report.scores, -np.sort(-sims, axis=0)[:5].T, atol=1e-5)
    assert "6 concepts of 5 to 14 examples" in report.line()


@pytest.mark.slow
def test_chunk_size_changes_nothing(image_folder: Path, prompts: Path, cache_path: Path, tmp_path: Path) -> None:
    settings = ExtractSettings(features=("mean",), chunk_size=7)
    extract(open_source(image_folder), tmp_path / "small", text_encoder=[TEXT], settings=settings)
    one = of_texts(cache_path, prompts, **FIXED)
    other = measure_coverage(tmp_path / "small", prompts, CoverageSettings(modality="text", **FIXED))
    assert np.array_equal(one.pool_counts.counts, other.pool_counts.counts)
    assert np.array_equal(one.pool_counts.assigned, other.pool_counts.assigned)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
    assert [(pair.first, pair.second, pair.num_items) for pair in one.overlaps] == [
        (pair.first, pair.second, pair.num_items) for pair in other.overlaps
    ]


def test_selection_reads_no_captions(cache_path: Path, prompts: Path, half: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(cache_path, tmp_path / "cache"))
    damage_column(cache / "text/items.parquet", "text")
    report = of_texts(cache, prompts, selection=half, **FIXED)
    assert [counts.num_items for counts in report.all_counts] == [300, 150]


def test_selection_uses_thresholds_of_pool(cache_path: Path, prompts: Path, half: Path) -> None:
    report = of_texts(cache_path, prompts, deviations=1, k=2, selection=half)
    texts = normalize(Cache(cache_path).feature("text", "open_toy/mean").load())
    above = texts @ report.concepts.vectors.T > report.thresholds
    assert report.selection_counts is not None
    assert report.selection_counts.num_items == 150
    assert report.selection_counts.counts.tolist() == above[::2].sum(axis=0).tolist()
    assert report.pool_counts.counts.tolist() == above.sum(axis=0).tolist()
    assert [part.name for part in report.all_counts] == ["all texts", "half.parquet"]
    alone = of_texts(cache_path, prompts, deviations=1, k=2)
    assert np.array_equal(alone.pool_counts.counts, report.pool_counts.counts)
    assert alone.selection_counts is None


def test_gaps_and_overlaps(cache_path: Path, tmp_path: Path) -> None:
    prompts = prompt_cache(tmp_path, ["red", "red bar", "zebra"])
    report = of_texts(cache_path, prompts, threshold=0.6, min_count=20, k=1)
    gaps = report.pool_counts.gaps(20)
    assert report.concepts.names[gaps[0]] == "zebra"
    assert (report.pool_counts.counts[gaps] < 20).all()
    assert (np.diff(report.pool_counts.counts[gaps]) >= 0).all()
    texts = normalize(Cache(cache_path).feature("text", "open_toy/mean").load())
    above = texts @ report.concepts.vectors.T > 0.6
    first = report.overlaps[0]
    assert (first.first, first.second) == (0, 1)
    assert first.num_items == (above[:, 0] & above[:, 1]).sum() > 0
    assert first.jaccard == pytest.approx(first.num_items / (above[:, 0] | above[:, 1]).sum())
    assert first.cosine == pytest.approx(report.concepts.vectors[0] @ report.concepts.vectors[1], abs=1e-5)


def test_a_concept_with_the_least_count_is_no_gap(cache_path: Path, prompts: Path) -> None:
    counts = np.array([5, 2, 0, 3, 2])
    part = ConceptCounts(name="", num_items=9, num_covered=9, counts=counts, assigned=counts)
    assert part.gaps(3).tolist() == [2, 1, 4]
    report = of_texts(cache_path, prompts, **FIXED)
    counts = report.pool_counts.counts
    settings = replace(report.settings, min_count=int(counts.max()))
    assert set(replace(report, settings=settings).gaps().tolist()) == set(
        np.flatnonzero(counts < counts.max()).tolist()
    )


def test_overlaps_equal_brute_force(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, threshold=0.3, k=1)
    texts = normalize(Cache(cache_path).feature("text", "open_toy/mean").load())
    above, expected = texts @ report.concepts.vectors.T > 0.3, []
    for first, second in combinations(range(len(NAMES)), 2):
        both, either = above[:, [first, second]].all(axis=1).sum(), above[:, [first, second]].any(axis=1).sum()
        if both:
            expected.append((-both * both / either, first, second, both, pytest.approx(both / either)))
    assert len(expected) > 3
    found = [(pair.first, pair.second, pair.num_items, pair.jaccard) for pair in report.overlaps]
    assert found == [pair[1:] for pair in sorted(expected, key=lambda pair: pair[:3])]


def test_captions_of_one_language_are_counted(prompts: Path, tmp_path: Path) -> None:
    rows = [
        "caption,language",
        *(f"{name} bar {number},{'en' if number % 2 else 'de'}" for name in NAMES for number in range(6)),
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    extract(open_source(tmp_path / "t.csv"), tmp_path / "cache", text_encoder=[TEXT])
    german, both = (of_texts(tmp_path / "cache", prompts, language=name, **FIXED) for name in ("de", "any"))
    assert (german.pool_counts.num_items, both.pool_counts.num_items) == (3 * len(NAMES), 6 * len(NAMES))
    assert "texts in de, open_toy/mean" in german.line()
    languages = Cache(tmp_path / "cache").items("text")["language"].to_pylist()
    assert {languages[row] for row in german.rows.ravel()} == {"de"}
    with pytest.raises(SettingError, match="language: expected modality text or both, and no index, got images"):
        CoverageSettings(language="de")


def test_single_concept(cache_path: Path, tmp_path: Path) -> None:
    report = of_texts(cache_path, prompt_cache(tmp_path, ["red"]), deviations=1, k=300)
    assert report.nearest.tolist() == [-1]
    assert report.overlaps == []
    assert sorted(report.rows[0].tolist()) == list(range(300))
    assert concept_table(report, [0])[1][0][-1] == ""


def test_only_feature_of_the_concepts_is_used(cache_path: Path, prompts: Path) -> None:
    report = measure_coverage(cache_path, prompts, CoverageSettings(modality="text", **FIXED))
    named = of_texts(cache_path, prompts, **FIXED)
    assert report.pool.feature.name == "open_toy/mean"
    assert report.pool_counts.counts.tolist() == named.pool_counts.counts.tolist()


def test_equal_items_calibrate_no_threshold(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a red bar\n" * 9)
    extract(open_source(tmp_path / "texts.txt"), tmp_path / "cache", text_encoder=[TEXT])
    with pytest.raises(
        DataError, match=r"threshold: expected texts of .* that differ, to calibrate .*, got 9 of about"
    ):
        of_texts(tmp_path / "cache", prompts, k=3)
    assert of_texts(tmp_path / "cache", prompts, k=3, threshold=-0.5).pool_counts.num_covered == 9


def test_invalid_coverage_raises(cache_path: Path, prompts: Path, labeled: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="k: expected 1 to 300, the number of texts of .* with open_toy/mean, got 301"
    ):
        of_texts(cache_path, prompts, k=301)
    with pytest.raises(
        DataError,
        match=r"none of 300 texts .* of 6 concepts; the closest .*: highest similarity (0\.\d+), threshold 0.999; "
        r"the highest similarity of all is \1; give",
    ):
        of_texts(cache_path, prompts, threshold=0.999)
    other = prompt_cache(tmp_path, NAMES, f"{TEXT},scale=2")
    with pytest.raises(UnknownNameError, match="name one of these features: open_toy/mean, open_toy/tokens$"):
        measure_coverage(cache_path, other, CoverageSettings(modality="text"))
    with pytest.raises(FingerprintError, match="feature open_toy/mean .* weights: stored '.*', requested '.*'"):
        of_texts(cache_path, other)
    (tmp_path / "keys.txt").write_text("nobody\n")
    with pytest.raises(DataError, match="has 'nobody'"):
        of_texts(cache_path, prompts, selection=tmp_path / "keys.txt")
    for wrong in ({"threshold": 1.0}, {"deviations": 0.0}, {"k": 0}, {"min_count": 0}):
        (name,) = wrong
        with pytest.raises(SettingError, match=f"{name}: expected a .* number of .*, got|{name}: expected a number"):
            CoverageSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,SQ8"])
def test_coverage_through_index(
    cache_path: Path, prompts: Path, half: Path, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_FIRST_K", 4)
    build_index(
        cache_path, tmp_path / "index", IndexSettings(modality="text", feature="open_toy/mean", factory=factory)
    )
    options: dict[str, Any] = {"deviations": 1.0, "k": 7, "selection": half}
    exact = of_texts(cache_path, prompts, **options)
    found = of_texts(cache_path, prompts, **options, index=tmp_path / "index")
    assert found.pool_counts.num_items == exact.pool_counts.num_items
    assert (found.pool_counts.counts <= exact.pool_counts.counts).all()
    assert found.pool_counts.counts.sum() >= 0.95 * exact.pool_counts.counts.sum()
    assert found.index is not None
    assert found.warnings()[0] == (
        f"counted through an index, {factory}, whose measured recall@10 is {found.index.recall_at_10:.3f}: "
        "a count may be too low, never too high"
    )
    if factory == "Flat":
        for here, there in zip(found.all_counts, exact.all_counts, strict=True):
            assert np.array_equal(here.counts, there.counts)
            assert np.array_equal(here.assigned, there.assigned)
            assert here.num_covered == there.num_covered
        assert np.array_equal(found.rows, exact.rows)
        assert found.overlaps == exact.overlaps


def test_other_index_raises(cache_path: Path, prompts: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "index", IndexSettings(feature="open_toy/cls", factory="Flat"))
    with pytest.raises(FingerprintError, match="modality: stored 'image', requested 'text'.*--modality text"):
        of_texts(cache_path, prompts, index=tmp_path / "index")


def test_index_of_a_smaller_width_raises(cache_path: Path, prompts: Path, tmp_path: Path) -> None:
    settings = IndexSettings(modality="text", feature="open_toy/mean", factory="Flat", width=3)
    build_index(cache_path, tmp_path / "index", settings)
    with pytest.raises(FingerprintError, match=r"width: stored 3, requested \d+; build one: embedcache curate index"):
        of_texts(cache_path, prompts, index=tmp_path / "index")


def test_coverage_without_source(cache_path: Path, prompts: Path, run_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "moved")
    settings = CoverageSettings(run=run_path, deviations=1.5)
    one, other = (measure_coverage(path, prompts, settings) for path in (cache_path, tmp_path / "moved"))
    assert np.array_equal(one.pool_counts.counts, other.pool_counts.counts)
