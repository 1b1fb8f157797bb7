import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.dataset.selections import Selection, read_selection, write_selection
from embedcache.errors import DataError
from embedcache.store.cache import Cache


def test_what_is_written_is_read(cache_path: Path, tmp_path: Path) -> None:
    cache, rows = Cache(cache_path), np.array([3, 7, 200])
    write_selection(tmp_path / "s.parquet", cache, Selection(rows=rows, reasons=["a", "b", "c"]), {"method": "random"})
    assert np.array_equal(read_selection(tmp_path / "s.parquet", [cache]), rows)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table["reason"].to_pylist() == ["a", "b", "c"]
    about = json.loads(table.schema.metadata[b"embedcache"])
    assert (about["method"], about["spine"]) == ("random", cache.info.index_digest)


def test_write_empty_selection_raises(cache_path: Path, tmp_path: Path) -> None:
    nothing = Selection(rows=np.empty(0, np.int64), reasons=[])
    with pytest.raises(DataError, match="no sample of .* is selected"):
        write_selection(tmp_path / "s.parquet", Cache(cache_path), nothing, {})
    assert not (tmp_path / "s.parquet").exists()
