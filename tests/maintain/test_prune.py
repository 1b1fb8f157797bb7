"""Pruning deletes what was named and nothing else, also after it was killed."""

import shutil
import time
from pathlib import Path

import pytest

from embedcache.errors import PathError, UnknownNameError
from embedcache.files import partial_path
from embedcache.maintain.prune import plan_prune, prune_cache
from embedcache.maintain.settings import PruneSettings
from embedcache.reports.summary import summarize
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.crash import start
from tests.extract.cases import tree
from tests.maintain.cases import make_cache, write_source


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a view and derived features. Not to be changed."""
    folder = tmp_path_factory.mktemp("prune")
    return make_cache(write_source(folder / "source"), folder / "c")


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "c"))


def names(cache: Path) -> list[str]:
    opened = Cache(cache)
    return [f"{modality}/{feature.name}" for modality in ("image", "text") for feature in opened.features(modality)]


def test_feature_view_and_encoder(cache: Path) -> None:
    before = names(cache)
    settings = PruneSettings(features=("open_toy/patches", "open_toy@flip", "open_toy@flip", "open_toy/tokens"))
    plan = plan_prune(cache, settings)
    assert [entry.kind for entry in plan.entries] == ["feature", "feature", "encoder"]
    assert names(cache) == before
    prune_cache(cache, settings)
    assert names(cache) == ["image/open_toy/cls", "image/small/pca", "text/open_toy/mean"]
    assert verify(Cache(cache)) == []
    assert not list(cache.rglob("*patches*"))
    prune_cache(cache, PruneSettings(features=("open_toy",), modality="text"))
    assert names(cache) == ["image/open_toy/cls", "image/small/pca"]


def test_folders_that_a_kill_left_do_not_exist(cache: Path) -> None:
    prune_cache(cache, PruneSettings(features=("open_toy/patches",)))
    expected = names(cache)
    for name in ("image/open_toy/cls", "image/open_toy@flip"):
        copy = partial_path(cache / name)
        shutil.copytree(cache / name, copy)
    assert names(cache) == expected
    assert verify(Cache(cache)) == []


@pytest.mark.parametrize(
    ("feature", "message"), [("open_toy", "image and text; name one"), ("opentoy", "did you mean")]
)
def test_wrong_name(made: Path, feature: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        plan_prune(made, PruneSettings(features=(feature,)))


@pytest.mark.slow
def test_features_that_another_process_extracts_are_kept(tmp_path: Path) -> None:
    source, cache = write_source(tmp_path / "source"), tmp_path / "c"
    encoders = ["--image-encoder", "tests.toy:open_toy,delay_ms=60000", "--text-encoder", "tests.toy:open_toy"]
    extraction = start(["extract", str(source), str(cache), *encoders])
    while not (cache / "image/open_toy/chunks/.claims").exists() and extraction.is_alive():
        time.sleep(0.05)
    files = tree(cache)
    settings = PruneSettings(features=("open_toy",), modality="image")
    with pytest.raises(PathError, match=r"image/open_toy: another process computes .*; nothing was deleted"):
        prune_cache(cache, settings)
    assert tree(cache) == files
    extraction.kill()
    extraction.join()
    prune_cache(cache, settings)
    assert not (cache / "image/open_toy").exists()


def test_inspect_states_disk_use(made: Path) -> None:
    summary = summarize(made)
    record = summary.record()
    files = [path for path in made.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    assert record["num_bytes"]["total"] == total
    assert sum(feature["num_bytes"] for feature in record["features"]) == record["num_bytes"]["features"]
    assert "of them in features" in summary.lines[1]
