import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.curate.select.select import read_reasons
from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.dataset.splits import read_split, write_split
from embedcache.errors import CorruptError, DataError, EmbedcacheError
from embedcache.provenance import write_record
from embedcache.store.cache import Cache


def test_what_is_written_is_read(cache_path: Path, tmp_path: Path) -> None:
    cache, rows = Cache(cache_path), np.array([3, 7, 200])
    write_selection(tmp_path / "s.parquet", cache, Selection(rows=rows, reasons=["a", "b", "c"]), {"method": "random"})
    assert np.array_equal(read_selection(tmp_path / "s.parquet", [cache]), rows)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["reason"].to_pylist() == ["a", "b", "c"]
    about = json.loads(table.schema.metadata[b"embedcache"])
    assert (about["method"], about["spine"]) == ("random", cache.info.index_digest)


def test_flipped_bits_are_noticed(cache_path: Path, tmp_path: Path) -> None:
    """Values, headers of pages and the footer: the same samples and reasons, or one line."""
    cache, rng, path = Cache(cache_path), np.random.default_rng(0), tmp_path / "s.parquet"
    rows = np.arange(0, 40, 2)
    write_selection(path, cache, Selection(rows=rows, reasons=["a", "b"] * 10), {"method": "random"})
    data, expected, num_refused = path.read_bytes(), read_reasons(path, cache), 0
    for place in [*range(data.index(b"PAR1", 4) - 1500, len(data), 3), *rng.integers(len(data), size=200).tolist()]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        try:
            assert read_reasons(path, cache) == expected, place
        except EmbedcacheError as error:
            num_refused += 1 if "\n" not in str(error) else -9999
    assert num_refused > 200


def test_split_of_a_run_or_study_is_compared(run_path: Path, cache_path: Path, tmp_path: Path) -> None:
    cache, run = Cache(cache_path), Path(shutil.copytree(run_path, tmp_path / "run"))
    path = run / "split.parquet"
    selected = read_selection(path, [cache])
    split = read_split(path, [cache])
    write_split(path, replace(split, parts=["train"] * len(split.keys)))
    for read in (lambda: read_split(path, [cache]), lambda: read_selection(path, [cache])):
        with pytest.raises(CorruptError, match=r"expected the split that config.json was written for"):
            read()
    (run / "config.json").unlink()  # an unfinished run, which has no digest yet
    assert read_split(path, [cache]).parts.count("train") == len(split.keys) > len(selected)
    write_record(run / "study.json", {"split": "0" * 64})
    with pytest.raises(CorruptError, match=r"expected the split that study.json was written for"):
        read_split(path, [cache])


def test_write_empty_selection_raises(cache_path: Path, tmp_path: Path) -> None:
    nothing = Selection(rows=np.empty(0, np.int64), reasons=[])
    with pytest.raises(DataError, match="no sample of .* is selected"):
        write_selection(tmp_path / "s.parquet", Cache(cache_path), nothing, {})
    assert not (tmp_path / "s.parquet").exists()
