"""The table of commits gives what the commits themselves say, and is not used where they have changed."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError
from embedcache.extract.repair import repair
from embedcache.store import group as group_module
from embedcache.store.cache import Cache
from embedcache.store.commits import Commit, write_commit
from embedcache.store.compacted import (
    Stamp,
    check_compacted,
    compacted_path,
    read_compacted,
    read_stamps,
    write_compacted,
)
from embedcache.store.feature import Feature
from embedcache.store.group import EncoderGroup
from embedcache.store.layout import commit_name, commit_path
from embedcache.store.verify import verify
from embedcache.store.writer import add_feature, commit_chunk, withdraw
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


def test_commits_that_another_thread_drops_are_returned(feature: Feature, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(dict[object, object]):
        """As where another thread clears the commits that are kept whenever one has added its own."""

        def __setitem__(self, key: object, value: object) -> None: ...

    monkeypatch.setattr(group_module, "_KEPT", Dropping())
    assert feature.group.commits() == read_one_by_one(feature.group)


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


def compacted_chunks(group: EncoderGroup) -> list[int]:
    return sorted(read_compacted(group.path, read_stamps(group.path)))


def damages(path: Path, rng: np.random.Generator) -> Iterator[bytes]:
    """Every kind of damage to a file: cut, emptied, zeros, and flipped bits anywhere."""
    data = path.read_bytes()
    yield from (b"", data[:-9], data[: len(data) // 2], data[4:], bytes(len(data)))
    for place in rng.integers(len(data), size=70).tolist():
        yield data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]


@pytest.mark.slow
def test_damaged_table_is_not_used(feature: Feature) -> None:
    path, expected, num_found = compacted_path(feature.group.path), read_one_by_one(feature.group), 0
    for damaged in damages(path, np.random.default_rng(0)):
        group_module._KEPT.clear()
        path.write_bytes(damaged)
        assert feature.group.commits() == expected
        if check_compacted(feature.group.path, read_stamps(feature.group.path)) is not None:
            num_found += 1
        else:
            assert compacted_chunks(feature.group) == [0, 1, 2, 4], "what differs is read by nobody"
    assert num_found > 40
    path.unlink()
    feature.group.compact()
    assert compacted_chunks(feature.group) == [0, 1, 2, 4]


@pytest.mark.slow
def test_verify_reports_a_damaged_table(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "MIN_CHUNKS", 1)
    cache = Cache(shutil.copytree(cache_path, tmp_path / "cache"))
    path = compacted_path(cache.feature("image", "open_toy/cls").group.path)
    cache.feature("image", "open_toy/cls").group.compact()
    assert verify(cache) == []
    path.write_bytes(path.read_bytes()[:-9])
    (finding,) = verify(cache)
    assert (finding.name, finding.can_repair) == ("commits.parquet", True)
    assert "readers do without it: delete it, or use --repair" in finding.line()
    (line,) = repair(cache, [finding])
    assert "deleted commits.parquet" in line
    assert verify(cache) == []


def test_table_of_another_encoder_is_not_used(feature: Feature, tmp_path: Path) -> None:
    other = write_feature(tmp_path / "other", random_items(19, (4,), seed=1), (4,), chunk_size=4)
    other.group.compact()
    expected = read_one_by_one(feature.group)
    compacted_path(feature.group.path).write_bytes(compacted_path(other.group.path).read_bytes())
    assert compacted_chunks(feature.group) == []
    assert feature.group.commits() == expected
    feature.group.compact()
    assert compacted_chunks(feature.group) == [0, 1, 2, 4]


def test_hashes_are_those_of_the_table_that_was_opened(feature: Feature) -> None:
    commits, expected = feature.group.commits(), read_one_by_one(feature.group)
    compacted_path(feature.group.path).write_bytes(b"PAR1")
    assert [commit and list(commit.hashes) for commit in commits] == [commit and commit.hashes for commit in expected]


def test_table_that_differs_from_a_commit_is_reported(feature: Feature) -> None:
    group, stamps = feature.group, read_stamps(feature.group.path)
    commits = [commit for commit in read_one_by_one(group) if commit is not None]
    wrong = replace(commits[1], hashes=[b"x" * 16] * len(commits[1].hashes))
    write_compacted(group.path, stamps, iter([commits[0], wrong, *commits[2:]]))
    assert check_compacted(group.path, stamps) == "it differs from the commit of chunk 1"


def test_table_has_groups_of_256_chunks(feature: Feature) -> None:
    commit = feature.group.commit(0)
    assert commit is not None
    commits = [replace(commit, chunk=chunk) for chunk in range(600)]
    stamps = {commit_name(chunk): Stamp(size=chunk, time_ns=2 * chunk, inode=3 * chunk) for chunk in range(600)}
    del stamps[commit_name(7)]  # written since
    path = feature.group.path
    write_compacted(path, stamps, iter(commits))
    metadata = pq.read_metadata(compacted_path(path))
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [256, 256, 87]
    table = pq.read_table(compacted_path(path))
    assert table.drop_columns("metadata").slice(1, 1).to_pylist() == [
        {
            "chunk": 1,
            "size": 1,
            "time_ns": 2,
            "inode": 3,
            "num_rows": 4,
            "failures": [{"feature": "f", "offset": 3, "reason": "broken"}],
            "hashes": b"".join(row.to_bytes(16, "big") for row in (0, 1, 2, 0)),
            "without_hash": [3],
        }
    ]
    stamps[commit_name(300)] = Stamp(size=0, time_ns=600, inode=900)
    expected = {chunk: commit for chunk, commit in enumerate(commits) if chunk not in (7, 300)}
    assert read_compacted(path, stamps) == expected


def test_tables_without_checksums_are_not_read(feature: Feature) -> None:
    path, stamps = compacted_path(feature.group.path), read_stamps(feature.group.path)
    assert check_compacted(feature.group.path, stamps) is None
    pq.write_table(pq.read_table(path), path)
    assert check_compacted(feature.group.path, stamps) is not None
    assert read_compacted(feature.group.path, stamps) == {}
    path.unlink()
    assert check_compacted(feature.group.path, stamps) is None
    assert read_stamps(feature.group.path / "none") == {}


def test_hashes_of_a_chunk_that_was_changed_raise(feature: Feature) -> None:
    group = feature.group
    compacted_path(group.path).unlink()
    group.compact()
    first, second, *_ = read_compacted(group.path, read_stamps(group.path)).values()
    compacted_path(group.path).write_bytes(b"PAR1")
    commit_path(group.path, 0).unlink()
    shorter = group.commit(1)
    assert shorter is not None
    write_commit(group.path, shorter.resize(3))
    for commit in (first, second):
        words = f"chunk {commit.chunk} in {group.path} was changed by another process; run it again"
        with pytest.raises(CorruptError, match=words):
            list(commit.hashes)


@pytest.mark.parametrize(("num_chunks", "is_kept"), [(999, False), (1000, True)])
def test_commits_of_a_thousand_chunks_are_kept(tmp_path: Path, num_chunks: int, is_kept: bool) -> None:
    group = write_feature(tmp_path, random_items(2, (4,), seed=0), (4,), chunk_size=1, skip_chunks=[1]).group
    group = replace(group, info=replace(group.info, num_items={"image": num_chunks}))
    found = group.commits()
    assert [chunk for chunk, commit in enumerate(found) if commit is not None] == [0]
    assert (group.commits() is found) is is_kept
    group.compact()
    assert compacted_path(group.path).exists() is is_kept


def test_few_chunks_have_no_table(tmp_path: Path) -> None:
    opened = write_feature(tmp_path / "c", random_items(9, (4,), seed=0), (4,), chunk_size=4)
    opened.group.compact()
    assert not compacted_path(opened.group.path).exists()
    assert np.array_equal(Cache(tmp_path / "c").feature("image").valid, np.ones(9, bool))
