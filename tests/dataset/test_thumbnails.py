"""Folders below which images of a cache may be read, and the small images themselves."""

import base64
import io
import pwd
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from embedcache.dataset.thumbnails import Thumbnails, allowed_folders, credit, restricted, source_folders
from embedcache.errors import ItemError, PathError
from embedcache.registry import trust_files
from embedcache.sources.merged import merged_description
from embedcache.sources.restricted_reads import check_read_allowed
from embedcache.store.cache import Cache

Described = Callable[..., Cache]


@pytest.fixture
def described(two_caches: list[Path], monkeypatch: pytest.MonkeyPatch) -> Described:
    """Return a function that opens a cache as if it named another source."""

    def describe(kind: str, path: object, **others: Any) -> Cache:
        cache = Cache(two_caches[0])
        source = {"type": kind, "path": str(path), "settings": {}, **others}
        monkeypatch.setattr(cache, "info", replace(cache.info, source=source))
        return cache

    return describe


def test_folders_of_each_kind_of_source(described: Described, tmp_path: Path) -> None:
    table = tmp_path / "tables" / "t.csv"
    table.parent.mkdir()
    table.touch()
    shards = tmp_path / "shards"
    shards.mkdir()
    for kind, path, folders in [
        ("openmoji", "en", []),
        ("folder", tmp_path, [tmp_path]),
        ("huggingface", tmp_path, [tmp_path]),
        ("table", table, [table.parent]),
        ("imported", table, [table.parent]),
        ("pairs", f"table:{table}", [table.parent]),
        ("webdataset", f"{shards}/{{00..09}}.tar", [shards]),
        ("webdataset", f"{shards}/a.tar::{table.parent}/b.tar", [shards, table.parent]),
    ]:
        assert source_folders(described(kind, path)) == folders, kind
    parts = [{"type": "folder", "path": str(shards)}, {"type": "table", "path": str(table)}]
    merged = merged_description(parts)
    assert source_folders(described(merged.pop("type"), merged.pop("path"), **merged)) == [shards, table.parent]


def test_folders_that_are_gone_or_hold_more_are_refused(
    described: Described, two_caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    people = [
        pwd.struct_passwd(("x", "x", number, 0, "", f"/homes/{number}/x", "")) for number in (0, 1, 999, 1000, 1001)
    ]
    monkeypatch.setattr("pwd.getpwall", lambda: people)
    next_step = "name a folder of images with --image-folder, or use --trust if you trust the cache$"
    for kind, path, words in [
        ("my.module:Source", "x", "the cache names the source class 'my.module:Source', which is custom code; if you"),
        ("folder", "s3://bucket/x", f"the cache says that they are at s3://bucket/x; {next_step}"),
        ("folder", tmp_path / "none", "none is not a folder of this machine; if they have moved, run the same extract"),
        ("huggingface", tmp_path / "none", f"none is not a folder of this machine; {next_step}"),
        ("folder", "/", f"the cache says that they are in /, which holds all files of this machine; {next_step}"),
        ("table", tmp_path / "t.csv", f"which holds a home; {next_step}"),
        ("webdataset", "/homes/0/a.tar", "which holds a home"),
        ("webdataset", "/homes/1000/a.tar", "which holds a home"),
        ("webdataset", "/homes/1001/x/a.tar", "which holds a home"),
        ("folder", two_caches[0].parent, f"which holds the cache; {next_step}"),
        ("folder", two_caches[0], "which holds the cache"),
    ]:
        with pytest.raises(PathError, match=f"^images are not shown: .*{words}"):
            source_folders(described(kind, path))
    for number in (1, 999):  # homes of services
        assert source_folders(described("webdataset", f"/homes/{number}/x/a.tar")) == [Path(f"/homes/{number}/x")]
    assert source_folders(described("folder", two_caches[0] / "image")) == [two_caches[0] / "image"]


def test_users_name_folders_or_trust_the_cache(described: Described, tmp_path: Path) -> None:
    cache = described("folder", tmp_path)
    assert allowed_folders(cache) == [tmp_path]
    assert allowed_folders(cache, [tmp_path / "x"]) == [tmp_path / "x"]
    with trust_files():
        assert allowed_folders(cache, [tmp_path / "x"]) is None
    with restricted(None):
        check_read_allowed(tmp_path)
    with restricted([tmp_path / "x"]), pytest.raises(ItemError):
        check_read_allowed(tmp_path)


def test_images_are_read_and_made_small(two_caches: list[Path], image_folder: Path) -> None:
    thumbnails = Thumbnails(Cache(two_caches[0]))
    folder = two_caches[0].parent / "a-source"
    assert thumbnails.folders == [folder]
    assert thumbnails.read(7) == (folder / "00007.png").read_bytes()
    with Image.open(io.BytesIO(thumbnails.webp(7, 20))) as image:
        assert (image.format, image.size) == ("WEBP", (20, 20))
    with Image.open(folder / "00007.png") as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "WEBP", quality=80)
    assert thumbnails.webp(7, 32) == buffer.getvalue()
    url = thumbnails.data_url(7)
    kind, _, text = url.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.size == (32, 32)  # never enlarged
    assert thumbnails.data_url(7) is url  # made once
    assert thumbnails.data_url(8) != url
    with pytest.raises(ItemError, match="outside"):
        Thumbnails(Cache(two_caches[0]), [image_folder]).read(0)


def test_thumbnails_are_88_pixels_at_most(described: Described, tmp_path: Path) -> None:
    for name, size in (("00000", (300, 200)), ("00001", (40, 500))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    thumbnails = Thumbnails(described("folder", tmp_path))
    for row, size in ((0, (88, 59)), (1, (7, 88))):
        with Image.open(io.BytesIO(base64.b64decode(thumbnails.data_url(row).partition(",")[2]))) as image:
            assert image.size == size


def test_credit_of_the_source(described: Described) -> None:
    assert "OpenMoji" in credit(described("openmoji", "en"))
    assert credit(described("folder", "x")) == ""
