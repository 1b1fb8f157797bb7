"""Sources and items that cannot be read: devices, pipes, endless patterns, large captions, and what no source has."""

import json
import os
from pathlib import Path

import pytest

from embedcache.errors import ItemError, PathError
from embedcache.sources import FileItem, open_source
from embedcache.sources.files import CAPTION_ERROR, read_sidecar
from embedcache.sources.open import MergedSource, merged_description
from embedcache.sources.webdataset import expand_braces
from embedcache.vectors.opening import open_npy
from tests.cli.run import TOY, succeed
from tests.edits import no_more_files
from tests.images import write_images
from tests.sources.files import jpeg, write


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "source", {"a.jpg": jpeg("red"), "b.jpg": jpeg("red")})
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("c.png", "/dev/zero"), ("d.png", tmp_path / "pipe"), ("b.txt", tmp_path / "pipe")):
        (tmp_path / "source" / name).symlink_to(target)
    os.mkfifo(tmp_path / "source" / "e.png")
    source = open_source(tmp_path / "source")
    _, b, c, d = source.samples()
    assert b.columns[CAPTION_ERROR] == f"cannot read b.txt: not a regular file: {tmp_path}/source/b.txt"
    for sample in (c, d):
        with pytest.raises(ItemError, match="not a regular file: "):
            source.read(sample.images[0])
    with pytest.raises(PathError, match="expected a regular file, got a pipe"):
        open_npy(tmp_path / "pipe")


def test_brace_patterns_are_products() -> None:
    assert len(list(expand_braces("{00..11}-{a,b}.tar"))) == 24


@pytest.mark.parametrize(
    "value",
    ["1" * 5000, '"\\ud800"', "[" * 100_000, '"a", "language": ["de", "en"]', '"a", "language": 1'],
    ids=["digits", "half", "deep", "languages", "number"],
)
def test_bad_caption_file_is_a_row_with_a_reason(value: str) -> None:
    sidecar = read_sidecar({".json": f'{{"caption": {value}}}'.encode()}, "a")
    assert not sidecar.texts
    assert str(sidecar.columns[CAPTION_ERROR]).startswith("a.json")


def test_path_with_a_null_character_is_a_failed_row(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 2)
    rows = [{"image": f"photos/{name}.png", "caption": name} for name in ("00000", "00001", "a\0")]
    (tmp_path / "table.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shown = succeed("extract", "table.jsonl", "cache", *TOY, cwd=tmp_path)
    assert "failed 1: 1 expected a path without null characters" in shown
    source = open_source(tmp_path / "table.jsonl")
    with pytest.raises(ItemError, match="expected a path without null characters, got .*x00"):
        source.read(list(source.samples())[2].images[0])


def test_too_many_open_files_are_no_fault_of_an_item(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "photos", 1))
    (item,) = next(source.samples()).images
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        source.read(item)
    assert source.read(item)


@pytest.mark.parametrize("path", ["nowhere.png", "2/00000.png", "-1/00000.png", "0/nowhere.png"])
def test_item_of_no_merged_source(tmp_path: Path, path: str) -> None:
    source = open_source(write_images(tmp_path / "photos", 2))
    merged = MergedSource([source, source], merged_description([source.describe()] * 2))
    assert merged.read(FileItem(path="1/00000.png")) == source.read(FileItem(path="00000.png"))
    with pytest.raises(ItemError):
        merged.read(FileItem(path=path))
