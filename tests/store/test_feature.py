"""Features and their folders: which metadata is one of a feature, what has its files, what is read of a chunk."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, UnfinishedError
from embedcache.files import open_path
from embedcache.provenance import add_digest
from embedcache.settings import replace_fields
from embedcache.store import arrays
from embedcache.store.cache import Cache
from embedcache.store.commits import write_commit
from embedcache.store.feature import Feature, FeatureAttributes, create_group, find_group, open_group, read_feature
from embedcache.store.layout import TableVersion, write_info
from embedcache.store.writer import add_feature, cast_item, commit_chunk
from tests.edits import edit_record, read_rows, table_file, write_rows, write_tables
from tests.store.features import FINGERPRINT, made_info, random_items, write_feature, written

FIRST, SECOND = (f"image/test/chunks/0000{chunk}.json" for chunk in range(2))
SHAPES = {"vector": (5,), "tokens": (3, 4), "ragged": (-1, 4)}


@pytest.mark.slow
@settings(max_examples=15)
@given(
    st.sampled_from(list(SHAPES.values())),
    st.integers(1, 12),
    st.integers(1, 8),
    st.sets(st.integers(0, 11)),
    st.integers(0, 99),
)
def test_round_trip(item_shape: tuple[int, ...], count: int, chunk_size: int, failed: set[int], seed: int) -> None:
    items = random_items(count, item_shape, seed=seed, failed=list(failed))
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as folder:
        feature = write_feature(Path(folder), items, item_shape, chunk_size=chunk_size)
        assert feature.shape == (count, *item_shape)
        asked = rng.integers(-2, count + 2, 20)
        expected = [0 <= row < count and items[row] is not None for row in asked.tolist()]
        assert feature.has(asked).tolist() == expected
        assert feature.valid.tolist() == [item is not None for item in items]
        assert feature.has(asked).tolist() == expected
        assert set(feature.failures) == {row for row in range(count) if items[row] is None}
        lengths = [0 if item is None else len(item.reshape(-1, item_shape[-1])) for item in items]
        assert feature.lengths().tolist() == lengths
        rows = rng.permutation(np.repeat(np.flatnonzero(feature.valid), 2))
        for row, found in zip(rows, feature.gather_tokens(rows), strict=True):
            np.testing.assert_array_equal(found, items[row].astype(np.float16))  # type: ignore[union-attr]
        streamed = [item for _, values in feature.chunks() for item in values]
        assert len(streamed) == count
        for item, found in zip(items, streamed, strict=True):
            if item is not None:
                np.testing.assert_array_equal(found, item.astype(np.float16))
            else:
                assert found is None or np.isnan(found).all()


def test_plain_zarr_reads_ragged_tokens(tmp_path: Path) -> None:
    items = random_items(10, (-1, 4), seed=0, failed=[3])
    write_feature(tmp_path, items, (-1, 4), chunk_size=4)
    tokens = zarr.open_group(tmp_path / "image" / "test" / "f", mode="r")
    lengths = tokens["lengths"][:]
    assert lengths.tolist() == [-1 if item is None else len(item) for item in items]
    second = [item for item in items[4:8] if item is not None]
    np.testing.assert_array_equal(tokens["values/00001"][:], np.concatenate(second).astype(np.float16))


def test_uncommitted_chunk_is_missing(tmp_path: Path) -> None:
    feature = write_feature(tmp_path, random_items(10, (5,), seed=0), (5,), chunk_size=4, skip_chunks=[1])
    assert feature.valid.tolist() == [True] * 4 + [False] * 4 + [True] * 2
    assert [rows.start for rows, _ in feature.chunks()] == [0, 8]
    with pytest.raises(UnfinishedError, match="1 of 3 chunks is missing.*to resume it"):
        feature.load()
    with pytest.raises(DataError, match="row 5 has no feature test/f: its chunk is not committed"):
        feature.gather(np.array([0, 5]))


def test_few_rows_need_only_the_commits_of_their_chunks(tmp_path: Path) -> None:
    items = random_items(12, (5,), seed=0, failed=[3])
    write_feature(tmp_path, items, (5,), chunk_size=4)
    (tmp_path / "image" / "test" / "chunks" / "00002.json").write_bytes(b"x")
    feature = Cache(tmp_path).feature("image")
    assert feature.has(np.array([7, 3, -1])).tolist() == [True, False, False]
    np.testing.assert_array_equal(feature.gather(np.array([7, 0])), np.array([items[7], items[0]], np.float16))
    with pytest.raises(CorruptError, match=r"00002\.json is not a readable commit"):
        feature.gather(np.array([0, 11]))
    (tmp_path / "image" / "test" / "chunks" / "00000.json").unlink()
    assert feature.has(np.array([0])).all(), "each is read once"


@pytest.mark.parametrize(
    ("rows", "word"),
    [([1, 2, 0], "broken"), ([0, 4, -1, 9], "-1"), ([0, 4, 5, 9], "5"), ([[0, 1]], "shape"), ([1, 1.5], "1.5")],
)
def test_gather_of_rows_without_a_feature_raises(tmp_path: Path, rows: list[float], word: str) -> None:
    feature = write_feature(tmp_path, random_items(5, (5,), seed=0, failed=[2]), (5,), chunk_size=4)
    with pytest.raises(DataError, match=word):
        feature.gather(np.array(rows))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), CorruptError, "expected 44 bytes, got 43"),
        (lambda path: path.write_bytes(b""), CorruptError, "expected 44 bytes, got an empty file"),
        (lambda path: path.unlink(), UnfinishedError, "is committed but missing"),
    ],
)
def test_damaged_file_raises(tmp_path: Path, damage: object, error: type[Exception], words: str) -> None:
    feature = write_feature(tmp_path, random_items(8, (5,), seed=1), (5,), chunk_size=4)
    damage(tmp_path / "image/test/f/c/1/0")  # type: ignore[operator]
    with pytest.raises(error, match=words):
        feature.gather(np.array([5]))


@pytest.mark.parametrize("kind", SHAPES)
def test_gather_compares_each_file_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = random_items(8, SHAPES[kind], seed=1)
    feature = write_feature(tmp_path, items, SHAPES[kind], chunk_size=4)
    rows = np.arange(4, 8)
    before = feature.gather_tokens(rows)
    folder = tmp_path / "image/test/f"
    paths = [path for path in folder.rglob("c/**/*") if path.is_file() and "1" in str(path.relative_to(folder))]
    for path in paths:
        data = path.read_bytes()
        for place in (3, -1):  # in the rows; in the copy of the checksum at the end
            path.write_bytes(
                bytes(byte ^ 16 if number == place % len(data) else byte for number, byte in enumerate(data))
            )
            os.utime(path, (1, 1))  # another time than before, also where the disk keeps no milliseconds
            with pytest.raises(CorruptError, match=rf"{path}.*the bytes changed on disk; repair it with"):
                Feature(feature.group, "f").gather_tokens(rows)
        path.write_bytes(data)
    Feature(feature.group, "f").gather_tokens(rows)  # the files were written again, so they count as new
    monkeypatch.setattr("embedcache.store.arrays.google_crc32c", None)  # nothing is compared again
    for old, new in zip(before, Feature(feature.group, "f").gather_tokens(rows), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("kind", SHAPES)
def test_reader_follows_a_chunk_that_is_written_again(tmp_path: Path, kind: str) -> None:
    """As `--extend` and `--retry-failed` write it: a row that had failed gets values."""
    items, shape = random_items(8, SHAPES[kind], seed=1, failed=[6]), SHAPES[kind]
    feature = write_feature(tmp_path, items, shape, chunk_size=4)
    old = feature.gather_tokens(np.array([5, 7]))
    reader, mapped = Feature(feature.group, "f"), Feature(feature.group, "f")
    assert reader.valid[7]
    assert mapped.valid[7]
    added = [cast_item(np.ones((2, *shape[1:]) if shape[0] < 0 else shape), shape, "float16", "f")]
    nothing = [np.zeros_like(added[0])]
    commit_chunk(
        feature.group, 1, {"f": nothing * 2 + added + nothing}, [None] * 4, {"f": [None] * 4}, overwrite_failed=True
    )
    for new in (mapped.gather_tokens(np.array([5, 7])), [list(reader.chunks())[1][1][row] for row in (1, 3)]):
        for before, after in zip(old, new, strict=True):
            np.testing.assert_array_equal(before, after)


def change_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda cache: (cache / FIRST).replace(cache / SECOND), "chunk 0"),
        (lambda cache: (cache / SECOND).write_bytes(b"PAR1"), "repair"),
        (lambda cache: change_text(cache / "image/test/f/zarr.json", '"float16"', '"int16"'), "attributes"),
        (lambda cache: change_text(cache / "image/test/zarr.json", '"w"', '"other"'), "changed since"),
        (lambda cache: edit_record(cache / "cache.json", index_digest="other"), "other rows"),
    ],
)
def test_commit_that_does_not_fit_raises(tmp_path: Path, damage: Callable[[Path], object], word: str) -> None:
    write_feature(tmp_path, random_items(8, (5,), seed=1), (5,), chunk_size=4)
    damage(tmp_path)
    with pytest.raises(CorruptError, match=word):
        Cache(tmp_path).feature("image").load()


@pytest.mark.parametrize(
    ("item", "dtype", "word"),
    [
        ([0, 70_000, 0], "float16", "float32"),
        ([1, np.nan, 1], "float16", "NaN"),
        ([1, 1, 1, 1], "float16", "shape"),
        ([0.5, 1, 2], "int16", "whole"),
        ([np.nan, 1, 2], "int16", "whole"),
    ],
)
def test_cast_item_raises(item: list[float], dtype: str, word: str) -> None:
    with pytest.raises(DataError, match=word):
        cast_item(np.array(item, np.float32), (3,), dtype, "a/b")


@pytest.mark.parametrize("item_shape", [(2,), (3, 2), (-1, 2)])
def test_integers_read_back(tmp_path: Path, item_shape: tuple[int, ...]) -> None:
    floats = random_items(7, item_shape, seed=0, failed=[3])
    items = [None if item is None else np.round(9 * item) for item in floats]
    feature = write_feature(tmp_path, items, item_shape, chunk_size=4, dtype="int16")
    rows = np.array([6, 0, 5])
    for found, expected in zip(feature.gather_tokens(rows), [items[row] for row in rows], strict=True):
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, expected)
    if not feature.is_ragged:
        assert (feature.load()[3] == -1).all()


def test_open_chunks_of_a_remote_feature_fit_the_memory(small_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_path("memory://tests-of-store/cache")
    root.fs.put(f"{small_cache}/", root.path, recursive=True)  # type: ignore[attr-defined]
    feature, local = (Cache(path).feature("image", "open_toy/cls") for path in (root, small_cache))
    chunk_bytes = feature.group.info.chunk_size * feature.shape[-1] * 2
    monkeypatch.setattr(arrays, "_REMOTE_BYTES", 2 * chunk_bytes)
    rows = np.flatnonzero(feature.valid)
    np.testing.assert_array_equal(feature.gather(rows), local.gather(rows))
    assert len(feature._maps) == 2 < feature.group.info.num_chunks("image")
    assert Cache(root).samples.equals(Cache(small_cache).samples)


def test_shapes_of_items() -> None:
    shapes: list[Any] = [[-1], [-2, 5], [3, -1], [1, 2, 3], [True], [2**31]]
    for shape in shapes:
        with pytest.raises(ValidationError):
            FeatureAttributes(item_shape=shape, dtype="float16")
    for shape in ([0], [-1, 5]):
        assert FeatureAttributes(item_shape=shape, dtype="float16").item_shape == tuple(shape)


def test_commits_are_those_of_the_rows_that_were_opened(tmp_path: Path) -> None:
    """Another process has appended samples and committed their chunk since."""
    opened = write_feature(tmp_path, random_items(6, (4,), seed=1), (4,), chunk_size=4, skip_chunks=[1]).group
    version = TableVersion(index_digest="s", num_parts=1)
    parts = (*opened.info.parts, *made_info(1, {"image": 1}, chunk_size=4).parts)
    longer = replace_fields(opened.info, index_digest="l", parts=parts, earlier_versions=(version,))
    write_info(tmp_path, longer)
    group, items = replace(opened, info=longer), [np.ones(4, np.float16)] * 3
    commit_chunk(group, 1, {"f": items}, [bytes(16)] * 3, {"f": [None] * 3})
    found = opened.commit(1)
    assert found is not None
    assert (list(found.hashes), list(found.failures["f"])) == ([bytes(16)] * 2, [None] * 2)
    write_commit(group.path, found)
    with pytest.raises(CorruptError, match=f"chunk 1 in {group.path}: expected 3 rows, got 2$"):
        group.commit(1)


def test_files_of_another_size_are_none(tmp_path: Path) -> None:
    group = write_feature(tmp_path, random_items(9, (-1, 4), seed=1), (-1, 4), chunk_size=4).group
    commits = [group.commit(chunk) for chunk in range(3)]
    assert all(group.has(commit, "f") for commit in commits)
    assert not group.has(None, "f")
    assert not group.has(commits[0], "g")
    lengths = group.path / "f" / "lengths" / "c" / "1"
    data = lengths.read_bytes()
    lengths.write_bytes(data + b"x")
    assert [group.has(commit, "f") for commit in commits] == [True, False, True]
    lengths.write_bytes(data)
    metadata = group.path / "f" / "values" / "00002" / "zarr.json"
    for text in ("{}", "[]", '{"chunk_grid": 3}', "no"):
        metadata.write_text(text)
        assert [group.has(commit, "f") for commit in commits] == [True, True, False]


def test_groups_are_found_by_their_commits(tmp_path: Path) -> None:
    feature = write_feature(tmp_path, random_items(4, (4,), seed=1), (4,), chunk_size=4)
    info = feature.group.info
    found = find_group(tmp_path, "image", "test", info)
    assert found is not None
    assert (found.features, found.has_commits, found.name) == (["f"], True, "test")
    assert find_group(tmp_path, "image", "other", info) is None
    shutil.copytree(found.path / "chunks", tmp_path / "image/other/chunks")
    assert find_group(tmp_path, "image", "other", info) is None, "it has no metadata"
    shutil.rmtree(tmp_path / "image/other")
    other = create_group(tmp_path, "image", "other", info, spec="o:m", fingerprint={"family": "o"}, view="v")
    assert find_group(tmp_path, "image", "other", info) is None
    assert not other.has_commits
    assert (open_group(tmp_path, "image", "other", info).view, feature.group.view) == ("v", "")
    written_attributes = [json.loads((group.path / "zarr.json").read_text())["attributes"] for group in (found, other)]
    assert written_attributes == [
        {"embedcache": add_digest({"spec": "test:m", "fingerprint": FINGERPRINT})},
        {"embedcache": add_digest({"spec": "o:m", "fingerprint": {"family": "o"}, "view": "v"})},
    ]
    again = create_group(tmp_path, "image", "other", info, spec="o:n", fingerprint={"family": "p"})  # nothing is lost
    assert again.fingerprint == {"family": "p"}
    with pytest.raises(FingerprintError, match="encoder 'test' of cache .*family: stored 'test', requested 'p'"):
        create_group(tmp_path, "image", "test", info, spec="t:m", fingerprint={**FINGERPRINT, "family": "p"})


def test_features_with_commits_keep_their_metadata(tmp_path: Path) -> None:
    group = write_feature(tmp_path, random_items(4, (4,), seed=1), (4,), chunk_size=4).group
    before = written(group.path / "f/zarr.json")
    add_feature(group, "f", (4,), "float16")
    assert written(group.path / "f/zarr.json") == before
    with pytest.raises(FingerprintError, match="feature test/f.*dtype: stored 'float16', requested 'float32'"):
        add_feature(group, "f", (4,), "float32")
    with pytest.raises(FingerprintError, match="item_shape"):
        add_feature(group, "f", (5,), "float16")
    add_feature(group, "g", (4,), "float16")
    add_feature(group, "g", (5,), "float32")  # no chunk of it is committed
    assert read_feature(group, "g") == FeatureAttributes(item_shape=(5,), dtype="float32")


def test_damaged_tables_raise(two_caches: list[Path], tmp_path: Path) -> None:
    """Also one whose checksum is right, as in a cache of a stranger."""
    path = Path(shutil.copytree(two_caches[0], tmp_path / "c"))
    items, table = table_file(path, "text"), read_rows(path, "text")
    write_rows(items, table.slice(0, 39))
    for read in (lambda: Cache(path).items("text"), lambda: Cache(path).items("text", chunk=1)):
        with pytest.raises(CorruptError, match=r"items-0.parquet: expected checksum .*; restore the file"):
            read()

    write_tables(path, text=table.drop_columns(["language"]))
    with pytest.raises(CorruptError, match="items-0.parquet has no column 'language'; restore the file"):
        Cache(path).items("text")
    assert Cache(path).items("text", columns=["text"]).num_rows == 40
    write_tables(path, text=table.set_column(1, "text", pa.array([["x"]] * 40)))
    with pytest.raises(CorruptError, match="items-0.parquet cannot be read: .*; restore the file"):
        Cache(path).items("text")

    items.write_bytes(b"PAR1")
    with pytest.raises(CorruptError, match="items-0.parquet: expected checksum"):
        Cache(path).items("text")
    items.unlink()
    with pytest.raises(PathError, match=f"{items} does not exist; restore the file"):
        Cache(path).items("text")
    items.symlink_to("/dev/null")
    with pytest.raises(PathError, match="items-0.parquet"):
        Cache(path).items("text")
