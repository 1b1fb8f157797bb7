"""A writer that is killed before any of its file operations leaves all old files or all new ones, for every reader."""

import os
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import UnfinishedError
from embedcache.files import open_path, remove_partials
from embedcache.store.commits import find_transactions, finish, is_complete, replacing_together
from embedcache.store.feature import EncoderGroup, Feature, open_group
from embedcache.store.layout import read_info
from embedcache.store.writer import add_feature, commit_chunk
from tests.crash import start_call
from tests.extract.cases import tree
from tests.store.test_writer import commit, group_of, item, values

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
