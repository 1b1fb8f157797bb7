"""Where the source of a cache may be read: below what the user named, and its own folders if they indexed it."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import ItemError, PathError
from embedcache.registry import trust_files
from embedcache.sources import read_below
from embedcache.sources.files import check_read_allowed, is_below, restrict_reads
from embedcache.sources.open import allowed_places, is_remembered, merged_description, own_places, remember


def describe(kind: str, path: object, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "path": str(path), "settings": settings}


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without records of what was extracted."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_own_places_of_each_kind_of_source(tmp_path: Path) -> None:
    table, shards = tmp_path / "tables" / "t.csv", tmp_path / "shards"
    table.parent.mkdir()
    table.touch()
    shards.mkdir()
    for kind, path, folders in [
        ("openmoji", "en", []),
        ("huggingface", "owner/name", []),
        ("folder", tmp_path, [tmp_path]),
        ("folder", "s3://bucket/x/", ["s3://bucket/x"]),
        ("huggingface", tmp_path, [tmp_path]),
        ("table", table, [table.parent]),
        ("table", "https://host/x/t.parquet", ["https://host/x"]),
        ("imported", table, [table.parent]),
        ("webdataset", f"{shards}/{{00..09}}.tar", [shards]),
        ("webdataset", f"{shards}/a.tar::{table.parent}/b.tar", [shards, table.parent]),
        ("webdataset", "https://host/{a,b}/0.tar", ["https://host"]),
    ]:
        assert own_places(describe(kind, path)) == list(map(str, folders)), (kind, path)
    merged = merged_description([describe("folder", shards), describe("table", table, root=str(tmp_path))])
    assert own_places(merged_description([merged])) == [str(shards), str(table.parent), str(tmp_path)]


@pytest.mark.usefixtures("foreign")
def test_what_was_indexed_here_is_read(tmp_path: Path) -> None:
    source = describe("folder", tmp_path)
    for user in range(2):
        if user:
            remember({**source, "versions": "others"}, "rows")
        assert is_remembered({**source, "subset": 1}, "rows") is bool(user)
    assert allowed_places(source, "rows") == [str(tmp_path)]
    for other, digest in (
        (source, "other rows"),
        (describe("folder", "/etc"), "rows"),
        (describe("table", ""), "rows"),
    ):
        assert not is_remembered(other, digest)
    with trust_files():
        assert allowed_places(describe("my.module:Source", "x"), "") is None


@pytest.mark.usefixtures("foreign")
def test_sources_of_strangers_are_read_below_named_places(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/usr")
    for kind, path in [
        ("folder", "/usr"),
        ("folder", tmp_path / "link"),
        ("folder", tmp_path / "../x"),
        ("folder", "s3://bucket/x"),
        ("folder", "https://host.org/x"),
        ("folder", "https://host@other/x"),
        ("folder", "https://host/../x"),
        ("table", "file:///usr/t.csv"),
        ("webdataset", f"{tmp_path}/a.tar::https://other/b.tar"),
        ("webdataset", "https://host{a,b}/x.tar"),
        ("pairs", "folder:/usr"),
        ("huggingface", "owner/name"),
        ("huggingface", tmp_path / "none"),
        ("prompts", f"{tmp_path}/a.txt+https://other/b.txt"),
        ("texts", tmp_path / "a.txt"),
        ("my.module:Source", tmp_path),
        ("", ""),
    ]:
        with read_below(tmp_path, "https://host/"), pytest.raises(PathError, match="the cache says that its source is"):
            allowed_places(describe(kind, path), "")
    for kind, path in [("folder", tmp_path / "x"), ("table", "https://host/x/t.parquet"), ("openmoji", "en")]:
        with read_below(tmp_path, "https://host/"):
            assert allowed_places(describe(kind, path), "") == [str(tmp_path), "https://host"]
    with read_below(tmp_path), pytest.raises(PathError, match="its source is /usr"):
        allowed_places(merged_description([describe("folder", tmp_path), describe("folder", "/usr")]), "")


def test_restricted_reads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"four")
    with restrict_reads([str(tmp_path), "https://host/x"], 3):
        check_read_allowed("https://host/x/a.png")
        check_read_allowed(tmp_path / "a", 3)
        for path in (
            tmp_path / "a",
            tmp_path,
            Path("/dev/zero"),
            "https://host/xy",
            "ftp://host/x",
            f"file://{tmp_path}/a",
        ):
            with pytest.raises(ItemError, match="too large|not a regular file|outside the source and"):
                check_read_allowed(path)
    assert is_below("https://host/x", ["https://host/x"])
    assert not is_below("https://host/x/../y", ["https://host/x"])


def test_a_state_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember(describe("folder", tmp_path), "1")
    assert not is_remembered(describe("folder", tmp_path), "1")
