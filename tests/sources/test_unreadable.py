"""Items that cannot be read: every source raises an ItemError, whose text is the reason of the row."""

import json
from pathlib import Path

import pytest

from embedcache.errors import ItemError
from embedcache.sources import FileItem, open_source
from embedcache.sources.open import MergedSource, merged_description
from tests.cli.run import TOY, succeed
from tests.edits import no_more_files
from tests.images import write_images


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
