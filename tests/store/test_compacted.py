"""The table of commits gives what the commits themselves say, and is not used where they have changed."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.store import group as group_module
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit
from embedcache.store.compacted import read_compacted, read_stamps, table_path
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup, add_feature
from embedcache.store.writer import commit_chunk, withdraw
from tests.store.features import random_items, write_feature


@pytest.fixture
def feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Feature:
    monkeypatch.setattr(group_module, "MIN_CHUNKS", 3)
    items = random_items(19, (4,), seed=0, failed=[3, 4, 11])
    opened = write_feature(tmp_path / "c", items, (4,), chunk_size=4, skip_chunks=[3])
    opened.group.compact()
    return opened


def read_one_by_one(group: EncoderGroup) -> list[Commit | None]:
    return [group.commit(chunk) for chunk in range(group.info.num_chunks("image"))]


def test_compacted_commits_are_equal_and_read_once(feature: Feature, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_one_by_one(feature.group)
    num_read: list[int] = []
    monkeypatch.setattr(group_module, "read_commit", lambda _, chunk: num_read.append(chunk))
    assert feature.group.commits() == expected
    assert Feature(feature.group, "f").commits == expected
    assert num_read == [3], "only the missing chunk is looked for, and once"
    assert list(feature.hashes) == [value for commit in expected if commit for value in commit.hashes]
    assert feature.failures == dict.fromkeys((3, 4, 11), "broken")
    assert np.flatnonzero(~feature.valid).tolist() == [3, 4, 11, 12, 13, 14, 15]


def test_failures_of_several_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MIN_CHUNKS", 3)
    first = write_feature(tmp_path / "c", random_items(19, (4,), seed=0, failed=[3, 4, 11]), (4,), chunk_size=4)
    add_feature(first.group, "g", (4,), "float16")
    for chunk, failed in ((0, [0, 3]), (2, [3]), (4, [])):
        hashes = first.group.commit(chunk).hashes  # type: ignore[union-attr]
        reasons = ["other" if row in failed else None for row in range(len(hashes))]
        items = [None if reason else np.ones(4, np.float16) for reason in reasons]
        commit_chunk(first.group, chunk, {"g": items}, hashes, {"g": reasons})
    first.group.compact()
    compacted = read_compacted(first.group.path, read_stamps(first.group.path))
    assert list(compacted.values()) == read_one_by_one(first.group)
    assert Feature(first.group, "g").failures == dict.fromkeys((0, 3, 11), "other")


def test_changed_commits_are_read(feature: Feature) -> None:
    withdraw(feature.group, 1, ["f"])
    assert feature.group.commits() == read_one_by_one(feature.group)
    assert sorted(read_compacted(feature.group.path, read_stamps(feature.group.path))) == [0, 2, 4]
    feature.group.compact()
    assert sorted(read_compacted(feature.group.path, read_stamps(feature.group.path))) == [0, 2, 4]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped", "empty"])
def test_damaged_table_is_not_used(feature: Feature, damage: str) -> None:
    path = table_path(feature.group.path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":  # a value of the first column page: the CRC of its page differs
        data[60] ^= 1
    path.unlink() if damage == "deleted" else path.write_bytes({"truncated": data[:-9], "empty": b""}.get(damage, data))
    assert feature.group.commits() == read_one_by_one(feature.group)
    feature.group.compact()
    assert len(read_compacted(feature.group.path, read_stamps(feature.group.path))) == 4


def test_few_chunks_have_no_table(tmp_path: Path) -> None:
    opened = write_feature(tmp_path / "c", random_items(9, (4,), seed=0), (4,), chunk_size=4)
    opened.group.compact()
    assert not table_path(opened.group.path).exists()
    assert np.array_equal(Cache(tmp_path / "c").feature("image").valid, np.ones(9, bool))
