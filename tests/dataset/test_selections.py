"""Keyed tables, and the selections, scores and hard negatives in them: read in their caches and others."""

import json
import logging
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Ints
from embedcache.dataset import keytable
from embedcache.dataset.keytable import KeyTable
from embedcache.dataset.selections import (
    Selection,
    read_negatives,
    read_scores,
    read_selected_keys,
    read_selection,
    write_negatives,
    write_selection,
)
from embedcache.dataset.splits import read_split, write_split
from embedcache.errors import CorruptError, DataError, EmbedcacheError, PathError, SettingError, UnknownNameError
from embedcache.provenance import write_record
from embedcache.store.cache import Cache
from embedcache.store.removal import erase, remove_rows
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


@pytest.fixture(scope="module")
def cache(two_caches: list[Path]) -> Cache:
    return Cache(two_caches[0])


def test_scores_that_are_written_are_read(cache: Cache, tmp_path: Path) -> None:
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


def test_wrong_scores_raise(cache: Cache, tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("negatives")


def made(count: int, width: int, seed: int) -> tuple[Ints, Ints]:
    """Return (S, K) negatives, of which some are none, and (S,) groups, of which some are of no group."""
    rng = np.random.default_rng(seed)
    return rng.integers(-1, count, (count, width)), rng.integers(-1, 5, count)


def write(path: Path, cache: Cache, negatives_SK: Ints, groups_S: Ints) -> None:
    path.unlink(missing_ok=True)
    negatives_MK = negatives_SK[groups_S >= 0]
    write_negatives(path, cache, groups_S, negatives_MK, (negatives_MK / 100).astype(np.float32), {"method": "test"})


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999), st.booleans())
def test_negatives_that_are_written_are_read(
    two_caches: list[Path], folder: Path, one: int, other: int, seed: int, is_reversed: bool
) -> None:
    """Check two tables of different widths, in any order."""
    caches = [Cache(path) for path in two_caches]
    tables = [made(cache.info.num_samples, width, seed) for cache, width in zip(caches, (one, other), strict=True)]
    paths = [folder / "a.parquet", folder / "b.parquet"]
    for path, cache, (negatives_SK, groups_S) in zip(paths, caches, tables, strict=True):
        write(path, cache, negatives_SK, groups_S)
    found = read_negatives(paths[::-1] if is_reversed else paths, caches)
    expected = [
        [number + first for number in row if number >= 0 and group >= 0]
        for first, (negatives_SK, groups_S) in zip((0, 40), tables, strict=True)
        for row, group in zip(negatives_SK.tolist(), groups_S.tolist(), strict=True)
    ]
    assert [[number for number in row if number >= 0] for row in found.negatives_SK.tolist()] == expected
    assert found.negatives_SK.shape == (120, max(map(len, expected)))
    assert found.negatives_SK.dtype == np.int32
    groups = np.concatenate([tables[0][1], tables[1][1]])
    firsts = np.repeat([0, 40], [40, 80])
    assert found.groups_S[groups >= 0].tolist() == (groups + firsts)[groups >= 0].tolist()
    assert found.groups_S[groups < 0].tolist() == (-1 - np.arange(120))[groups < 0].tolist()


def test_table_has_the_samples_that_were_looked_at(caches: list[Cache], tmp_path: Path) -> None:
    negatives_SK, groups_S = made(40, 3, 0)
    write(tmp_path / "a.parquet", caches[0], negatives_SK, groups_S)
    rows = np.flatnonzero(groups_S >= 0)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["row"].to_pylist() == rows.tolist()
    assert table["group"].to_pylist() == groups_S[rows].tolist()
    lists = zip(table["negatives"].to_pylist(), table["scores"].to_pylist(), strict=True)
    for row, (listed, scores) in zip(rows.tolist(), lists, strict=True):
        assert listed == [number for number in negatives_SK[row].tolist() if number >= 0]
        assert scores == pytest.approx([number / 100 for number in listed])


def test_samples_may_have_no_negatives_at_all(caches: list[Cache], tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", caches[0], np.full((40, 3), -1), np.zeros(40, np.int64))
    found = read_negatives([tmp_path / "a.parquet"], caches[:1])
    assert found.negatives_SK.shape == (40, 0)
    assert found.groups_S.tolist() == [0] * 40


def test_tables_that_do_not_belong_raise(caches: list[Cache], tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, cache in zip(paths, caches, strict=True):
        write(path, cache, *made(cache.info.num_samples, 1, 0))
    for some in ([paths[0], paths[0]], [paths[1], paths[1]]):
        with pytest.raises(DataError, match="second"):
            read_negatives(some, caches)
    with pytest.raises(DataError, match="got those of"):
        read_negatives([paths[1]], caches[:1])
    pq.write_table(pq.read_table(paths[0]).replace_schema_metadata(), paths[0])  # nothing says whose rows are in lists
    with pytest.raises(DataError, match="another tool"):
        read_negatives([paths[0]], caches[:1])


REMOVED = np.array([3, 29, 30, 33])


@pytest.fixture(scope="module")
def after(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same cache without four of them."""
    path = Path(shutil.copytree(cache.path, tmp_path_factory.mktemp("removed") / "cache"))
    remove_rows(Cache(path), REMOVED, cache.column("key").take(pa.array(REMOVED)).to_pylist())
    erase(path)
    return Cache(path)


@pytest.mark.parametrize(("count", "num_removed"), [(40, 4), (30, 2), (3, 0)])
def test_they_are_in_no_part(
    cache: Cache, after: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, num_removed: int
) -> None:
    """Check splits of all samples, and of the first ones: the others were appended after it."""
    path, parts = tmp_path / "split.parquet", [*["train", "val", "test"] * 13, "train"]
    columns = {"part": parts[:count], "group": [*range(count)]}
    keytable.write(path, [cache], columns, "split", {}, rows=np.arange(count))
    with caplog.at_level(logging.WARNING):
        found = read_split(path, [after])
    message = f"split {path}: {num_removed} samples were removed from the cache, and left out"
    assert caplog.messages == [message] * (num_removed > 0)
    in_part = [row for row in range(count) if row not in REMOVED]
    assert found.parts == [parts[row] if row in in_part else "" for row in range(40)]
    assert [found.groups[row] for row in in_part] == in_part
    assert len(set(found.groups)) == 40


def test_they_are_left_out_of_a_selection(
    cache: Cache, after: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.parquet"

    def read(rows: list[int]) -> tuple[list[int], list[str]]:
        write_selection(path, cache, Selection(rows=np.array(rows)), {})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return read_selection(path, [after]).tolist(), caplog.messages

    assert read([2, 3, 4, 33]) == ([2, 4], [f"selection {path}: 2 samples were removed from the cache, and left out"])
    assert read([2, 4]) == ([2, 4], [])
    (tmp_path / "keys.txt").write_text("00003\n00002\nelsewhere\n")
    with pytest.raises(DataError, match="got 'elsewhere'; 1 of 3 keys"):
        read_selection(tmp_path / "keys.txt", [after])
    (tmp_path / "keys.txt").write_text("elsewhere\n")
    caplog.clear()
    with pytest.raises(DataError, match="got 'elsewhere'; 1 of 1 keys"):
        read_selection(tmp_path / "keys.txt", [after])
    assert not caplog.messages
