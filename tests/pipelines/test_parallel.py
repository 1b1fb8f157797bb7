"""Steps in processes of their own, errors in one line, and the recipe of Freeze-Align."""

import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedcache.errors import DataError, EmbedcacheError
from embedcache.progress import Progress
from pipelines.parallel import run_parallel
from tests.crash import forked_workers
from tests.pipelines.one_core import run_tiny


@dataclass(frozen=True)
class Steps:
    folder: Path

    def write(self, name: str, *, progress: Progress) -> None:
        progress.note(name)
        with (self.folder / name).open("x") as file:
            file.write(str(os.getpid()))

    def fail(self, name: str, *, progress: Progress) -> None:
        raise DataError(f"no {name}")


@pytest.mark.slow
def test_each_step_runs_once_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"step{number}" for number in range(5)]
    with forked_workers():
        run_parallel([(Steps(tmp_path).write, name) for name in names], num_processes=2)
    processes = {(tmp_path / name).read_text() for name in names}
    assert os.getpid() not in map(int, processes)
    assert len(processes) <= 2
    shown = capsys.readouterr().err
    assert all(f"write {name}: done" in shown for name in names)


@pytest.mark.slow
def test_one_process_is_this_one(tmp_path: Path) -> None:
    run_parallel([(Steps(tmp_path).write, "step")], num_processes=2)
    assert int((tmp_path / "step").read_text()) == os.getpid()
    with pytest.raises(EmbedcacheError, match="no step"):
        run_parallel([(Steps(tmp_path).fail, "step")])


def test_users_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "pipelines.icons.__main__", raising=False)  # imported by other tests
    monkeypatch.setattr(sys, "argv", ["icons", str(tmp_path / "work"), "--icons", str(tmp_path / "nope")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pipelines.icons", run_name="__main__", alter_sys=True)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "nope: expected the folder of the npm package @iconify/json" in line


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
