"""Tables of scores: what is written is found again by key, and tables of other tools are matched or refused."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.dataset import keytable
from embedcache.dataset.selections import read_scores
from embedcache.errors import CorruptError, DataError, SettingError, UnknownNameError
from embedcache.store.cache import Cache


@pytest.fixture(scope="module")
def cache(two_caches: list[Path]) -> Cache:
    return Cache(two_caches[0])


def test_what_is_written_is_read(cache: Cache, tmp_path: Path) -> None:
    values, words = np.arange(40, dtype=np.float32), pa.array(["a"] * 40)
    values[3] = np.nan
    keytable.write(tmp_path / "s.parquet", [cache], {"light": values, "word": words}, "scores", {"method": "score"})
    found = read_scores(tmp_path / "s.parquet", cache)
    assert found.name == "light"
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == np.float32


def test_scores_of_another_tool(cache: Cache, tmp_path: Path) -> None:
    """Check a table of few of the keys in another order, with numbers of several kinds and nulls."""
    keys = cache.column("key").to_pylist()
    table = {
        "row": [0, 1, 2, 3],
        "key": [keys[9], "elsewhere", keys[4], keys[2]],
        "nsfw": [True, False, False, None],
        "count": [7, 8, 9, 2**40],
        "aesthetic": [4.0, 9.0, 6.5, 5.0],
        "price": [Decimal("1.5")] * 4,
        "word": ["a"] * 4,
    }
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table(table), path)
    for name, expected in (("aesthetic", [5, 6.5, 4]), ("nsfw", [np.nan, 0, 1]), ("count", [2**40, 9, 7])):
        score = read_scores(path, cache, name)
        assert score.name == name
        np.testing.assert_array_equal(score.values[[2, 4, 9]], np.array(expected, np.float32))
        assert np.isnan(np.delete(score.values, [2, 4, 9])).all()
    assert read_scores(path, cache, "price").values[2] == 1.5
    with pytest.raises(SettingError, match="got 4"):
        read_scores(path, cache)
    for name in ("aestetic", "word", "row"):
        with pytest.raises(UnknownNameError):
            read_scores(path, cache, name)


def test_wrong_tables_raise(cache: Cache, tmp_path: Path) -> None:
    keys = cache.column("key").to_pylist()
    tables: list[tuple[dict[str, Any] | None, type[Exception], str]] = [
        ({"uid": ["a"], "x": [1.0]}, CorruptError, "uid"),
        ({"key": [keys[0]] * 3 + keys[1:2], "x": [1.0] * 4}, DataError, "2 repeated"),
        ({"key": ["a", "b"], "x": [1.0, 2.0]}, DataError, "others"),
        ({"key": [], "x": np.empty(0)}, DataError, "others"),
        ({"key": keys, "word": ["a"] * 40}, SettingError, "none"),
        ({"key": [[key] for key in keys], "x": np.ones(40)}, CorruptError, "list"),
    ]
    path = tmp_path / "t.parquet"
    for table, error, word in tables:
        pq.write_table(pa.table(table), path)
        with pytest.raises(error, match=word):
            read_scores(path, cache)
