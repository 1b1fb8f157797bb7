"""Selections: empty ones are not written, and a split serves as one of its training part."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.dataset.selections import Selection, read_selected_keys, read_selection, write_selection
from embedcache.dataset.splits import read_split, write_split
from embedcache.errors import CorruptError, DataError
from embedcache.provenance import write_record
from embedcache.store.cache import Cache


def test_selection_of_nothing_is_not_written(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"):
        write_selection(tmp_path / "s.parquet", Cache(cache_path), Selection(rows=np.empty(0, np.int64)), {})
    assert not (tmp_path / "s.parquet").exists()


def test_only_a_split_has_a_training_part(two_caches: list[Path], tmp_path: Path) -> None:
    cache, path = Cache(two_caches[0]), tmp_path / "s.parquet"
    table = {"key": ["00001", "00002"], "part": ["train", "val"]}
    for groups, expected in (({}, [1, 2]), ({"group": [0, 1]}, [1])):
        pq.write_table(pa.table({**table, **groups}), path)
        assert read_selection(str(path), [cache]).tolist() == expected
        assert read_selected_keys(path).to_pylist() == [f"0000{row}" for row in expected]


def test_split_of_a_run_or_study_is_compared(run_path: Path, cache_path: Path, tmp_path: Path) -> None:
    cache, run = Cache(cache_path), Path(shutil.copytree(run_path, tmp_path / "run"))
    path = run / "split.parquet"
    selected = read_selection(path, [cache])
    split = read_split(path, [cache])
    write_split(path, [cache], replace(split, parts=["train"] * 300))
    for read in (lambda: read_split(path, [cache]), lambda: read_selection(path, [cache])):
        with pytest.raises(CorruptError, match="split.parquet"):
            read()
    (run / "run.json").unlink()
    assert read_split(path, [cache]).parts.count("train") == 300 > len(selected)
    write_record(run / "study.json", {"format": 1, "split_digest": "0" * 64})
    with pytest.raises(CorruptError, match="study.json"):
        read_split(path, [cache])
