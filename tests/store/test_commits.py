"""Commits by themselves: hashes of items, what is on disk, and commits of fewer or more rows."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedcache.errors import CorruptError
from embedcache.store.commits import (
    HASH,
    PENDING,
    REMOVED,
    Commit,
    has_failed,
    hash_item,
    number_contents,
    read_commit,
    write_commit,
)
from embedcache.store.layout import commit_path

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
