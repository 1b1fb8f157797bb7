"""The paper's recipe on packaged data and small encoders."""

import re
from pathlib import Path

import pytest

from tests.pipelines.one_core import run_tiny


@pytest.mark.slow
@pytest.mark.pipeline
def test_tiny_recipe_beats_its_control(tmp_path: Path) -> None:
    printed = run_tiny("freeze_align", tmp_path)
    rows = {name: re.search(rf"{name} .*", printed) for name in ("run", "shuffled", "chance")}
    recalls = {name: [float(value) for value in re.findall(r"(\.\d+) \[", row[0])] for name, row in rows.items() if row}
    assert recalls["run"][2] > 3 * recalls["shuffled"][2], printed  # image to text, R@10
    assert recalls["shuffled"][2] < 3 * recalls["chance"][2], printed
    assert (tmp_path / "chosen.parquet").is_file()
    assert (tmp_path / "run" / "run.json").is_file()
