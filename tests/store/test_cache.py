from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.errors import CorruptError, DataError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.settings import replace_fields
from embedcache.sources import SourceSettings, open_source
from embedcache.store import layout
from embedcache.store.cache import Cache
from embedcache.store.layout import (
    CacheInfo,
    Part,
    TableFile,
    TableVersion,
    choose_chunk_size,
    combined_digest,
    find_unlisted,
    info_path,
    next_revision,
    read_info,
    table_name,
    write_info,
)
from tests.edits import edit_record
from tests.images import write_images
from tests.store.features import made_info
from tests.toy import IMAGE, TEXT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of 20 images, of which 7 cannot be read."""
    folder = tmp_path_factory.mktemp("failures")
    source = write_images(folder / "source", 20)
    for row in range(3, 10):
        (source / f"{row:05d}.png").write_bytes(b"")
    settings = ExtractSettings(features=("cls",), chunk_size=4)
    extract(open_source(source), folder / "cache", image_encoder=[IMAGE], settings=settings)
    return Cache(folder / "cache")


@pytest.mark.parametrize(
    ("read", "error", "word"),
    [
        (lambda cache: cache.key(-1), DataError, "-1"),
        (lambda cache: cache.key(20), DataError, "20"),
        (lambda cache: cache[20], IndexError, "20"),
        (lambda cache: cache[-21], IndexError, "-21"),
        (lambda cache: cache["label"], UnknownNameError, "label"),
        (lambda cache: cache.items("imag"), UnknownNameError, "imag"),
        (lambda cache: cache.items("image", chunk=5), DataError, "5"),
        (lambda cache: cache.items("image", chunk=-1), DataError, "-1"),
        (lambda cache: cache.features("imag"), UnknownNameError, "unknown modality 'imag'; known: image, "),
        (lambda cache: cache.feature("audio"), UnknownNameError, "no audio features; extract some: embedcache"),
        (lambda cache: cache.feature("image", "other"), UnknownNameError, "other"),
        (lambda cache: cache.to_pandas("audio"), UnknownNameError, "audio"),
    ],
)
def test_unknown_rows_and_names_raise(
    cache: Cache, read: Callable[[Cache], object], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        read(cache)


def test_items_of_a_modality_without_any(cache: Cache) -> None:
    assert cache.items("video").num_rows == 0
    assert cache.items("audio", columns=["sample", "stop_s"]).column_names == ["sample", "stop_s"]
    assert not len(cache.removed_items("points"))


def test_rows_are_samples(cache: Cache) -> None:
    assert len(cache) == 20
    texts = cache.items("text")["text"].to_pylist()
    samples = [{"key": f"{n:05d}", "image": [f"{n:05d}.png"], "text": [texts[n]]} for n in range(20)]
    assert list(cache) == samples
    assert (cache[3], cache[-1], cache[-20], cache[np.int64(4)]) == (samples[3], samples[19], samples[0], samples[4])
    assert (cache[5:8], cache[18:99], cache[9:3], cache[8:2:-3]) == (samples[5:8], samples[18:], [], samples[8:2:-3])
    assert cache[2:9:2] == samples[2:9:2]
    assert cache["key"].to_pylist() == [sample["key"] for sample in samples]


def test_samples_have_several_items_or_none(tmp_path: Path) -> None:
    rows = {"id": ["a", "b", "c"], "caption": [["x", "y"], [], ["z"]], "label": [1, 2, 3]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet", settings=SourceSettings(key_column="id"))
    extract(source, tmp_path / "cache", text_encoder=TEXT, chunk_size=2)
    cache = Cache(tmp_path / "cache")
    assert [(sample["key"], sample["label"], sample["text"]) for sample in cache] == [
        ("a", 1, ["x", "y"]),
        ("b", 2, []),
        ("c", 3, ["z"]),
    ]
    frame = cache.to_pandas("text")
    assert frame[["key", "text", "label", "sample"]].to_numpy().tolist() == [
        ["a", "x", 1, 0],
        ["a", "y", 1, 0],
        ["c", "z", 3, 2],
    ]
    assert cache.to_pandas()["label"].tolist() == [1, 2, 3]


EMPTY = made_info(1, {}, chunk_size=1)


def made_part(digest: str, number: int, **num_rows: int) -> Part:
    files = {
        name: TableFile(name=table_name(name, number), num_rows=count, num_bytes=7, checksum="0a")
        for name, count in num_rows.items()
    }
    return Part(digest=digest, tables=files)


TWO = CacheInfo(
    chunk_size=4,
    source={"type": "folder", "path": "photos"},
    index_digest="new",
    parts=(made_part("a", 0, samples=4, image=7), made_part("b", 1, samples=5, image=3, audio=1)),
    earlier_versions=(TableVersion(index_digest="old", num_parts=1),),
    removed={"num_samples": 1, "digest": "r", "is_erased": True},
)


def test_all_fields_are_read_back(tmp_path: Path) -> None:
    write_info(tmp_path, TWO)
    assert read_info(tmp_path) == TWO


def with_file(**values: Any) -> list[dict[str, Any]]:
    """Return the parts of a manifest in which a file has other values."""
    record = TWO.to_json()
    record["parts"][1]["tables"]["image"].update(values)
    parts: list[dict[str, Any]] = record["parts"]
    return parts


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_size", 0),
        ("parts", with_file(num_rows=0)),
        ("parts", with_file(checksum=3)),
        ("parts", with_file(name="/etc/passwd")),
        ("parts", with_file(name="image/../items-0.parquet")),
        ("parts", [{"digest": "x", "tables": {}}]),
        ("parts", [{"digest": "x", "tables": {"imag": with_file()[0]["tables"]["samples"]}}]),
        ("earlier_versions", [{"index_digest": "x", "num_parts": None}]),
        ("source", []),
        ("source", {}),
        ("source", {"type": "folder", "path": ["a", "b"]}),
        ("source", {"type": "folder", "path": "/a\0"}),
        ("source", {"type": "folder", "path": "/a", "settings": [1]}),
        ("source", {"type": "merged", "path": "a", "parts": [3]}),
        ("removed", "x"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    write_info(tmp_path, EMPTY)
    edit_record(info_path(tmp_path), **{name: value})
    with pytest.raises(CorruptError, match="fields"):
        read_info(tmp_path)


def test_numbers_of_rows_and_chunks() -> None:
    info = replace_fields(TWO, removed={})
    assert (info.num_samples, dict(info.num_items)) == (9, {"image": 10, "audio": 1})
    assert [file.name for file in info.files("image")] == ["image/items-0.parquet", "image/items-1.parquet"]
    assert (info.num_chunks("image"), info.num_chunks("text")) == (3, 0)
    assert info.chunk_rows("image", 2) == slice(8, 10)
    assert info.count_items("image", [0, 2]) == 6
    assert info.item_counts("image") == {7, 10}
    assert [info.num_chunk_rows("old", "image", chunk) for chunk in range(3)] == [4, 3, 0]
    assert [info.num_chunk_rows("new", "image", chunk) for chunk in range(3)] == [4, 4, 2]
    assert info.num_chunk_rows("new", "text", 0) == 0
    assert info.num_chunk_rows("other", "image", 0) is None
    assert [info.has_rows_of(name) for name in ("old", "new", "other")] == [True, True, False]


def test_digest_covers_parts_in_their_order_and_what_was_removed() -> None:
    parts = TWO.parts
    assert combined_digest(parts[:1]) == "a"
    digests = {combined_digest(parts), combined_digest(parts[::-1]), combined_digest(parts[:1], {"digest": "c"})}
    assert len(digests) == 3
    longer = TWO.next_version([*parts, made_part("c", 2, samples=1)])
    assert longer.index_digest == combined_digest(longer.parts, TWO.removed)
    versions = [(version.index_digest, version.num_parts) for version in longer.earlier_versions]
    assert versions == [("old", 1), ("new", 2)]
    assert (longer.is_partial, replace_fields(longer, removed={}).is_partial) == (True, False)


@pytest.mark.parametrize(
    ("num_items", "expected"),
    [(1, 2048), (2_048_000, 2048), (2_048_001, 4096), (8_192_000, 8192), (20_000_000, 16_384), (10**9, 16_384)],
)
def test_large_caches_have_larger_chunks(num_items: int, expected: int) -> None:
    assert choose_chunk_size([made_part("a", 0, samples=5, image=3, text=num_items)]) == expected


def test_files_that_are_not_listed_are_found(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    unlisted = ("samples-0.1.parquet", "image/items-2.parquet", "removed-0.parquet")
    kept = ("samples-0.parquet", "image/items-1.parquet", "removed-1.parquet")
    for name in (*unlisted, *kept):
        (tmp_path / name).touch()
    assert sorted(find_unlisted(tmp_path, TWO)) == sorted(tmp_path / name for name in unlisted)
    assert next_revision(TWO.parts[0].tables["image"]) == 1
    assert next_revision(replace_fields(TWO.parts[0].tables["image"], name="image/items-0.4.parquet")) == 5


def test_chunks_of_tokens_are_halved_until_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_TOKEN_CHUNK_BYTES", 16 * 4 * 8 * 2)  # of 16 rows of 4 tokens of width 8
    info = replace_fields(EMPTY, chunk_size=64)
    assert info.chunk_shape((4, 8), "float16") == (16, 4, 8)
    assert info.chunk_shape((4, 8), "float32") == (8, 4, 8)
    assert replace_fields(info, chunk_size=63).chunk_shape((4, 8), "float16") == (63, 4, 8)  # chunks stay equal parts
    assert replace_fields(info, chunk_size=60).chunk_shape((4, 8), "float16") == (15, 4, 8)
    assert info.chunk_shape((999,), "float64") == (64, 999)
