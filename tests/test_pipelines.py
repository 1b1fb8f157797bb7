"""The paper's recipe runs here, on packaged data and small encoders."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_papers_recipe_runs_tiny_and_its_control_is_at_chance(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.freeze_align", str(tmp_path), "--tiny"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {name: re.search(rf"{name} .*", done.stdout) for name in ("run", "shuffled", "chance")}
    figures = {name: [float(one) for one in re.findall(r"(\.\d+) \[", row[0])] for name, row in rows.items() if row}
    assert figures["run"][2] > 3 * figures["shuffled"][2], done.stdout  # image to text, R@10
    assert figures["shuffled"][2] < 3 * figures["chance"][2], done.stdout
    assert (tmp_path / "chosen.parquet").is_file()
    assert (tmp_path / "run" / "config.json").is_file()


def test_recipes_stay_short() -> None:
    lines = (ROOT / "pipelines" / "freeze_align.py").read_text().splitlines()
    assert len(lines) <= 80
