"""Lists on disk: their file is compared with its checksum before a search reads it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from embedcache.arrays import Floats, normalize
from embedcache.devices import announce
from embedcache.errors import CorruptError, PathError
from embedcache.search.card import open_row_index, read_card, verify_index
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.store.arrays import file_checksum
from embedcache.store.cache import Cache
from tests.edits import edit_record, exchange

ON_DISK: dict[str, Any] = {"feature": "open_toy/cls", "min_recall": 0.0, "on_disk": True}
LISTS = "lists-300.ivfdata"
CHANGED = rf"{LISTS}: expected checksum \w+, got \w+: the bytes changed on disk; remove .* and build it again"


@pytest.fixture(scope="module")
def built(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 4 lists on disk."""
    path = tmp_path_factory.mktemp("lists") / "index"
    build_index(cache_path, path, IndexSettings(**ON_DISK, factory="IVF4,SQfp16"))
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


@pytest.fixture(scope="module")
def queries_QP(cache_path: Path) -> Floats:
    return normalize(Cache(cache_path).feature("image", "open_toy/cls").load()[::50])


def opened(path: Path) -> RowIndex:
    return open_row_index(path, read_card(path), device="cpu")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    exchange(path, data)


def test_card_has_checksums_of_both_files(built: Path) -> None:
    card = read_card(built)
    assert (card.format, card.lists) == (1, LISTS)
    assert card.checksums == {name: file_checksum(built / name) for name in ("index.faiss", LISTS)}


@pytest.mark.parametrize("place", [0, -1])
def test_damage_is_found_when_the_index_is_opened(copy: Path, place: int) -> None:
    flip(copy / LISTS, place)
    with pytest.raises(CorruptError, match=CHANGED):
        opened(copy)


def test_large_files_are_compared_by_verify_alone(
    copy: Path, queries_QP: Floats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened(copy).search(queries_QP, 5, {"nprobe": 4})
    flip(copy / LISTS, 0)
    monkeypatch.setattr("embedcache.search.card._COMPARED_BYTES", 100)
    announce.cache_clear()
    with caplog.at_level(logging.INFO, "embedcache.devices"):
        found = opened(copy).search(queries_QP, 5, {"nprobe": 4})
    assert (found[1] == expected[1]).mean() > 0.9
    assert f"{LISTS} is large and is not compared with its checksum; to do so: embedcache verify {copy}" in caplog.text
    with pytest.raises(CorruptError, match=CHANGED):
        verify_index(copy, read_card(copy))


def test_file_of_another_size_is_refused(copy: Path) -> None:
    whole = (copy / LISTS).read_bytes()
    for data in (whole[:-1], whole + b"0", b""):
        (copy / LISTS).write_bytes(data)
        with pytest.raises(CorruptError, match=CHANGED):
            opened(copy)
        with pytest.raises(CorruptError, match=rf"{LISTS}: expected 31,200 bytes, .* got {len(data):,}"):
            read_index(copy / "index.faiss")
    (copy / LISTS).unlink()
    with pytest.raises(PathError, match=rf"{LISTS} does not exist; remove .* and build it again"):
        opened(copy)


def test_card_of_other_lists_is_refused(copy: Path, cache_path: Path, tmp_path: Path) -> None:
    build_index(cache_path, tmp_path / "memory", IndexSettings(**{**ON_DISK, "on_disk": False}, factory="Flat"))
    shutil.copy(tmp_path / "memory" / "index.faiss", copy)
    checksums = {**read_card(copy).checksums, "index.faiss": file_checksum(copy / "index.faiss")}
    edit_record(copy / "card.json", checksums=checksums)
    with pytest.raises(CorruptError, match=rf"index.faiss: expected lists in {LISTS}, got None; remove "):
        opened(copy)


def test_lists_on_disk_are_not_mapped_twice(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 1)  # a machine whose memory holds no index
    index = opened(copy)
    assert index.lists_file == LISTS
    assert read_card(copy).file_bytes == sum((copy / name).stat().st_size for name in ("index.faiss", LISTS))
