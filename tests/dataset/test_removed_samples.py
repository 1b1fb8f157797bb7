"""Splits and selections that name samples which have been removed from the cache since they were written."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedcache.curate.select.select import combine_selections
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.splits import Split, read_split, write_split
from embedcache.errors import DataError
from embedcache.store.cache import Cache
from embedcache.store.removal import apply_removal, finish_removal, start_removal

REMOVED = np.array([3, 29, 30, 33])


@pytest.fixture(scope="module")
def before(two_caches: list[Path]) -> Cache:
    """Forty samples."""
    return Cache(two_caches[0])


@pytest.fixture(scope="module")
def after(before: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same cache without four of them."""
    path = Path(shutil.copytree(before.path, tmp_path_factory.mktemp("removed") / "cache"))
    start_removal(Cache(path), REMOVED, before.column("key").take(pa.array(REMOVED)).to_pylist())
    apply_removal(path)
    finish_removal(path)
    return Cache(path)


@pytest.mark.parametrize(("count", "num_removed"), [(40, 4), (30, 2), (3, 0)])
def test_they_are_in_no_part(
    before: Cache, after: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, num_removed: int
) -> None:
    """Check splits of all samples, and of the first ones: the others were appended after it."""
    path, parts = tmp_path / "split.parquet", [*["train", "val", "test"] * 13, "train"]
    keys, groups = before.column("key").to_pylist(), [*range(count)]
    write_split(path, Split(keys=keys[:count], parts=parts[:count], groups=groups))
    with caplog.at_level(logging.WARNING):
        found = read_split(path, [after])
    message = f"{num_removed} samples of the split {path} were removed from {after.path}; they are in no part"
    assert caplog.messages == [message] * (num_removed > 0)
    assert found.keys == after.column("key").to_pylist()
    in_part = [row for row in range(count) if row not in REMOVED]
    assert found.parts == [parts[row] if row in in_part else "" for row in range(40)]
    assert found.groups == list(range(40))


@pytest.mark.parametrize("keys", [["00000", "00001"], ["of another", "cache"]])
def test_split_of_removed_samples_only_is_refused(two_caches: list[Path], tmp_path: Path, keys: list[str]) -> None:
    """Nothing is left that tells whether it is of this cache."""
    cache, path = Path(shutil.copytree(two_caches[0], tmp_path / "cache")), tmp_path / "split.parquet"
    start_removal(Cache(cache), np.arange(3), ["00000", "00001", "00002"])
    apply_removal(cache)
    finish_removal(cache)
    write_split(path, Split(keys=keys, parts=["train", "val"], groups=[0, 1]))
    with pytest.raises(
        DataError, match=f"{path}: expected samples of {cache}, got only removed ones; make a new split"
    ):
        read_split(path, [Cache(cache)])


def test_they_are_left_out_of_a_selection(
    before: Cache, after: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.parquet"

    def read(rows: list[int]) -> tuple[list[int], list[str]]:
        write_selection(path, before, Selection(rows=np.array(rows), reasons=["x"] * len(rows)), {})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return read_selection(path, [after]).tolist(), caplog.messages

    assert read([2, 3, 4, 33]) == (
        [2, 4],
        [f"2 samples of the selection {path} were removed from the cache; they are left out"],
    )
    assert read([2, 4]) == ([2, 4], [])
    (tmp_path / "keys.txt").write_text("00003\n00002\nelsewhere\n")
    with pytest.raises(DataError, match="of 3 keys has 'elsewhere'; 1 is no key"):
        read_selection(tmp_path / "keys.txt", [after])
    (tmp_path / "keys.txt").write_text("elsewhere\n")
    caplog.clear()
    with pytest.raises(DataError, match="of 1 key has 'elsewhere'; 1 is no key"):
        read_selection(tmp_path / "keys.txt", [after])
    assert not caplog.messages


def test_a_selection_of_removed_samples_only_is_refused(before: Cache, after: Cache, tmp_path: Path) -> None:
    gone, some = tmp_path / "gone.parquet", tmp_path / "some.parquet"
    write_selection(gone, before, Selection(rows=np.array([3, 33]), reasons=["x", "x"]), {})
    write_selection(some, before, Selection(rows=np.array([2, 3, 4]), reasons=["x"] * 3), {})
    message = f"selection {gone}: expected samples of {after.path}, got only removed ones; make a new selection"
    with pytest.raises(DataError, match=message):
        read_selection(gone, [after])
    with pytest.raises(DataError, match=message):
        combine_selections(after.path, tmp_path / "and.parquet", some, "and", gone)
    assert combine_selections(after.path, tmp_path / "minus.parquet", some, "minus", gone) == 2
