"""The golden cache of all modalities opens with the same values, verifies and resumes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.axis import Axis
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import VerifySettings
from embedcache.provenance import digest, read_json
from embedcache.sources import open_source, read_below
from embedcache.store.cache import Cache
from embedcache.store.group import read_feature
from embedcache.store.indexing import index
from embedcache.store.verify import verify
from tests.golden.make_modalities import CACHE, SOURCE, expected, run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A copy of the golden cache."""
    return Path(shutil.copytree(CACHE, tmp_path / "cache"))


def check_values(cache: Cache) -> None:
    found = expected(cache)
    with np.load(CACHE.with_suffix(".npz")) as golden:
        assert set(found) == set(golden.files)
        for name in golden.files:
            np.testing.assert_array_equal(found[name], golden[name], err_msg=name)


def test_values() -> None:
    check_values(Cache(CACHE))
    assert not verify(Cache(CACHE))


def test_tables_and_failures() -> None:
    cache = Cache(CACHE)
    assert cache.info.num_items == {"image": 3, "text": 5, "audio": 4, "video": 3, "points": 4}
    assert cache.items("audio").select(["sample", "path", "start_s", "stop_s"]).to_pylist() == [
        {"sample": 0, "path": "long.wav", "start_s": 0.02, "stop_s": 0.1},
        {"sample": 1, "path": "long.wav", "start_s": 0.1, "stop_s": None},
        {"sample": 2, "path": "short.wav", "start_s": None, "stop_s": None},
        {"sample": 3, "path": "broken.wav", "start_s": None, "stop_s": None},
    ]
    failures = {modality: set(cache.features(modality)[0].failures) for modality in cache.info.num_items}
    assert failures == {"image": {2}, "text": {1}, "audio": {2, 3}, "video": {2}, "points": {2}}
    frames = cache.feature("audio", "open_media/frames")
    assert (frames.dtype, frames.axis) == ("float16", Axis(kind="time", rate_hz=50.0, start_s=0.0))
    label = cache.feature("points", "open_media/label")
    assert (label.dtype, label.axis) == ("int16", Axis(kind="points"))
    assert cache.feature("points", "open_media/uv").dtype == "float32"


def test_metadata_has_digests() -> None:
    assert "digest" in read_json(CACHE / "cache.json")
    for group in (group for modality in Cache(CACHE).info.num_items for group in Cache(CACHE).encoders(modality)):
        commit = group.commit(0)
        assert commit is not None
        assert commit.attributes == {name: digest(read_feature(group, name)) for name in group.features}


def test_same_source_has_the_same_digest(cache: Path, tmp_path: Path) -> None:
    made = index(open_source(SOURCE / "table.csv"), tmp_path / "new", chunk_size=2)
    golden = Cache(cache).info
    assert (made.index_digest, made.table_digests) == (golden.index_digest, golden.table_digests)


@pytest.mark.slow
def test_resume_encodes_missing_chunks_to_the_same_values(cache: Path) -> None:
    for commit in cache.glob("*/*/chunks/00000.parquet"):
        commit.unlink()
    assert {report.modality: (report.encoded, report.reused) for report in run(SOURCE, cache)} == {
        "image": (2, 1),
        "text": (2, 3),
        "audio": (2, 2),
        "video": (2, 1),
        "points": (2, 2),
    }
    check_values(Cache(cache))
    assert not verify(Cache(cache))


@pytest.mark.slow
def test_encoding_again_gives_the_stored_features(cache: Path) -> None:
    shutil.copytree(SOURCE, cache.parent / "golden")
    path = cache / "cache.json"
    path.write_text(path.read_text().replace("golden/table.csv", str(cache.parent / "golden" / "table.csv")))
    with read_below(cache.parent / "golden"):
        report = verify_cache(cache, VerifySettings(reencode=1))
    assert report.is_sound, report.lines()
    assert len(report.drifts) == 12
