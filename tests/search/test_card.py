"""Opening an index that its card does not describe: damaged, being extended, or exchanged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import CorruptError, PathError, UnfinishedError
from embedcache.search.card import open_row_index, read_card, verify_index
from embedcache.search.faiss_index import make_index
from embedcache.store.arrays import file_checksum
from tests.edits import edit_record


@pytest.fixture
def copy(labeled_index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(labeled_index, tmp_path / "index"))


def write_longer(path: Path) -> dict[str, str]:
    """Replace the index of 60 vectors by one of 61; return its checksum."""
    index = make_index("Flat", 48)
    index.add(np.arange(61), np.eye(61, 48, dtype=np.float32))
    index.write(path / "index.faiss")
    return {"index.faiss": file_checksum(path / "index.faiss")}


def test_index_that_is_being_extended_opens_once_it_is_written(copy: Path) -> None:
    card, checksums = read_card(copy), write_longer(copy)
    state = {"source": {}, "factory": "Flat", "rejected": {}, "checksums": {}}
    (copy / "building.json").write_text(json.dumps(state))
    with pytest.raises(UnfinishedError, match="extended"):
        open_row_index(copy, card)
    (copy / "building.json").write_text(json.dumps({**state, "checksums": {"checksums": checksums}}))
    assert len(open_row_index(copy, card)) == 61
    (copy / "building.json").unlink()
    for read in (open_row_index, verify_index):
        with pytest.raises(CorruptError, match=r"index\.faiss: expected checksum \w+, got \w+"):
            read(copy, card)


def test_card_of_another_index_is_refused(copy: Path) -> None:
    edit_record(copy / "card.json", checksums=write_longer(copy))
    for changed, word in (({}, "60 vectors"), ({"num_vectors": 61, "width": 47}, "width 47")):
        edit_record(copy / "card.json", **changed)
        with pytest.raises(CorruptError, match=word):
            open_row_index(copy, read_card(copy))


def test_missing_files_are_named(copy: Path) -> None:
    card = read_card(copy)
    (copy / "index.faiss").unlink()
    with pytest.raises(PathError, match=rf"{copy}/index.faiss does not exist"):
        open_row_index(copy, card)
    (copy / "card.json").unlink()
    with pytest.raises(PathError, match=f"make one with: embedcache curate index CACHE {copy}"):
        read_card(copy)
