"""Steps of a pipeline in several processes."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from embedcache.errors import DataError, EmbedcacheError
from embedcache.progress import Progress
from pipelines.parallel import run_parallel
from tests.crash import forked_workers

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Steps:
    folder: Path

    def write(self, name: str, *, progress: Progress) -> None:
        progress.note(name)
        with (self.folder / name).open("x") as file:
            file.write(str(os.getpid()))

    def fail(self, name: str, *, progress: Progress) -> None:
        raise DataError(f"no {name}")


def test_each_step_runs_once_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"step{number}" for number in range(5)]
    with forked_workers():
        run_parallel([(Steps(tmp_path).write, name) for name in names], num_processes=2)
    processes = {(tmp_path / name).read_text() for name in names}
    assert os.getpid() not in map(int, processes)
    assert len(processes) <= 2
    shown = capsys.readouterr().err
    assert all(f"write {name}: done" in shown for name in names)


def test_one_process_is_this_one(tmp_path: Path) -> None:
    run_parallel([(Steps(tmp_path).write, "step")], num_processes=2)
    assert int((tmp_path / "step").read_text()) == os.getpid()
    with pytest.raises(EmbedcacheError, match="no step"):
        run_parallel([(Steps(tmp_path).fail, "step")])
