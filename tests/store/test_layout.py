"""What `cache.json` holds, which numbers are refused, and how rows and chunks are counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import CorruptError
from embedcache.store import layout
from embedcache.store.layout import CacheInfo, Segment, TableVersion, combined_digest, info_path, read_info, write_info
from tests.edits import edit_record
from tests.store.features import NO_CHECKSUMS, NO_DIGESTS

EMPTY = CacheInfo(
    chunk_size=1,
    source={},
    index_digest="s",
    num_samples=0,
    num_items={},
    table_digests=NO_DIGESTS,
    table_checksums=NO_CHECKSUMS,
)


def test_all_fields_are_read_back(tmp_path: Path) -> None:
    info = CacheInfo(
        chunk_size=4,
        source={"type": "folder"},
        index_digest="new",
        num_samples=9,
        num_items={"image": 10, "audio": 0},
        segments=(Segment(num_samples=4, digest="a"), Segment(num_samples=5, digest="b")),
        earlier_versions=(TableVersion(index_digest="old", num_items={"image": 7}),),
        table_digests=dict.fromkeys(("samples", "image", "audio"), "d"),
        table_checksums={"samples": {"key": "00000000"}, "image": {}, "audio": {}},
        removed={"num_samples": 1, "digest": "r"},
    )
    write_info(tmp_path, info)
    assert read_info(tmp_path) == info


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_size", 0),
        ("chunk_size", True),
        ("chunk_size", 2**40),
        ("num_samples", -1),
        ("num_samples", 1.0),
        ("num_items", {"image": -1}),
        ("num_items", {"imag": 3}),
        ("earlier_versions", [{"index_digest": "x", "num_items": {"text": None}}]),
        ("source", []),
        ("source", {"type": "folder", "path": ["a", "b"]}),
        ("source", {"type": 1, "path": "a"}),
        ("source", {"type": "folder", "path": "/a\0"}),
        ("source", {"type": "folder", "path": "/a", "settings": [1]}),
        ("source", {"type": "merged", "path": "a", "parts": [3]}),
        ("table_digests", ["x"]),
        ("table_checksums", {"text": "x"}),
        ("table_digests", {}),
        ("removed", "x"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    write_info(tmp_path, EMPTY)
    edit_record(info_path(tmp_path), **{name: value})
    with pytest.raises(CorruptError, match="fields"):
        read_info(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_size", 1),
        ("chunk_size", 2**40 - 1),
        ("num_samples", 0),
        ("num_items", {"image": 0}),
        ("earlier_versions", [{"index_digest": "x", "num_items": {"text": 5}}]),
        ("source", {"type": "module:Source", "path": ["a", "b"]}),  # of a plug-in
    ],
)
def test_values_at_the_limits_are_read(tmp_path: Path, name: str, value: Any) -> None:
    write_info(tmp_path, EMPTY)
    edit_record(info_path(tmp_path), **{name: value})
    read_info(tmp_path)


def test_numbers_of_rows_and_chunks() -> None:
    version = TableVersion(index_digest="old", num_items={"image": 7})
    info = replace(
        EMPTY,
        chunk_size=4,
        index_digest="new",
        num_samples=9,
        num_items={"image": 10},
        earlier_versions=(version,),
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


def test_chunks_of_tokens_are_halved_until_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_TOKEN_CHUNK_BYTES", 16 * 4 * 8 * 2)  # of 16 rows of 4 tokens of width 8
    info = replace(EMPTY, chunk_size=64)
    assert info.chunk_shape((4, 8), "float16") == (16, 4, 8)
    assert info.chunk_shape((4, 8), "float32") == (8, 4, 8)
    assert replace(info, chunk_size=63).chunk_shape((4, 8), "float16") == (63, 4, 8)  # chunks stay equal parts
    assert replace(info, chunk_size=60).chunk_shape((4, 8), "float16") == (15, 4, 8)
    assert info.chunk_shape((999,), "float64") == (64, 999)


@pytest.mark.parametrize(("num_tokens", "rows"), [(256, 32), (264, 16)])  # 16 and 16.5 MiB are half of the rows
def test_chunks_of_tokens_have_up_to_16_mebibytes(num_tokens: int, rows: int) -> None:
    info = replace(EMPTY, chunk_size=64)
    assert info.chunk_shape((num_tokens, 1024), "float16") == (rows, num_tokens, 1024)
