from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import UnknownNameError
from embedcache.sources import Sample, SourceSettings, open_source
from embedcache.sources.open import source_credit
from tests.sources.files import jpeg, reopen, write, write_tar


class CustomSource:
    """A custom source, loaded as `module:attribute` or by an entry point."""

    credit = "Images: mine"

    def __init__(self, location: str, settings: SourceSettings) -> None:
        self.location = location

    def describe(self) -> Mapping[str, Any]:
        return {"type": f"{__name__}:CustomSource", "path": self.location, "settings": {}}

    def samples(self) -> Iterator[Sample]:
        yield Sample(key="only")


@pytest.mark.parametrize(
    ("files", "location", "kind"),
    [
        ({"a.JPG": b""}, "", "folder"),
        ({"a/b/c.png": b"", "t.csv": "caption\nx"}, "", "folder"),
        ({"t.csv": "caption\nx"}, "", "table"),
        ({"t.csv": "caption\nx"}, "t.csv", "table"),
        ({"t.jsonl": '{"text": "x"}'}, "t.jsonl", "table"),
        ({"prompts.txt": "x"}, "prompts.txt", "texts"),
        ({"a.wav": b"", "t.csv": b""}, "", "folder"),
        ({"a.npz": b""}, "", "folder"),
        ({"a.npz": b"", "t.parquet": b"PAR1"}, "", "table"),
        ({"a.mp4": b"", "s.tar": b""}, "", "folder"),
    ],
)
def test_kind_is_detected(tmp_path: Path, files: dict[str, bytes | str], location: str, kind: str) -> None:
    write(tmp_path, files)
    assert open_source(tmp_path / location).describe()["type"] == kind


@pytest.mark.parametrize("location", ["", "0.tar", "{0..0}.tar"])
def test_shards_are_detected(tmp_path: Path, location: str) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg())])
    assert open_source(tmp_path / location).describe()["type"] == "webdataset"


def test_described_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"images/a.jpg": jpeg()})
    monkeypatch.chdir(tmp_path)
    assert open_source("images").describe()["path"] == str(tmp_path / "images")


def test_imported_source_reopens(tmp_path: Path) -> None:
    description = {"type": "imported", "path": str(tmp_path), "settings": {}}
    assert reopen(description).describe() == description


@pytest.mark.parametrize(
    ("kind", "path", "credit"),
    [
        ("openmoji", "en", "OpenMoji"),
        ("folder", "/images", ""),
        ("imported", "/vectors", ""),
        ("never.imported:Source", "x", ""),  # an untrusted cache may name any module
    ],
)
def test_source_credit(kind: str, path: str, credit: str) -> None:
    text = source_credit({"type": kind, "path": path, "settings": {}})
    assert (credit in text) if credit else (text == "")


def test_custom_source_opens_and_reopens() -> None:
    source = open_source("anywhere", kind=f"{__name__}:CustomSource")
    assert [sample.key for sample in reopen(source.describe()).samples()] == ["only"]


def test_reopening_with_unknown_setting_raises(tmp_path: Path) -> None:
    description = {"type": "table", "path": str(tmp_path), "settings": {"color": "red"}}
    with pytest.raises(UnknownNameError, match=r"'color'.*item_columns"):
        reopen(description)
