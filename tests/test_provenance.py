from collections.abc import Callable
from pathlib import Path

import pytest

from embedcache.errors import CorruptError, FingerprintError, PathError
from embedcache.files import partial_path
from embedcache.provenance import check_same, prepare_folder, read_json, recognize
from embedcache.runs import Run
from embedcache.search.faiss_index import read_card
from embedcache.store.layout import read_info


@pytest.mark.parametrize(
    ("read", "folder", "word"),
    [(read_info, "run", "a run"), (Run.open, "study", "study/best"), (read_card, "cache", "a cache")],
)
def test_folder_of_another_kind_is_named(
    artifacts: Path, read: Callable[[Path], object], folder: str, word: str
) -> None:
    with pytest.raises(PathError, match=word):
        read(artifacts / folder)


def test_sources_in_place_of_caches_are_named_as_sources(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "names.txt").touch()
    for name, word in {"none": "SOURCE", "photos": "photos CACHE", "names.txt": "prompts:"}.items():
        with pytest.raises(PathError, match=word):
            read_info(tmp_path / name)


def test_recognize_other_path_raises(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        recognize(tmp_path / "none")
    with pytest.raises(PathError, match=r"expected a finished cache \(cache.json\), run"):
        recognize(tmp_path)
    (tmp_path / "file").touch()
    for name in ("file/none", "a\0b"):
        with pytest.raises(PathError, match="does not exist"):
            recognize(tmp_path / name)


def test_check_same_names_both_values() -> None:
    check_same("cache c", {"a": 1}, {"a": 1}, next_step="")
    with pytest.raises(FingerprintError, match=r"x\.y: stored 1, requested 2; b: stored None, requested 3"):
        check_same("cache c", {"x": {"y": 1, "z": 3}}, {"x": {"y": 2, "z": 3}, "b": 3}, next_step="")


def test_read_json_of_other_content_raises(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        read_json(tmp_path / "no")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(CorruptError, match="not valid JSON"):
        read_json(tmp_path / "bad")


def test_partial_file_of_another_process_is_not_foreign(tmp_path: Path) -> None:
    partial_path(tmp_path / "building.json").write_text("{}")  # of this process, which lives
    prepare_folder(tmp_path, kind="an index", marker="building.json", allowed=["building.json"])
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(PathError, match=r"not an index and not empty: it holds other\.txt;"):
        prepare_folder(tmp_path, kind="an index", marker="building.json", allowed=["building.json"])
