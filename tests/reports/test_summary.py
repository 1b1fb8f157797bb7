"""`embedcache inspect` recognizes what embedcache writes."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import ArtifactError, CorruptError, PathError
from embedcache.reports.summary import summarize
from embedcache.store.cache import Cache
from tests.edits import no_more_files
from tests.reports.contract import check_report


@pytest.mark.parametrize(
    ("name", "kind", "line", "row"),
    [
        ("cache", "cache", "300 samples with 300 images", "open_toy/cls"),
        ("run", "run", "projector mlp, shared width 16, seed 3", "open_toy/mean"),
        ("index", "index", "300 images, width 16, Flat", None),
        ("study", "study", "sampler grid, pruner none, seed 0", None),
        ("selection.parquet", "selection", "20 samples of", None),
        ("run/split.parquet", "split", "300 samples of", "train"),
    ],
)
def test_artifact_is_recognized(artifacts: Path, name: str, kind: str, line: str, row: str | None) -> None:
    summary = summarize(artifacts / name)
    page, record = check_report(summary), summary.record()
    assert (summary.title, record["path"]) == (kind, str(artifacts / name))
    assert line in summary.lines[0]
    assert row is None or row in page


def test_report_of_another_study_is_refused(artifacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts / "study", tmp_path / "copy"))
    shutil.copy(folder / "study.json", folder / "report.json")
    with pytest.raises(CorruptError, match="report.json: expected the report of this study"):
        summarize(folder)


def test_study_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ArtifactError, match="has study format 2; this version reads 1: upgrade embedcache"):
        summarize(tmp_path)


def test_columns_of_a_table_are_described(artifacts: Path, tmp_path: Path) -> None:
    cache, rng = Cache(artifacts / "cache"), np.random.default_rng(0)
    concepts = [f"concept {rng.integers(13)}" for _ in range(95)] + [None]
    columns = {"concept": concepts, "cosine": np.arange(96) / 100, "negatives": [[1, 2], []] * 48}
    selection = Selection(rows=np.arange(96), columns=columns)
    write_selection(tmp_path / "s.parquet", cache, selection, {"method": "random"})
    summary = summarize(tmp_path / "s.parquet")
    counts = Counter(concepts[:-1])
    assert summary.sections[0].table[1] == [
        *(["concept", concept, str(count)] for concept, count in counts.most_common(10)),
        ["concept", "and 3 other values", ""],
        ["cosine", "from 0 to 0.95, half of them above 0.475", "96"],
        ["negatives", "96 in lists", "48"],
    ]
    pq.write_table(pa.table({"key": ["a"], "reason": [1]}), tmp_path / "numbers.parquet")
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        summarize(tmp_path / "s.parquet")
    with pytest.raises(PathError, match="expected a selection"):
        summarize(tmp_path / "numbers.parquet")


@pytest.mark.parametrize("name", ["study/trials", "space.toml"])
def test_other_files_are_refused(artifacts: Path, name: str) -> None:
    with pytest.raises(PathError, match="expected a"):
        summarize(artifacts / name)
