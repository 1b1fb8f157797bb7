"""The paper's recipe on packaged data and small encoders."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tiny_recipe_beats_its_control(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pipelines.freeze_align", str(tmp_path), "--tiny"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    rows = {name: re.search(rf"{name} .*", finished.stdout) for name in ("run", "shuffled", "chance")}
    recalls = {name: [float(value) for value in re.findall(r"(\.\d+) \[", row[0])] for name, row in rows.items() if row}
    assert recalls["run"][2] > 3 * recalls["shuffled"][2], finished.stdout  # image to text, R@10
    assert recalls["shuffled"][2] < 3 * recalls["chance"][2], finished.stdout
    assert (tmp_path / "chosen.parquet").is_file()
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.stem)
def test_pipelines_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 120
