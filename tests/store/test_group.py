"""Folders of encoders: which metadata is one of a feature, what has its files, and how chunks and items are counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from embedcache.errors import CorruptError, FingerprintError, PathError
from embedcache.provenance import add_digest
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache
from embedcache.store.commits import write_commit
from embedcache.store.feature import FeatureAttributes, create_group, find_group, open_group, read_feature
from embedcache.store.layout import TableVersion, write_info
from embedcache.store.writer import add_feature, commit_chunk
from tests.edits import read_rows, table_file, write_rows, write_tables
from tests.store.features import FINGERPRINT, made_info, random_items, write_feature, written


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
