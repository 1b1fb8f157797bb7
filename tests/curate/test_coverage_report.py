"""What is reported of coverage: lines, warnings, gaps, tables, JSON, pages and the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedcache.cli.main import app
from embedcache.curate.coverage import measure_coverage
from embedcache.curate.settings import CoverageSettings
from embedcache.errors import SettingError
from embedcache.reports.coverage import (
    concept_table,
    coverage_json,
    format_interval,
    largest_first,
    overlap_table,
    summary_table,
    write_coverage_page,
)
from embedcache.runs import Run
from tests.curate.conftest import of_texts
from tests.search.test_concepts import NAMES


def test_a_concept_that_cannot_be_told_is_no_gap(clear: Path) -> None:
    report = of_texts(clear / "cache", clear / "concepts", k=2)
    assert report.pool_counts.gaps(60).tolist() == [1]
    assert largest_first(report.pool_counts).tolist() == [0, 1, 2]
    assert report.warnings()[0].startswith("for 1 of 3 concepts the scores cannot tell")
    assert [format_interval(report.pool_counts, number).split(" ")[0] for number in range(3)] == ["50", "11", "cannot"]
    (zebra, _, gnu) = json.loads(json.dumps(coverage_json(report), allow_nan=False))["concepts"]
    assert zebra["low"] <= zebra["count"] == 50 <= zebra["high"]
    assert (gnu["count"], gnu["low"], gnu["high"]) == (None, None, None)


@pytest.mark.slow
def test_tables_json_and_page(cache_path: Path, prompts: Path, run_path: Path, half: Path, tmp_path: Path) -> None:
    settings = CoverageSettings(run=run_path, k=4, min_count=25, selection=half)
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
    first = found["concepts"][0]
    assert [first["best"], first["selection"]["best"]] == [int(part.best[0]) for part in report.all_counts]
    assert first["nearest"][0]["key"] == f"{report.rows[0, 0]:05d}"
    assert [hit["row"] for hit in first["strip"]] == report.strip_rows[0].tolist()
    assert len(first["strip"]) == len(found["strip_weights"])
    assert found["parts"][1]["gaps"] == [NAMES[number] for number in report.all_counts[1].gaps(25)]
    assert found["pool"]["run_weights"] == Run.open(run_path).info.weights
    assert found["concepts_from"]["of"] == "prompts"
    write_coverage_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/webp") == 4 * len(NAMES)


@pytest.mark.slow
def test_command(cache_path: Path, prompts: Path, half: Path, tmp_path: Path) -> None:
    words = ["curate", "coverage", str(cache_path), str(prompts), "--modality", "text", "--feature", "open_toy/mean"]
    words += ["-k", "3", "--min-count", "40", "--selection", str(half)]
    words += ["--output", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "300 texts, open_toy/mean; 6 concepts of 3 prompts" in done.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert [len(concept["nearest"]) for concept in found["concepts"]] == [3] * len(NAMES)
    assert (tmp_path / "c.html").is_file()


@pytest.mark.slow
def test_both_modalities(cache_path: Path, prompts: Path, run_path: Path, tmp_path: Path) -> None:
    words = ["curate", "coverage", str(cache_path), str(prompts), "--run", str(run_path), "--modality", "both"]
    words += ["--output", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "among captions" in done.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert len(found.pop("digest")) == 64
    for modality, values in found.items():
        settings = CoverageSettings(modality=modality, run=run_path)
        alone = measure_coverage(cache_path, prompts, settings)
        assert values == json.loads(json.dumps(coverage_json(alone)))
    assert (tmp_path / "c.html").is_file()
    with pytest.raises(SettingError, match="modality"):
        CliRunner().invoke(app, [*words, "--overwrite", "--feature", "x"], catch_exceptions=False)
