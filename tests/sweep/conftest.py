"""A small space, and a study of it that several tests read."""

from pathlib import Path

import pytest

from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.sweep import SweepReport, sweep
from tests.recorded import RecordedProgress

SPACE = """
[fixed]
split = "key"
epochs = 2

[space]
lr = {low = 1e-4, high = 1e-1, log = true}
shared_width = {low = 8, high = 24, step = 8}
projector = ["linear", "mlp"]
"""
FEATURES = {"feature": {"image": "open_toy/cls", "text": "open_toy/mean"}}
RANDOM = SweepSettings(trials=6, sampler="random", seeds_per_config=2, top_configs=2)


def write_space(folder: Path, text: str) -> Path:
    (folder / "space.toml").write_text(text)
    return folder / "space.toml"


@pytest.fixture
def space_path(tmp_path: Path) -> Path:
    return write_space(tmp_path, SPACE)


@pytest.fixture(scope="session")
def swept(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepReport, list[str]]:
    """A study of six random trials, its report and its notes. Not to be changed."""
    folder = tmp_path_factory.mktemp("sweep")
    space_path = write_space(folder, SPACE)
    progress = RecordedProgress()
    study_path = folder / "a study"  # a path that a shell must quote
    report = sweep(cache_path, study_path, space_path, **FEATURES, settings=RANDOM, progress=progress)
    return study_path, report, progress.notes
