"""Commits by themselves, and a writer that is killed before any file operation: all old files or all new ones."""

import hashlib
import os
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedcache.errors import CorruptError, UnfinishedError
from embedcache.files import open_path, remove_partials
from embedcache.store.commits import (
    HASH,
    PENDING,
    REMOVED,
    Commit,
    find_transactions,
    finish,
    has_failed,
    hash_item,
    is_complete,
    number_contents,
    read_commit,
    replacing_together,
    write_commit,
)
from embedcache.store.feature import EncoderGroup, Feature, open_group
from embedcache.store.layout import commit_path, read_info
from embedcache.store.writer import add_feature, commit_chunk
from tests.crash import start_call
from tests.extract.cases import tree
from tests.store.test_writer import commit, group_of, item, values

_OFTEN = [b"a" * 16, b"b" * 16, b"ab" * 8]
HASHES = st.lists(st.none() | st.sampled_from(_OFTEN) | st.integers(1).map(lambda n: hash_item(str(n).encode())))


def made(**values: Any) -> Commit:
    return Commit(
        **{
            "chunk": 2,
            "encoder": "e" * 64,
            "index_digest": "d" * 64,
            "features": {"b": {"b/c/2": "0a"}, "a": {}},
            "hashes": [b"\x01" * 16, None, b"\xff" * 16],
            "failures": {"b": [None, 'of "type"', None], "a": ["x", "y", None]},
            "attributes": {"a": "1", "b": "2"},
            **values,
        }
    )


def test_commit_is_read_as_it_was_written_and_refused_after_any_change(tmp_path: Path) -> None:
    write_commit(tmp_path, made())
    assert read_commit(tmp_path, 2) == made()
    assert read_commit(tmp_path, 3) is None

    path = commit_path(tmp_path, 2)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(CorruptError, match=path.name):
            read_commit(tmp_path, 2)
    for changed in (data[:-1], data + data, b"", b"[]", b"3"):
        path.write_bytes(changed)
        with pytest.raises(CorruptError, match=path.name):
            read_commit(tmp_path, 2)

    path.rename(commit_path(tmp_path, 4))
    commit_path(tmp_path, 4).write_bytes(data)
    with pytest.raises(CorruptError, match="expected the commit of chunk 4, got chunk 2"):
        read_commit(tmp_path, 4)


def test_hashes_of_items_and_of_intervals() -> None:
    assert hash_item(b"x") == hash_item(b"x", interval=(None, None)) == hashlib.blake2b(b"x", digest_size=16).digest()
    assert hash_item(b"x", interval=(0.5, None)) == hashlib.blake2b(b"x[0.5,null]", digest_size=16).digest()
    assert hash_item(b"x", interval=(None, 2.0)) == hashlib.blake2b(b"x[null,2.0]", digest_size=16).digest()


@given(HASHES, st.integers(0, 3))
@example([_OFTEN[1], _OFTEN[0], None, _OFTEN[1], _OFTEN[2], _OFTEN[1], None, _OFTEN[0]], 2)
def test_contents_are_numbered_as_python_objects(values: list[bytes | None], skipped: int) -> None:
    array = pa.array([b"x" * 16] * skipped + values, HASH).slice(skipped)
    numbers: dict[bytes | None, int] = {}
    expected = [numbers.setdefault(value, len(numbers)) for value in values]
    assert number_contents(array).tolist() == expected
    assert number_contents(pa.chunked_array([array[:2], array[2:]])).tolist() == expected


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_rows_that_were_appended_are_not_yet_computed(num_rows: int) -> None:
    commit, kept = made(), min(num_rows, 3)
    resized = commit.resize(num_rows)
    assert (resized is commit) == (num_rows == 3)
    assert list(resized.hashes) == [*commit.hashes[:kept], *[None] * (num_rows - kept)]
    for name, reasons in commit.failures.items():
        assert list(resized.failures[name]) == [*reasons[:kept], *[PENDING] * (num_rows - kept)]
    assert resized.is_complete("a") == (num_rows <= 3)
    assert not resized.is_complete("c")


def test_extraction_goes_on_after_the_rows_that_were_tried() -> None:
    commit = made(failures={"b": [None, "broken", REMOVED], "a": ["x", PENDING, None]})
    assert (commit.count_tried("b"), commit.count_tried("a"), commit.resize(5).count_tried("b")) == (3, 1, 3)
    assert [has_failed(reason) for reason in (None, PENDING, REMOVED, "x")] == [False, False, False, True]


def test_used_rows_have_a_feature() -> None:
    assert made().used_rows() == [0, 2]
    without = made().without(["b"])
    assert (without.features, without.attributes) == ({"a": {}}, {"a": "1"})


OLD = [0, None, 2, 3]
NEW = [0, 11, 2, 3]
KILLED = 9
OPERATIONS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def open_test_group(path: Path) -> EncoderGroup:
    return open_group(path, "image", "test", read_info(path))


def retry(path: Path) -> None:
    """Write features of a chunk again, of one shape and ragged, with values where there were none, as commands do."""
    remove_partials(path)
    features = {name: [item(10 + row, shape) for row in range(4)] for name, shape in (("f", (3,)), ("t", (-1, 3)))}
    failures: dict[str, list[None]] = {name: [None] * 4 for name in features}
    commit_chunk(open_test_group(path), 0, features, [bytes(16)] * 4, failures, overwrite_failed=True)


def retry_and_die(path: Path, number: int) -> None:
    """Retry in a process that ends before its file operation of this number."""
    operations = count()

    def die(event: str, arguments: Any) -> None:
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event in OPERATIONS) and next(operations) == number:
            os._exit(KILLED)

    sys.addaudithook(die)
    retry(path)


@pytest.mark.slow
def test_killed_before_every_file_operation(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    group = group_of(before, 4)
    for name, shape in (("f", (3,)), ("t", (-1, 3))):
        add_feature(group, name, shape, "float16")
        commit(group, [None if value is None else item(value, shape) for value in OLD], feature=name)
    shutil.copytree(before, after)
    retry(after)
    states = set()

    for number in count():
        killed = tmp_path / f"killed-{number}"
        shutil.copytree(before, killed)
        readers = [Feature(open_test_group(killed), name) for name in ("f", "t")]
        old_commits = [reader.commits[0] for reader in readers]
        process = start_call(retry_and_die, killed, number)
        process.join()

        # A reader that has opened the features before, one that opens them now, and the same command.
        again = Path(shutil.copytree(killed, tmp_path / f"again-{number}"))
        for name in ("f", "t"):
            found = values(open_test_group(killed), name)
            states.add(str(found))
            assert found in (OLD, NEW)
        for reader, old in zip(readers, old_commits, strict=True):
            assert old is not None
            read = [None if one is None else float(one.flat[0]) for one in reader.items(old)]
            assert [value for value in read if value is not None] == [0, 2, 3]
        retry(again)
        assert tree(again) == tree(after)
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
    assert number > 40
    assert len(states) == 2


def test_reader_who_must_not_write_names_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(tmp_path, 4)
    add_feature(group, "f", (3,), "float16")
    commit(group, [item(0, (3,))] * 4)
    reader = Feature(group, "f")
    with replacing_together(group.path, 0) as folder:
        shutil.copytree(group.path / "f", folder / "f")
        array = folder / "f/c/0/0"
        array.write_bytes(bytes([1]) + array.read_bytes()[1:])
    monkeypatch.setattr("embedcache.store.feature.is_complete", lambda *_: True)
    with pytest.raises(UnfinishedError, match="chunk 0 of feature test/f is being written by another process, or was"):
        reader.load()


@pytest.mark.parametrize("scheme", ["", "memory://tests-of-transactions/"])
def test_all_files_are_replaced_or_none(tmp_path: Path, scheme: str) -> None:
    root = open_path(f"{scheme}{tmp_path}" if scheme else tmp_path)
    names = ["a/c/0", "chunks/00003.json", "zarr.json"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"old")

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"new")

    def fail() -> None:
        with replacing_together(root, 3) as folder:
            write(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {(root / name).read_bytes() for name in names} == {b"old"}
    with replacing_together(root, 3) as folder:
        write(folder)
        assert not is_complete(root, 3)
        assert scheme or find_transactions(root) == [3]
    assert {(root / name).read_bytes() for name in names} == {b"new"}
    finish(root, 3)  # nothing is left
    assert not folder.exists()
    assert scheme or find_transactions(root) == []
