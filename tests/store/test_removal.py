"""Removing samples from the tables and chunks of a cache, and what a removal that was stopped leaves to the next."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedcache.errors import CorruptError
from embedcache.progress import Progress
from embedcache.store.cache import Cache
from embedcache.store.commits import REMOVED, hash_item
from embedcache.store.layout import commit_path, read_info
from embedcache.store.removal import erase, remove_rows
from embedcache.store.tables import read_removed
from embedcache.store.verify import verify
from tests.recorded import RecordedProgress

SAMPLES = np.array([3, 9, 33])
"""Of both chunks, which have 32 and 8 items."""


@pytest.fixture
def cache(two_caches: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_caches[0], tmp_path / "cache"))


def start(path: Path, samples: np.ndarray = SAMPLES, progress: Progress | None = None) -> None:
    opened = Cache(path)
    remove_rows(opened, samples, opened.column("key").take(pa.array(samples)).to_pylist(), progress=progress)


def remove(path: Path, samples: np.ndarray = SAMPLES) -> None:
    start(path, samples)
    erase(path)


@pytest.mark.slow
def test_nothing_is_left_and_other_rows_are_the_same(two_caches: list[Path], cache: Path) -> None:
    before = Cache(two_caches[0])
    keys = before.column("key").to_pylist()
    progress = RecordedProgress()
    start(cache, progress=progress)
    assert read_info(cache).has_interrupted_removal
    erase(cache, progress=progress)
    assert not read_info(cache).has_interrupted_removal
    assert progress.started == [
        ("checking tables", 120, "rows"),
        ("checking chunks", 4, "chunks"),
        ("writing chunks of images", 40, "images"),
        ("writing chunks of texts", 40, "texts"),
    ]
    assert progress.counts == {what: total for what, total, _ in progress.started}
    after = Cache(cache)
    assert verify(after) == []
    others = np.setdiff1d(np.arange(40), SAMPLES)
    assert after.samples.take(pa.array(others)).equals(before.samples.take(pa.array(others)))
    assert after.column("key").take(pa.array(SAMPLES)).to_pylist() == [f"removed-{row}" for row in SAMPLES]
    files = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    for modality in ("image", "text"):
        for old, new in zip(before.features(modality), after.features(modality), strict=True):
            assert new.failures == dict.fromkeys(SAMPLES.tolist(), REMOVED)
            for one, other in zip(old.gather_tokens(others), new.gather_tokens(others), strict=True):
                np.testing.assert_array_equal(one, other)
            for values in old.gather_tokens(SAMPLES) if modality == "image" else ():  # captions repeat
                assert not any(values.tobytes() in data for data in files)
            assert [new.hashes[row] for row in others] == [old.hashes[row] for row in others]
            assert {new.hashes[row] for row in SAMPLES} == {None if modality == "image" else hash_item(b"")}
            assert all(new.commits[chunk].index_digest == after.info.index_digest for chunk in (0, 1))  # type: ignore[union-attr]
    assert after.info.num_items == before.info.num_items
    assert set(after.info.parts[0].tables) == {"samples", "image", "text"}
    assert after.info.has_rows_of(before.info.index_digest)
    assert after.info.index_digest != before.info.index_digest
    assert after.info.is_partial
    assert np.flatnonzero(after.removed_items("text")).tolist() == SAMPLES.tolist()
    removed = read_removed(cache, after.info)
    assert [removed.row_of(keys[row]) for row in (3, 9, 33, 4)] == [3, 9, 33, None]


@pytest.mark.slow
def test_samples_that_are_removed_later_are_added(cache: Path, tmp_path: Path) -> None:
    once = Path(shutil.copytree(cache, tmp_path / "once"))
    remove(cache, np.array([9]))
    salt = read_removed(cache, read_info(cache)).salt
    remove(cache, np.array([3, 33]))
    remove(once)
    one, other = (Cache(path) for path in (once, cache))
    removed = read_removed(cache, other.info)
    assert (removed.rows.tolist(), removed.salt) == (SAMPLES.tolist(), salt)
    assert other.info.removed["num_samples"] == 3
    assert other.samples.equals(one.samples)
    assert [file.checksum for file in other.info.files("image")] == [file.checksum for file in one.info.files("image")]
    assert len(other.info.earlier_versions) == 2
    assert verify(other) == []


def test_chunk_without_commit_loses_its_arrays(cache: Path) -> None:
    commit = commit_path(cache / "image/open_toy", 1)
    commit.unlink()
    values = [path for path in (cache / "image/open_toy").rglob("c/1/*") if path.is_file()]
    assert values
    ragged = cache / "text/open_toy"
    commit_path(ragged, 1).unlink()
    tokens = [ragged / "tokens/lengths/c/1", *(ragged / "tokens/values/00001").rglob("*")]
    values += [path for path in tokens if path.is_file()]
    assert len(values) >= 4
    remove(cache, np.array([33]))
    assert not any(path.exists() for path in values)
    assert not commit.exists()
    assert Cache(cache).feature("image", "open_toy/cls").valid.sum() == 32
    assert Cache(cache).feature("text", "open_toy/mean").valid.sum() == 32


def test_another_table_of_removed_samples_is_noticed(cache: Path) -> None:
    info = read_info(cache)
    assert len(read_removed(cache, info).rows) == 0
    remove(cache)
    info = read_info(cache)
    path = cache / "removed-3.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptError, match=r"removed-3.parquet: expected the table .* got another file; restore"):
        read_removed(cache, info)
    path.unlink()
    with pytest.raises(CorruptError, match="got none; "):
        read_removed(cache, info)
