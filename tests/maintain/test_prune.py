"""Pruning deletes what was named and nothing else, also after it was killed."""

import os
import shutil
import time
from pathlib import Path

import pytest

from embedcache.errors import CorruptError, PathError, SettingError, UnknownNameError
from embedcache.files import open_path, user_folder
from embedcache.maintain.prune import plan_prune, prune_cache
from embedcache.maintain.settings import PruneSettings
from embedcache.provenance import write_record
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
    settings = PruneSettings(features=("open_toy/patches", "open_toy@flip", "open_toy/tokens"))
    plan = plan_prune(cache, settings)
    assert [entry.kind for entry in plan.entries] == ["feature", "encoder", "feature"]
    assert names(cache) == before
    prune_cache(cache, settings)
    assert names(cache) == ["image/open_toy/cls", "image/small/pca", "text/open_toy/mean"]
    assert verify(Cache(cache)) == []
    assert not list(cache.rglob("*patches*"))
    prune_cache(cache, PruneSettings(features=("open_toy",), modality="text"))
    assert names(cache) == ["image/open_toy/cls", "image/small/pca"]


def test_what_is_named_twice_is_deleted_once(cache: Path) -> None:
    settings = PruneSettings(
        features=("open_toy/patches", "open_toy/patches", "open_toy", "open_toy/cls"), modality="image"
    )
    assert [entry.name for entry in plan_prune(cache, settings).entries] == ["image/open_toy"]
    prune_cache(cache, settings)
    assert [name for name in names(cache) if name.startswith("image/open_toy/")] == []


def test_dependents_are_named(made: Path) -> None:
    [entry] = plan_prune(made, PruneSettings(features=("open_toy/cls",))).entries
    assert entry.line().endswith("; small could not be computed again")


@pytest.mark.parametrize(
    ("feature", "message"), [("open_toy", "image and text; name one"), ("opentoy", "did you mean")]
)
def test_wrong_name(made: Path, feature: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        plan_prune(made, PruneSettings(features=(feature,)))


def test_nothing_named(made: Path) -> None:
    with pytest.raises(SettingError, match="expected something to delete, got nothing"):
        plan_prune(made, PruneSettings())
    with pytest.raises(SettingError, match="expected a cache whose features or records to delete, got none"):
        plan_prune(None, PruneSettings(records=3))


@pytest.mark.slow
def test_features_that_another_process_extracts_are_kept(tmp_path: Path) -> None:
    """Also those of texts, on which no chunk is leased while images are encoded."""
    source, cache = write_source(tmp_path / "source"), tmp_path / "c"
    encoders = ["--image-encoder", "tests.toy:open_toy,delay_ms=60000", "--text-encoder", "tests.toy:open_toy"]
    extraction = start(["extract", str(source), str(cache), *encoders])
    while not (cache / "text/open_toy/chunks/.claims").exists() and extraction.is_alive():
        time.sleep(0.05)
    files = tree(cache)
    for modality in ("image", "text"):
        with pytest.raises(PathError, match=rf"{modality}/open_toy: another process computes .*; nothing was deleted"):
            prune_cache(cache, PruneSettings(features=("open_toy",), modality=modality))
    assert tree(cache) == files
    extraction.kill()
    extraction.join()
    prune_cache(cache, PruneSettings(features=("open_toy",), modality="text"))
    assert not (cache / "text/open_toy").exists()


def test_records_but_those_of_removals(cache: Path) -> None:
    records = cache / "records"
    kept = records / "remove-20200101T000000000000.json"
    shutil.copy(next(records.glob("extract-*.json")), kept)
    assert not plan_prune(cache, PruneSettings(records=1)).entries
    assert len(prune_cache(cache, PruneSettings(records=0)).entries) == 2
    assert list(records.iterdir()) == [kept]
    assert not plan_prune(cache, PruneSettings(records=2**31 - 1)).entries
    for started in ({}, {"started": "x"}, {"started": "0001-01-01"}):
        write_record(records / "extract-1.json", {"stage": "extract", **started})
        with pytest.raises(CorruptError, match=r"extract-1.json: expected a time as started, got"):
            plan_prune(cache, PruneSettings(records=0))


def test_records_behind_a_url_that_looks_like_a_pattern(cache: Path) -> None:
    """The records of a cache beside it, which match the URL as a pattern, stay."""
    url, other = "memory://prune[1]/c", "memory://prune1/c"
    for place in (url, other):
        open_path(place).fs.put(str(cache), open_path(place).path, recursive=True)  # type: ignore[attr-defined]
    assert len(prune_cache(url, PruneSettings(records=0)).entries) == 2
    assert [len(plan_prune(place, PruneSettings(records=0)).entries) for place in (url, other)] == [0, 2]


def test_onnx_graphs_by_their_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_folder() == tmp_path / "x" / "embedcache"
    monkeypatch.setenv("EMBEDCACHE_HOME", str(tmp_path))
    assert user_folder() == tmp_path
    (tmp_path / "onnx").mkdir()
    for name, time_s in (("old.onnx", 1), ("old.sha256", 1), ("old.json", 1), ("new.onnx", None), ("other.txt", 1)):
        (tmp_path / "onnx" / name).write_bytes(b"graph")
        os.utime(tmp_path / "onnx" / name, None if time_s is None else (time_s, time_s))
    plan = prune_cache(None, PruneSettings(onnx=30))
    assert [(entry.kind, entry.name, entry.num_bytes) for entry in plan.entries] == [
        ("description of an encoder", "old.json", 5),
        ("ONNX graph", "old.onnx", 5),
        ("digest of a graph", "old.sha256", 5),
    ]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["new.onnx", "other.txt"]


def test_inspect_states_disk_use(made: Path) -> None:
    summary = summarize(made)
    files = [path for path in made.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    assert summary.record["num_bytes"]["total"] == total
    assert (
        sum(feature["num_bytes"] for feature in summary.record["features"]) == summary.record["num_bytes"]["features"]
    )
    assert "on disk: features" in summary.lines[1]
