import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from embedcache.arrays import Inputs, normalize
from embedcache.cli.main import app
from embedcache.curate import counting, coverage
from embedcache.curate.coverage import ConceptCounts, CoverageReport, _check_any_covered, measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import DataError, FingerprintError, SettingError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import load_pair, project
from embedcache.reports.coverage import concept_table, coverage_json, overlap_table, summary_table, write_coverage_page
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.interop.runs import SIDES, train_run
from tests.search.test_concepts import NAMES, labeled_cache, prompt_cache
from tests.toy import TEXT

FIXED: dict[str, Any] = {"threshold": 0.45, "k": 5}


@pytest.fixture(scope="module")
def run_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(cache_path, tmp_path_factory.mktemp("run") / "run", *SIDES["vectors"])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_cache(tmp_path_factory.mktemp("prompts"), NAMES)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_cache(tmp_path_factory.mktemp("labeled"), 60)


@pytest.fixture(scope="module")
def half(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection of every second sample."""
    path, rows = tmp_path_factory.mktemp("half") / "half.parquet", np.arange(0, 300, 2)
    write_selection(path, Cache(cache_path), Selection(rows=rows, reasons=["even"] * 150), {"method": "test"})
    return path


def of_texts(cache_path: Path, prompts: Path, **options: Any) -> CoverageReport:
    return measure_coverage(cache_path, prompts, CoverageSettings(modality="text", feature="open_toy/mean", **options))


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


def test_line_says_what_was_counted(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, **FIXED)
    line = f"{cache_path.name}: 300 texts{{}}, open_toy/mean; 6 concepts of {{}}; {{}}"
    for counts, each in (
        ([3, 3], "3 prompts"),
        ([1, 1], "1 prompt"),
        ([2, 2], "2 prompts"),
        ([1, 4], "1 to 4 prompts"),
    ):
        concepts = replace(report.concepts, counts=np.array(counts))
        assert replace(report, concepts=concepts).line() == line.format("", each, "threshold 0.45 for all")
    for language, words in (("de", " in de"), ("any", "")):
        changed = replace(report, settings=replace(report.settings, language=language))
        assert changed.line() == line.format(words, "3 prompts", "threshold 0.45 for all")
    settings = replace(report.settings, threshold=None, deviations=2.5)
    thresholds = np.array([0.25, 0.125, 0.5], np.float32)
    assert replace(report, settings=settings, thresholds=thresholds).line() == line.format(
        "", "3 prompts", "thresholds 2.5 deviations above each background (0.125 to 0.500)"
    )
    assert f"each is compared with the {coverage._NUM_NEAREST} nearest" in " ".join(str(CoverageReport.__doc__).split())


def test_equal_gaps_are_ordered_by_nearness(cache_path: Path, tmp_path: Path) -> None:
    report = of_texts(cache_path, prompt_cache(tmp_path, ["red bar", "zebra", "yak", "bar on"]), threshold=0.62, k=1)
    gaps = report.gaps()
    assert report.pool_counts.counts[gaps].tolist() == sorted(report.pool_counts.counts[gaps].tolist())
    empty = [number for number in gaps if not report.pool_counts.counts[number]]
    margins = report.thresholds[empty] - report.scores[empty, 0]
    assert len(empty) >= 2
    assert (np.diff(margins) >= 0).all()


def test_chance_counts_all_concepts(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, deviations=1)
    one, any_of_all = report.expected_by_chance, report.covered_by_chance
    assert one is not None
    assert one == pytest.approx(300 * NormalDist().cdf(-1))
    empty = replace(report, pool_counts=replace(report.pool_counts, num_items=0))
    assert empty.covered_by_chance is None
    assert any_of_all == pytest.approx(300 * (1 - (1 - one / 300) ** len(NAMES)))
    assert ["items above any threshold by chance", f"{any_of_all:,.2g}"] in summary_table(report)[1]


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


def test_tables_json_and_page(cache_path: Path, prompts: Path, run_path: Path, half: Path, tmp_path: Path) -> None:
    settings = CoverageSettings(run=run_path, deviations=1.5, k=4, min_count=25, selection=half)
    report = measure_coverage(cache_path, prompts, settings)
    columns, rows = summary_table(report)
    assert columns == ["", "all images", "half.parquet"]
    assert rows[0] == ["items", "300", "150"]
    assert {len(row) for row in rows} == {3}
    columns, rows = concept_table(report, [2, 0])
    assert [row[0] for row in rows] == [NAMES[2], NAMES[0]]
    assert {len(row) for row in rows} == {len(columns)}
    assert {len(row) for row in overlap_table(report)[1]} <= {5}
    found = json.loads(json.dumps(coverage_json(report)))
    assert [concept["name"] for concept in found["concepts"]] == NAMES
    assert found["concepts"][0]["counts"] == [int(part.counts[0]) for part in report.all_counts]
    assert found["concepts"][0]["best"][0]["key"] == f"{report.rows[0, 0]:05d}"
    assert found["parts"][1]["gaps"] == [NAMES[number] for number in report.all_counts[1].gaps(25)]
    assert found["pool"]["run_weights"] == load_pair(run_path)[1].weights_digest
    assert found["concepts_from"]["of"] == "prompts"
    write_coverage_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/webp") == 4 * len(NAMES)
    assert page.count("<svg") == 1
    assert "Gaps" in page


def test_page_of_texts(cache_path: Path, tmp_path: Path) -> None:
    many = [f"{name} {place} {number}" for name in NAMES for place in ("bar", "left") for number in range(9)]
    report = of_texts(cache_path, prompt_cache(tmp_path, many), deviations=1, k=2)
    write_coverage_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "<img" not in page
    assert "100 of 108 concepts" in page
    assert Cache(cache_path).items("text")["text"][int(report.rows[0, 0])].as_py() in page


def test_warnings(cache_path: Path, prompts: Path) -> None:
    report = of_texts(cache_path, prompts, deviations=1, min_count=5)
    assert "48 of 300 items are above a threshold by chance, and a concept needs only 5" in report.warnings()[0]
    low = of_texts(cache_path, prompts, threshold=-0.9)
    assert low.warnings() == [
        "WARNING: for 6 of 6 concepts at least half of the pool is above the threshold; raise --threshold"
    ]
    assert low.expected_by_chance is low.covered_by_chance is None
    assert of_texts(cache_path, prompts, deviations=2).warnings() == []


def test_warnings_at_their_limits(cache_path: Path, prompts: Path) -> None:
    """Check a threshold at the median, above which half of a normal background is."""
    report = of_texts(cache_path, prompts, deviations=2)
    for min_count, num_warnings in ((150, 1), (151, 0)):
        settings = replace(report.settings, deviations=1e-300, min_count=min_count)
        assert len(replace(report, settings=settings).warnings()) == num_warnings
    thresholds = np.nextafter(report.background.quantiles[:, 0], np.float32(1))
    assert replace(report, thresholds=thresholds).warnings() == []
    thresholds[:2] = report.background.quantiles[:2, 0]
    assert replace(report, thresholds=thresholds).warnings() == [
        "WARNING: for 2 of 6 concepts at least half of the pool is above the threshold; raise --threshold"
    ]


def test_invalid_coverage_raises(cache_path: Path, prompts: Path, labeled: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="name one of these features: open_toy/mean, open_toy/tokens$"):
        measure_coverage(cache_path, prompts, CoverageSettings(modality="text"))
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
    with pytest.raises(FingerprintError, match="feature open_toy/mean .* weights: stored '.*', requested '.*'"):
        of_texts(cache_path, other)
    (tmp_path / "keys.txt").write_text("nobody\n")
    with pytest.raises(DataError, match="has 'nobody'"):
        of_texts(cache_path, prompts, selection=tmp_path / "keys.txt")
    for wrong in ({"threshold": 1.0}, {"deviations": 0.0}, {"k": 0}, {"min_count": 0}):
        (name,) = wrong
        with pytest.raises(SettingError, match=f"{name}: expected a .* number of .*, got|{name}: expected a number"):
            CoverageSettings(**wrong)  # type: ignore[arg-type]


def test_command(cache_path: Path, prompts: Path, half: Path, tmp_path: Path) -> None:
    words = ["curate", "coverage", str(cache_path), str(prompts), "--modality", "text", "--feature", "open_toy/mean"]
    words += ["--threshold", "0.45", "-k", "3", "--min-count", "40", "--selection", str(half)]
    words += ["--output", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "300 texts, open_toy/mean; 6 concepts of 3 prompts; threshold 0.45 for all" in done.output
    for said in ("above any threshold", "gaps: concepts with fewer than 40", "Gini", "half.parquet", "yellow"):
        assert said in done.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert [len(concept["best"]) for concept in found["concepts"]] == [3] * len(NAMES)
    assert (tmp_path / "c.html").is_file()


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


def test_both_modalities(cache_path: Path, prompts: Path, run_path: Path, tmp_path: Path) -> None:
    words = ["curate", "coverage", str(cache_path), str(prompts), "--run", str(run_path), "--modality", "both"]
    words += ["--deviations", "1.5", "--output", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "among captions" in done.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found.pop("generator") == "embedcache"
    assert len(found.pop("digest")) == 64
    for modality, values in found.items():
        settings = CoverageSettings(modality=modality, run=run_path, deviations=1.5)
        alone = measure_coverage(cache_path, prompts, settings)
        assert values == json.loads(json.dumps(coverage_json(alone)))
    page = (tmp_path / "c.html").read_text()
    for title in ("Images and captions", "Images: Gaps", "Texts: Gaps"):
        assert title in page
    with pytest.raises(SettingError, match="modality: expected image or text with a feature"):
        CliRunner().invoke(app, [*words, "--overwrite", "--feature", "x"], catch_exceptions=False)


def test_coverage_without_source(cache_path: Path, prompts: Path, run_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "moved")
    settings = CoverageSettings(run=run_path, deviations=1.5)
    one, other = (measure_coverage(path, prompts, settings) for path in (cache_path, tmp_path / "moved"))
    assert np.array_equal(one.pool_counts.counts, other.pool_counts.counts)


def test_the_closest_concept_is_named_where_none_covers_an_item() -> None:
    scores, thresholds = np.array([[0.5, 0.4], [0.3, -0.9]]), np.array([0.9, 0.31])
    partial = SimpleNamespace(num_covered=[0], num_items=[7])
    pool = SimpleNamespace(modality="image", cache=SimpleNamespace(path="c"))
    with pytest.raises(DataError) as raised:
        _check_any_covered(partial, scores, thresholds, SimpleNamespace(names=["a", "b"]), pool)  # type: ignore[arg-type]
    words = "the closest is 'b': highest similarity 0.300, threshold 0.310; the highest similarity of all is 0.500"
    assert words in str(raised.value)
