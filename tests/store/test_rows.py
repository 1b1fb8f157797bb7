from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError
from embedcache.store.cache import Cache, Keys, RowReader, find_keys, keys_at, match_keys
from embedcache.store.layout import SAMPLES, table_name, write_info
from embedcache.store.tables import BLOCK, ITEM_BLOCK, ITEM_SCHEMAS, Column, Table, describe_file, is_none, to_array
from tests.edits import write_tables
from tests.store.features import made_info

NUM_SAMPLES = BLOCK + 5000
ROWS = np.array([BLOCK + 4999, 0, BLOCK - 1, BLOCK, 0, 3000])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Tables of two blocks of samples with 0 to 3 captions each, in row groups that are no chunks."""
    folder = tmp_path_factory.mktemp("rows")
    captions_S = np.random.default_rng(0).integers(0, 4, NUM_SAMPLES)
    sample_N = np.repeat(np.arange(NUM_SAMPLES), captions_S)
    tables = {
        SAMPLES: pa.table({"key": [f"k{row * 7919 % NUM_SAMPLES}" for row in range(NUM_SAMPLES)]}),
        "text": pa.table(
            [sample_N, [f"caption {row}" for row in range(len(sample_N))], [None] * len(sample_N)],
            schema=ITEM_SCHEMAS["text"],
        ),
    }
    return write_cache(folder, tables, row_group_size=3000)


def write_cache(folder: Path, tables: Mapping[str, pa.Table], **options: Any) -> Cache:
    write_info(folder, made_info(1, {}, chunk_size=ITEM_BLOCK))
    write_tables(folder, **options, **tables)
    return Cache(folder)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_take_is_that_of_the_table(cache: Cache, *, is_loaded: bool) -> None:
    for name in (SAMPLES, "text"):
        reader = RowReader(cache, name)
        if is_loaded:
            reader.load()
        assert reader.take(ROWS).to_pydict() == cache.table(name).take(pa.array(ROWS)).to_pydict()
        assert reader.take(ROWS[:0]).to_pydict() == cache.table(name).slice(0, 0).to_pydict()


@pytest.mark.parametrize("is_loaded", [False, True])
def test_find_the_items_of_samples(cache: Cache, *, is_loaded: bool) -> None:
    reader, sample_N = RowReader(cache, "text"), cache.table("text")["sample"].to_numpy()
    if is_loaded:
        reader.load()
    samples = np.array([0, NUM_SAMPLES - 1, *sample_N[ITEM_BLOCK - 2 : ITEM_BLOCK + 2], *range(40)])
    starts, counts = reader.find(samples)
    assert starts.tolist() == np.searchsorted(sample_N, samples).tolist()
    assert counts.tolist() == [(sample_N == sample).sum() for sample in samples]


def test_find_keys(cache: Cache) -> None:
    keys = cache.column("key").take(pa.array(ROWS)).to_pylist()
    assert find_keys(cache, [*keys, "none"]).tolist() == [*ROWS, -1]
    assert find_keys(cache, []).tolist() == []
    assert [cache.key(row) for row in ROWS.tolist()] == keys


def test_loaded_rows_have_the_same_keys(cache: Cache) -> None:
    keys = [*cache.column("key").take(pa.array(ROWS)).to_pylist(), "none"]
    reader = RowReader(cache, SAMPLES, ["key"])
    found = [reader.find_key(key) for key in keys]
    reader.load()
    assert [reader.find_key(key) for key in keys] == found == [*ROWS, -1]


def test_keys_of_bytes_raise(cache: Cache, tmp_path: Path) -> None:
    keys = pa.table({"key": cache.table(SAMPLES)["key"].cast(pa.binary())})
    with pytest.raises(CorruptError, match="expected keys of text, got .*; restore the file"):
        write_cache(tmp_path, {SAMPLES: keys}).column("key")


def test_parts_are_one_table(tmp_path: Path) -> None:
    """A column that only one part has is null in the other; numbers become those that hold both."""
    tables = (pa.table({"key": ["a", "b"], "size": [1, 2]}), pa.table({"key": ["c"], "size": [0.5], "label": ["x"]}))
    files = []
    for number, rows in enumerate(tables):
        pq.write_table(rows, tmp_path / table_name(SAMPLES, number))
        files.append(describe_file(tmp_path, table_name(SAMPLES, number)))
    table = Table(tmp_path, files)
    expected = {"key": ["a", "b", "c"], "size": [1.0, 2.0, 0.5], "label": [None, None, "x"]}
    assert table.read().to_pydict() == expected
    assert table.read(1, 3, ["label", "key"]).to_pydict() == {"label": [None, "x"], "key": ["b", "c"]}
    assert [rows.to_pydict()["key"] for rows in table.blocks(2, ["key"])] == [["a", "b"], ["c"]]
    with pytest.raises(KeyError):
        table.read(columns=["other"])


def test_keys_at(cache: Cache) -> None:
    opened = Cache(cache.path)
    assert keys_at(opened, ROWS).to_pylist() == cache.column("key").take(pa.array(ROWS)).to_pylist()
    assert keys_at(opened, ROWS[:0]).to_pylist() == []
    assert not opened._sample_columns, "none is kept"


def test_match_keys(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.store.cache._MATCHED_AT_ONCE", 30_000)
    keys = pa.array([*cache.column("key").take(pa.array(np.unique(ROWS))).to_pylist(), "none"], pa.large_string())
    rows, places = match_keys([cache, cache], keys)
    assert rows.tolist() == [*np.unique(ROWS), *(np.unique(ROWS) + NUM_SAMPLES)]
    assert places.tolist() == [0, 1, 2, 3, 4] * 2
    assert [part.tolist() for part in match_keys([cache], keys[:0])] == [[], []]


def test_keys_of_some_samples_are_read_in_blocks(cache: Cache) -> None:
    every = cache.column("key").to_pylist() * 2
    rows = np.array([0, 3, BLOCK, NUM_SAMPLES, NUM_SAMPLES + BLOCK + 1])
    keys = Keys([cache, cache], rows)
    assert (len(keys), keys[1], keys[4]) == (5, every[3], every[rows[4]])
    assert keys.array.to_pylist() == [every[row] for row in rows]
    assert [block.to_pylist() for block in keys.select(np.array([1, 2, 3])).blocks()] == [
        [every[3]],
        [every[BLOCK]],
        [every[NUM_SAMPLES]],
    ]
    assert Keys([cache, cache]).array.to_pylist() == every


def test_column_is_a_sequence() -> None:
    values = ["a", None, "b", "a"]
    column = Column[str | None](pa.array(values))
    assert column == values
    assert column != values[1:]
    assert (column[1], column[2], column[1:3]) == (None, "b", [None, "b"])
    assert (len(column), column.count("a"), "b" in column, "c" in column) == (4, 2, True, False)
    nothing = Column[str | None](pa.array([None], pa.string()))
    assert (column.count("c"), nothing.count("a"), "a" in nothing, nothing == "a") == (0, 0, False, False)
    assert column != dict.fromkeys(values)
    for array in (pa.array(values), pa.chunked_array([values[:1], values[1:]])):
        for kind in (pa.string(), pa.large_string()):
            assert to_array(Column(array), kind).equals(pa.array(values, kind))
    assert is_none(column).tolist() == is_none(values).tolist() == [False, True, False, False]
    assert to_array(column, pa.string()).equals(to_array(values, pa.string()))
    assert np.array(Column(pa.array([1, 2]))).tolist() == [1, 2]
