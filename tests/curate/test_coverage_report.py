"""What is reported of coverage: lines, warnings, gaps, tables, JSON, pages and the command."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from embedcache.cli.main import app
from embedcache.curate import coverage
from embedcache.curate.coverage import CoverageReport, _check_any_covered, measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import DataError, SettingError
from embedcache.projectors.saved import load_pair
from embedcache.reports.coverage import concept_table, coverage_json, overlap_table, summary_table, write_coverage_page
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.store.cache import Cache
from tests.curate.conftest import FIXED, of_texts
from tests.search.test_concepts import NAMES, prompt_cache


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
    assert ["items above any threshold by chance", "190"] in summary_table(report)[1]
    for num_items, shown in ((30_000, "4,800"), (60, "9.5")):
        other = replace(report, pool_counts=replace(report.pool_counts, num_items=num_items))
        assert ["items above one threshold by chance", shown] in summary_table(other)[1]
    for counts, shown in (([0, 0, 0, 1, 1, 2], "0.5"), ([0, 0, 1001, 1001, 1002, 1003], "1,001")):
        other = replace(report, pool_counts=replace(report.pool_counts, counts=np.array(counts)))
        assert ["items per concept, median", shown] in summary_table(other)[1]
    rare = replace(report, settings=replace(report.settings, deviations=5))  # 300 items with a probability of 2.9e-7
    assert ["items above one threshold by chance", "0.000086"] in summary_table(rare)[1]


@pytest.mark.slow
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


@pytest.mark.slow
def test_page_of_texts(cache_path: Path, tmp_path: Path) -> None:
    many = [f"{name} {place} {number}" for name in NAMES for place in ("bar", "left") for number in range(9)]
    report = of_texts(cache_path, prompt_cache(tmp_path, many), deviations=1, k=2)
    write_coverage_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "<img" not in page
    assert "100 of 108 concepts" in page
    assert Cache(cache_path).items("text")["text"][int(report.rows[0, 0])].as_py() in page


def test_index_that_finds_fewer_items_than_requested(cache_path: Path, prompts: Path, tmp_path: Path) -> None:
    settings = IndexSettings(modality="text", feature="open_toy/mean", factory="IVF100,Flat", min_recall=0.0)
    build_index(cache_path, tmp_path / "index", settings)
    report = of_texts(cache_path, prompts, threshold=0.45, k=40, index=tmp_path / "index")
    num_found = (report.rows >= 0).sum(axis=1)
    assert num_found.min() < 40
    best = [concept["best"] for concept in json.loads(json.dumps(coverage_json(report), allow_nan=False))["concepts"]]
    assert [len(found) for found in best] == num_found.tolist()
    write_coverage_page(tmp_path / "page.html", report)
    none = replace(report, rows=np.full_like(report.rows, -1), scores=np.full_like(report.scores, -np.inf))
    columns, rows = concept_table(none, [0])
    assert dict(zip(columns, rows[0], strict=True))["highest"] == ""
    write_coverage_page(tmp_path / "page.html", none)


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
    thresholds[:] = np.nextafter(np.float32(1), np.float32(0))
    assert replace(report, thresholds=thresholds).warnings() == []
    thresholds[:3] = 1
    assert replace(report, thresholds=thresholds).warnings() == [
        "WARNING: for 3 of 6 concepts no item can be above the threshold, which is 1 or more; lower --deviations, or "
        "give --threshold"
    ]


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(SettingError, match="modality: expected one with a feature or an index"):
        CliRunner().invoke(app, [*words, "--overwrite", "--feature", "x"], catch_exceptions=False)


def test_the_closest_concept_is_named_where_none_covers_an_item() -> None:
    scores, thresholds = np.array([[0.5, 0.4], [0.3, -0.9]]), np.array([0.9, 0.31])
    partial = SimpleNamespace(num_covered=[0], num_items=[7])
    pool = SimpleNamespace(modality="image", cache=SimpleNamespace(path="c"))
    with pytest.raises(DataError) as raised:
        _check_any_covered(partial, scores, thresholds, SimpleNamespace(names=["a", "b"]), pool)  # type: ignore[arg-type]
    words = "the closest is 'b': highest similarity 0.300, threshold 0.310; the highest similarity of all is 0.500"
    assert words in str(raised.value)
