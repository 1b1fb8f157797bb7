"""Keyed tables: what is written is read, by rows in the caches of the header and by keys in any other cache."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.dataset import keytable
from embedcache.dataset.keytable import KeyTable
from embedcache.errors import CorruptError, DataError, EmbedcacheError, PathError
from embedcache.store.cache import Cache
from tests.edits import no_more_files

ROWS = np.array([3, 7, 38, 41, 119])
"""Of the forty samples of the first cache, and the eighty of the second, in which keys are the same numbers."""
VALUES: dict[str, Any] = {
    "cosine": np.array([0.5, np.nan, 0.25, 1, -1], np.float32),
    "concept": pa.array(["a", "b", None, "d\n", "é"]),
    "lists": pa.array([[1, 2], [], [3], None, [4]], pa.list_(pa.int32())),
}
COSINES = [0.5, None, 0.25, 1, -1]


@pytest.fixture
def caches(two_caches: list[Path]) -> list[Cache]:
    return [Cache(path) for path in two_caches]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.parquet"


def contents(table: KeyTable) -> dict[int, float]:
    return dict(zip(table.rows.tolist(), table.columns["cosine"].to_pylist(), strict=True))


@pytest.mark.parametrize("size", [2, 2**20])
def test_what_is_written_is_read(caches: list[Cache], path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(keytable, "_ROWS_PER_GROUP", size)
    monkeypatch.setattr(keytable, "BLOCK", size)
    keytable.write(path, caches, VALUES, "test", {"method": "hand"}, rows=ROWS)
    assert pq.ParquetFile(path).num_row_groups == -(-5 // size)
    table = pq.read_table(path)
    assert table.column_names == ["row", "key", "cache", *VALUES]
    assert table["row"].to_pylist() == [3, 7, 38, 1, 79]
    assert table["key"].to_pylist() == ["00003", "00007", "00038", "00001", "00079"]
    about = json.loads(table.schema.metadata[b"embedcache"])
    assert (about["kind"], about["method"], about["caches"]) == ("test", "hand", [str(each.path) for each in caches])
    assert not any("key" in cache._sample_columns for cache in caches)

    read = keytable.read(path, caches, "test")
    assert read.rows.tolist() == ROWS.tolist()
    assert read.columns.equals(table.select(list(VALUES)))
    assert read.align(120)["concept"].take(pa.array([0, 7, 119])).to_pylist() == [None, "b", "é"]
    reversed_contents = contents(keytable.read(path, caches[::-1], "test"))
    assert reversed_contents == {1: 1, 79: -1, 83: 0.5, 87: None, 118: 0.25}
    assert contents(keytable.read(path, caches[1:], "test", columns=["cosine", "more"])) == {1: 1, 79: -1}


def test_table_of_one_cache_is_read_by_key_in_others(caches: list[Cache], cache_path: Path, path: Path) -> None:
    keytable.write(path, caches[:1], {"cosine": np.arange(40.0)}, "test", {})
    assert "cache" not in pq.read_table(path).column_names
    assert list(contents(keytable.read(path, caches, "test"))) == list(range(40))  # not the equal keys of the other
    assert contents(keytable.read(path, [Cache(cache_path)], "test")) == dict(enumerate(np.arange(40.0)))
    keytable.write(path, [Cache(cache_path)], {}, "test", {})
    with pytest.raises(DataError, match="260 of 300 keys"):
        keytable.read(path, caches[:1], "test")
    assert len(keytable.read(path, caches[:1], "test", can_be_others=True).rows) == 40


def test_table_may_be_sorted_cut_and_extended(caches: list[Cache], path: Path) -> None:
    keytable.write(path, caches, VALUES, "test", {}, rows=ROWS)
    table, expected = pq.read_table(path), dict(zip(ROWS.tolist(), COSINES, strict=True))
    changes = [
        (table.sort_by([("cosine", "descending")]), expected),
        (table.append_column("mine", [[1, 2, 3, 4, 5]]), expected),
        (table.slice(1, 2), {7: None, 38: 0.25}),
        (table.select(["key", "cosine"]).slice(0, 2), {3: 0.5, 7: None, 43: 0.5, 47: None}),
        (table.drop_columns("cache").slice(0, 2), {3: 0.5, 7: None, 43: 0.5, 47: None}),
        (table.replace_schema_metadata().slice(0, 2), {3: 0.5, 7: None, 43: 0.5, 47: None}),
    ]
    for changed, found in changes:
        pq.write_table(changed, path)
        assert contents(keytable.read(path, caches, "test")) == found
    twice = pa.concat_tables([table, table])
    pq.write_table(twice, path)
    assert len(keytable.read(path, caches, "selection").rows) == 5
    with pytest.raises(DataError, match="5 repeated"):
        keytable.read(path, caches, "test")


def test_changed_tables_are_refused(caches: list[Cache], path: Path) -> None:
    keytable.write(path, caches, VALUES, "test", {"method": "a"}, rows=ROWS)
    table = pq.read_table(path)
    others = table.set_column(1, "key", table["key"].take(pa.array([1, 0, 2, 3, 4])))
    outside = table.set_column(0, "row", pa.array([3, 7, 38, 1, 80]))
    changes = [
        (table.replace_schema_metadata({b"embedcache": b"{"}), CorruptError, "write it again"),
        (others, DataError, "in each row the key"),
        (outside, DataError, "in each row the key"),
        (table.drop_columns("key"), CorruptError, "columns row, cache"),
    ]
    for changed, error, word in changes:
        pq.write_table(changed, path)
        with pytest.raises(error, match=word):
            keytable.read(path, caches, "test")


@pytest.mark.parametrize("kind", ["selection", "split", "negatives"])
def test_files_that_are_no_table_raise(caches: list[Cache], path: Path, kind: str) -> None:
    with pytest.raises(PathError, match="got nothing"):
        keytable.read(path, caches, kind)
    keytable.write(path, caches, {"part": ["train"] * 120}, kind, {})
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        keytable.read(path, caches, kind)
    if kind != "selection":
        with pytest.raises(CorruptError, match="group"):
            keytable.read(path, caches, kind)
    path.write_text("no table")
    with pytest.raises(CorruptError, match="t.parquet"):
        keytable.read(path, caches, kind)


def test_keys_of_a_text_file(caches: list[Cache], tmp_path: Path) -> None:
    """A key may be of both caches, or listed twice; lines may be empty, and marks and line ends are no part of keys."""
    path = tmp_path / "keys.txt"
    path.write_bytes(b"\xef\xbb\xbf00003\r\n\n00041\n00003\n")
    assert keytable.read(path, caches, "selection").rows.tolist() == [3, 43, 81]
    for lines, word in ((["00003", "d", "b", "c", "a"], "'d', 'b', 'c'; 4 of 5"), (["b"], "'b'"), ([], "no keys")):
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=word):
            keytable.read(path, caches, "selection")
    path.write_bytes("00003\né\n".encode("latin-1"))
    with pytest.raises(CorruptError, match="0xe9"):
        keytable.read(path, caches, "selection")
    pq.write_table(pa.table({"key": ["00003", None, "b"]}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match="None"):
        keytable.read(tmp_path / "s.parquet", caches, "selection")


@pytest.mark.slow
def test_flipped_bits_are_noticed(caches: list[Cache], path: Path) -> None:
    """Values, headers of pages and the footer: the same values, or one line."""
    rng = np.random.default_rng(0)
    keytable.write(path, caches, VALUES, "test", {}, rows=ROWS)

    def read() -> Any:
        table = keytable.read(path, caches, "test", can_be_others=True)
        return table.rows.tolist(), table.columns.to_pydict(), table.about

    data, expected, num_refused = path.read_bytes(), repr(read()), 0
    for place in [*range(max(4, len(data) - 2500), len(data), 3), *rng.integers(len(data), size=200).tolist()]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        try:
            assert repr(read()) == expected, place
        except EmbedcacheError as error:
            num_refused += 1 if "\n" not in str(error) else -9999
    assert num_refused > 200
