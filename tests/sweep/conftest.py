"""A small space and the studies of it that several tests look at."""

from pathlib import Path

import pytest

from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.sweep import SweepReport, sweep

SPACE = """
[fixed]
split = "key"
epochs = 2

[space]
lr = {low = 1e-4, high = 1e-1, log = true}
shared_width = {low = 8, high = 24, step = 8}
projector = ["linear", "mlp"]
"""
SIDES = {"image": "open_toy/cls", "text": "open_toy/mean"}
RANDOM = SweepSettings(num_trials=6, sampler="random", num_seeds=2, top=2)


class Notes:
    """Keeps the lines that a person would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, what: str, total: int, unit: str) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def space_path(tmp_path: Path) -> Path:
    path = tmp_path / "space.toml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="session")
def swept(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepReport, list[str]]:
    """A study of six random trials, its report, and what was said meanwhile. Not to be changed."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "space.toml").write_text(SPACE)
    notes = Notes()
    study_path = folder / "a study"  # a path that a shell must quote
    report = sweep(cache_path, study_path, folder / "space.toml", **SIDES, settings=RANDOM, progress=notes)
    return study_path, report, notes.lines
