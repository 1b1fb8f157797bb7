"""Splits and selections that name samples which have been removed from the cache since they were written."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedcache.dataset import keytable
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError
from embedcache.store.cache import Cache
from embedcache.store.removal import erase, remove_rows

REMOVED = np.array([3, 29, 30, 33])


@pytest.fixture(scope="module")
def before(two_caches: list[Path]) -> Cache:
    """Forty samples."""
    return Cache(two_caches[0])


@pytest.fixture(scope="module")
def after(before: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same cache without four of them."""
    path = Path(shutil.copytree(before.path, tmp_path_factory.mktemp("removed") / "cache"))
    remove_rows(Cache(path), REMOVED, before.column("key").take(pa.array(REMOVED)).to_pylist())
    erase(path)
    return Cache(path)


@pytest.mark.parametrize(("count", "num_removed"), [(40, 4), (30, 2), (3, 0)])
def test_they_are_in_no_part(
    before: Cache, after: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, num_removed: int
) -> None:
    """Check splits of all samples, and of the first ones: the others were appended after it."""
    path, parts = tmp_path / "split.parquet", [*["train", "val", "test"] * 13, "train"]
    columns = {"part": parts[:count], "group": [*range(count)]}
    keytable.write(path, [before], columns, "split", {}, rows=np.arange(count))
    with caplog.at_level(logging.WARNING):
        found = read_split(path, [after])
    message = f"split {path}: {num_removed} samples were removed from the cache, and left out"
    assert caplog.messages == [message] * (num_removed > 0)
    in_part = [row for row in range(count) if row not in REMOVED]
    assert found.parts == [parts[row] if row in in_part else "" for row in range(40)]
    assert [found.groups[row] for row in in_part] == in_part
    assert len(set(found.groups)) == 40


def test_they_are_left_out_of_a_selection(
    before: Cache, after: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.parquet"

    def read(rows: list[int]) -> tuple[list[int], list[str]]:
        write_selection(path, before, Selection(rows=np.array(rows)), {})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return read_selection(path, [after]).tolist(), caplog.messages

    assert read([2, 3, 4, 33]) == (
        [2, 4],
        [f"selection {path}: 2 samples were removed from the cache, and left out"],
    )
    assert read([2, 4]) == ([2, 4], [])
    (tmp_path / "keys.txt").write_text("00003\n00002\nelsewhere\n")
    with pytest.raises(DataError, match="got 'elsewhere'; 1 of 3 keys"):
        read_selection(tmp_path / "keys.txt", [after])
    (tmp_path / "keys.txt").write_text("elsewhere\n")
    caplog.clear()
    with pytest.raises(DataError, match="got 'elsewhere'; 1 of 1 keys"):
        read_selection(tmp_path / "keys.txt", [after])
    assert not caplog.messages
