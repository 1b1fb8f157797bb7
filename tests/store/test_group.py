"""Folders of encoders: which metadata is one of a feature, what has its files, and how chunks and items are counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError, FingerprintError, UnknownNameError
from embedcache.store import group as group_module
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.group import (
    _is_item_shape,
    add_feature,
    chunk_shape,
    create_group,
    find_group,
    open_group,
    read_feature,
)
from embedcache.store.layout import CacheInfo, Segment, TableVersion, combined_digest
from tests.store.features import FINGERPRINT, random_items, write_feature


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ([5], True),
        ([0], True),
        ([-1], False),
        ([3, 5], True),
        ([-1, 5], True),
        ([-1, 0], True),
        ([-2, 5], False),
        ([3, -1], False),
        ([], False),
        ([1, 2, 3], False),
        ([True], False),
        ([2.0], False),
        ([2**31 - 1], True),
        ([2**31], False),
        ((5,), False),
        (None, False),
    ],
)
def test_shapes_of_items(shape: Any, expected: bool) -> None:
    assert _is_item_shape(shape) is expected


def test_chunks_of_tokens_are_halved_until_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "_TOKEN_CHUNK_BYTES", 16 * 4 * 8 * 2)  # of 16 rows of 4 tokens of width 8
    info = CacheInfo(chunk_size=64, source={}, index_digest="s", num_samples=1, num_items={})
    assert chunk_shape(info, (4, 8), "float16") == (16, 4, 8)
    assert chunk_shape(info, (4, 8), "float32") == (8, 4, 8)
    assert chunk_shape(replace(info, chunk_size=63), (4, 8), "float16") == (63, 4, 8)  # chunks stay equal parts
    assert chunk_shape(replace(info, chunk_size=60), (4, 8), "float16") == (15, 4, 8)
    assert chunk_shape(info, (999,), "float64") == (64, 999)


@pytest.mark.parametrize(("shape", "tokens"), [((4,), 9), ((3, 4), 27), ((-1, 4), None)])
def test_counts_of_items_and_tokens(tmp_path: Path, shape: tuple[int, ...], tokens: int | None) -> None:
    items = random_items(9, shape, seed=1, failed=[2, 8])
    feature = write_feature(tmp_path, items, shape, chunk_size=4)
    assert feature.num_tokens == (sum(len(item) for item in items if item is not None) if tokens is None else tokens)
    assert feature.shape == (9, *shape)
    counts = feature.group.count_items("f", [1])
    assert (counts.computed, counts.reused, counts.failures) == (4, 5, {"broken": 2})
    rows, reasons = feature.failed
    assert (rows.tolist(), reasons.to_pylist()) == ([2, 8], ["broken"] * 2)


def test_files_of_another_size_are_none(tmp_path: Path) -> None:
    group = write_feature(tmp_path, random_items(9, (-1, 4), seed=1), (-1, 4), chunk_size=4).group
    commits = group.commits()
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
    other = create_group(tmp_path, "image", "other", info, spec="o:m", fingerprint={"family": "o"}, view="v")
    assert find_group(tmp_path, "image", "other", info) is None
    assert not other.has_commits
    assert (open_group(tmp_path, "image", "other", info).view, feature.group.view) == ("v", "")
    assert [group.name for group in found.siblings()] == ["other"]
    again = create_group(tmp_path, "image", "other", info, spec="o:n", fingerprint={"family": "p"})  # nothing is lost
    assert again.fingerprint == {"family": "p"}
    with pytest.raises(FingerprintError, match="encoder 'test' of cache .*family: stored 'test', requested 'p'"):
        create_group(tmp_path, "image", "test", info, spec="t:m", fingerprint={**FINGERPRINT, "family": "p"})
    path = other.path / "zarr.json"
    record = json.loads(path.read_text())
    for name, value in (("spec", 3), ("fingerprint", "x"), ("view", 1)):
        damaged = json.loads(json.dumps(record))
        damaged["attributes"]["embedcache"][name] = value
        path.write_text(json.dumps(damaged))
        with pytest.raises(CorruptError, match="expected the spec and the fingerprint of an encoder, got others"):
            open_group(tmp_path, "image", "other", info)
    assert found.siblings() == []  # damaged


def test_features_with_commits_keep_their_metadata(tmp_path: Path) -> None:
    group = write_feature(tmp_path, random_items(4, (4,), seed=1), (4,), chunk_size=4).group
    add_feature(group, "f", (4,), "float16")
    with pytest.raises(FingerprintError, match="feature test/f.*dtype: stored 'float16', requested 'float32'"):
        add_feature(group, "f", (4,), "float32")
    with pytest.raises(FingerprintError, match="item_shape"):
        add_feature(group, "f", (5,), "float16")
    add_feature(group, "g", (4,), "float16")
    add_feature(group, "g", (5,), "float32")  # no chunk of it is committed
    assert read_feature(group, "g") == {"item_shape": [5], "dtype": "float32"}
    path = group.path / "g" / "zarr.json"
    for old, new in (('"float32"', '"complex64"'), ("5\n", "-1\n")):
        path.write_text(path.read_text().replace(f'"dtype": {old}', f'"dtype": {new}'))
    with pytest.raises(CorruptError, match="expected the item_shape and dtype of a feature, got .* and 'complex64'"):
        read_feature(group, "g")


def test_commits_that_are_kept_are_those_of_eight_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MIN_CHUNKS", 1)
    group_module._KEPT.clear()
    for number in range(9):
        feature = write_feature(tmp_path / str(number), random_items(4, (4,), seed=1), (4,), chunk_size=4)
        assert feature.group.commits() is feature.group.commits()
        assert len(group_module._KEPT) == (number + 1 if number < 8 else 1)
    group_module._KEPT.clear()


def test_numbers_of_rows_and_chunks() -> None:
    version = TableVersion(index_digest="old", num_items={"image": 7})
    info = CacheInfo(
        chunk_size=4, source={}, index_digest="new", num_samples=9, num_items={"image": 10}, earlier_versions=(version,)
    )
    assert (info.num_chunks("image"), info.num_chunks("text")) == (3, 0)
    assert replace(info, num_items={"image": 8}).num_chunks("image") == 2
    assert info.chunk_rows("image", 2) == slice(8, 10)
    assert info.count_items("image", [0, 2]) == 6
    assert [info.num_chunk_rows("old", "image", chunk) for chunk in range(3)] == [4, 3, 0]
    assert [info.num_chunk_rows("new", "image", chunk) for chunk in range(3)] == [4, 4, 2]
    assert info.num_chunk_rows("new", "text", 0) == 0
    assert info.num_chunk_rows("other", "image", 0) is None
    assert [info.has_rows_of(name) for name in ("old", "new", "other")] == [True, True, False]
    assert info.all_segments == [Segment(num_samples=9, digest="new")]
    parts = [Segment(num_samples=4, digest="a"), Segment(num_samples=5, digest="b")]
    assert replace(info, segments=parts).all_segments == parts
    assert combined_digest(parts[:1]) == "a"
    digests = {combined_digest(parts), combined_digest(parts[::-1]), combined_digest(parts[:1], {"digest": "c"})}
    assert len(digests) == 3
    assert (info.is_partial, replace(info, removed={"digest": "c"}).is_partial) == (False, True)


@pytest.fixture(scope="module")
def copied(two_caches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(two_caches[0], tmp_path_factory.mktemp("copied") / "c"))


def test_features_are_found_by_name_or_the_message_lists_them(copied: Path) -> None:
    cache = Cache(copied)
    assert cache.feature("image", "open_toy/cls").name == "open_toy/cls"
    names = "open_toy/cls, open_toy/patches"
    with pytest.raises(UnknownNameError, match=f"no name was given; name one of these features: {names}$"):
        cache.feature("image")
    with pytest.raises(UnknownNameError, match=f"'open_toy' matches several; name one of these features: {names}$"):
        cache.feature("image", "open_toy")
    option = "--encoder audio=SPEC"
    with pytest.raises(UnknownNameError, match=f"has no audio features; extract some: embedcache extract {option}$"):
        cache.feature("audio")
    assert len(cache.features()) == 4
    assert [feature.modality for feature in cache.features("text")] == ["text", "text"]


def test_modalities_without_features_name_those_with(tmp_path: Path) -> None:
    cache = write_feature(tmp_path, random_items(4, (4,), seed=1), (4,), chunk_size=4).group.path.parents[1]
    with pytest.raises(UnknownNameError, match="no text features; extract some: .* --text-encoder SPEC$"):
        Cache(cache).feature("text")
    shutil.move(cache / "image", cache / "audio")
    record = (cache / "cache.json").read_text().replace('"image"', '"audio"')
    values = {name: value for name, value in json.loads(record).items() if name != "digest"}
    (cache / "cache.json").write_text(json.dumps(values))
    with pytest.raises(UnknownNameError, match="; or name others with --feature MODALITY=NAME, one of: audio=test/f$"):
        Cache(cache).feature("image")


@pytest.mark.parametrize("group_rows", [7, 16, 32, 40])
def test_blocks_of_a_table_are_found_in_row_groups_of_any_size(copied: Path, tmp_path: Path, group_rows: int) -> None:
    path = Path(shutil.copytree(copied, tmp_path / "c"))
    table = pq.read_table(path / "text" / "items.parquet")
    pq.write_table(table, path / "text" / "items.parquet", row_group_size=group_rows)
    cache = Cache(path)
    assert cache.items("text", chunk=0).equals(table.slice(0, 32))
    assert cache.items("text", chunk=1, columns=["text"]).equals(table.select(["text"]).slice(32))
    assert cache.items("text").equals(table)
    assert cache.key(39) == "00039"
    assert (cache.block_rows("samples"), cache.block_rows("text")) == (65_536, 32)
    assert (cache.num_rows("samples"), cache.num_rows("text"), cache.num_rows("audio")) == (40, 40, 0)
    assert not cache.removed_items("text").any()


def test_tables_without_a_column_or_rows_raise(copied: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(copied, tmp_path / "c"))
    items = path / "text" / "items.parquet"
    table = pq.read_table(items)
    pq.write_table(table.drop_columns(["language"]), items)
    with pytest.raises(CorruptError, match=f"the table of text in {path} has no column 'language'; restore the file"):
        Cache(path).items("text")
    assert Cache(path).items("text", columns=["text"]).num_rows == 40
    pq.write_table(table.slice(0, 39), items)
    for read, number in ((lambda: Cache(path).items("text"), 40), (lambda: Cache(path).items("text", chunk=1), 8)):
        with pytest.raises(CorruptError, match=f"items.parquet: expected {number} rows, got {number - 1}; restore"):
            read()
    assert Cache(path).items("text", chunk=0).num_rows == 32
    changed = table.set_column(1, "text", pa.array(["x"] * 40))
    pq.write_table(pa.concat_tables([table.slice(0, 32), changed.slice(32)]), items)
    assert Cache(path).items("text", chunk=0).num_rows == 32
    with pytest.raises(CorruptError):
        Cache(path).items("text", chunk=1)


def test_vectors_of_a_chunk_without_commit_are_missing(tmp_path: Path) -> None:
    feature = write_feature(tmp_path, random_items(9, (4,), seed=1, failed=[0]), (4,), chunk_size=4, skip_chunks=[1])
    opened = Feature(feature.group, "f")
    assert np.flatnonzero(~opened.valid).tolist() == [0, 4, 5, 6, 7]
    assert opened.failed[0].tolist() == [0]
