"""Runs and studies that were made before items of their features were retried."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import FingerprintError
from embedcache.extract.extract import extract, retry_failed
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.layout import read_info
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import read_space
from embedcache.sweep.study import open_study
from embedcache.train.data import open_data
from tests.images import write_images
from tests.sweep.conftest import FEATURES, SPACE
from tests.toy import IMAGE, TEXT
from tests.train.runs import run

SETTINGS = ExtractSettings(chunk_size=16, views=("flip",))
OPTIONS: dict[str, Any] = {"epochs": 0, "batch_size": 8}
RETRIED = "digests.failed image .*retried"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images with captions. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("retried") / "source", 40)


@pytest.fixture(scope="module")
def before(source: Path) -> Path:
    """A cache of them, made when two were broken: files as long as the good ones. Not to be changed."""
    broken, cache = Path(shutil.copytree(source, source.parent / "broken")), source.parent / "before"
    for number in (3, 20):
        path = broken / f"{number:05d}.png"
        path.write_bytes(b"x" * path.stat().st_size)
    extract(open_source(broken), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=SETTINGS)
    return cache


@pytest.fixture(scope="module")
def after(before: Path, source: Path) -> Path:
    """The same cache after one of them was retried: its samples, and their digest, are the same. Not to be changed."""
    cache = Path(shutil.copytree(before, before.with_name("after")))
    retry_failed(open_source(source), cache, image_encoder=[IMAGE], settings=SETTINGS)
    assert read_info(cache).index_digest == read_info(before).index_digest
    return cache


def test_finished_run(before: Path, after: Path, tmp_path: Path) -> None:
    run(before, tmp_path / "run", **OPTIONS)
    assert set(Run.open(tmp_path / "run").info.digests) == {"failed image"}
    assert run(before, tmp_path / "run", **OPTIONS).reused
    with pytest.raises(FingerprintError, match=RETRIED):
        run(after, tmp_path / "run", **OPTIONS)
    with pytest.raises(FingerprintError, match="settings.optimizer.epochs: stored 0, req"):
        run(after, tmp_path / "run", epochs=1, batch_size=8)


def test_study(before: Path, after: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(SPACE)
    space = read_space(tmp_path / "space.toml")
    names = FEATURES["feature"]
    then, now = (open_data(cache, names, memory_bytes=10**9) for cache in (before, after))
    made = open_study(tmp_path / "study", then, space, SweepSettings())
    assert open_study(tmp_path / "study", then, space, SweepSettings()) == made
    with pytest.raises(FingerprintError, match=f"study .*{RETRIED}"):
        open_study(tmp_path / "study", now, space, SweepSettings())
