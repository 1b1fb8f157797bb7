import json
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import CorruptError, FingerprintError, PathError
from embedcache.files import partial_path
from embedcache.provenance import (
    RECORDED_PACKAGES,
    check_same,
    digest,
    prepare_folder,
    read_json,
    read_stage,
    recognize,
    record_stage,
    write_record,
)
from embedcache.registry import Registry
from tests.golden.test_artifacts import ARTIFACTS


@pytest.mark.parametrize(
    ("name", "kind"),
    [("cache", "cache"), ("run", "run"), ("index", "index"), ("study", "study"), ("selection.parquet", "selection")],
)
def test_recognize(name: str, kind: str) -> None:
    assert recognize(ARTIFACTS / name) == kind


def test_recognize_other_path_raises(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        recognize(tmp_path / "none")
    with pytest.raises(PathError, match=r"expected a finished cache \(cache.json\), run"):
        recognize(tmp_path)
    (tmp_path / "file").touch()
    for name in ("file/none", "a\0b"):
        with pytest.raises(PathError, match="does not exist"):
            recognize(tmp_path / name)


def test_digest_of_equal_values() -> None:
    assert digest({"a": 1, "b": [1.5, "é"]}) == digest({"b": [1.5, "é"], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_check_same_names_both_values() -> None:
    check_same("cache c", {"a": 1}, {"a": 1}, next_step="")
    with pytest.raises(FingerprintError, match=r"x\.y: stored 1, requested 2"):
        check_same("cache c", {"x": {"y": 1, "z": 3}}, {"x": {"y": 2, "z": 3}}, next_step="")
    with pytest.raises(
        FingerprintError, match=r"cache c .*a: stored 1, requested 2; b: stored None, requested 3; do this"
    ):
        check_same("cache c", {"a": 1}, {"a": 2, "b": 3}, next_step="do this")


def test_read_json_of_other_content_raises(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        read_json(tmp_path / "no")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(CorruptError, match="not valid JSON"):
        read_json(tmp_path / "bad")


def test_record_stage(tmp_path: Path) -> None:
    with record_stage(tmp_path / "record.json", "train", {"seed": 1}) as outcome:
        outcome["loss"] = 0.5
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["stage"] == "train"
    assert record["settings"] == {"seed": 1}
    assert record["outcome"] == {"loss": 0.5}
    assert record["peak_memory_bytes"] > 1e6
    assert record["packages"]["numpy"] == np.__version__
    assert {"embedcache", "timm", "transformers", "tokenizers", "scipy", "pillow"} <= set(record["packages"])


def test_another_file_in_place_of_a_record_is_found(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", {"format": 2, "kind": "pair"})  # such as a config, whose digest is right
    with pytest.raises(CorruptError, match=r"record.json: expected the record of a stage, got another JSON file"):
        read_stage(tmp_path / "record.json")


def test_metadata_of_packages_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("embedcache.provenance.version", lambda name: asked.append(name) or "1.0")
    (tmp_path / "own-1.0.dist-info").mkdir()  # no earlier test has read these metadata
    monkeypatch.syspath_prepend(tmp_path)
    for number in range(3):
        (tmp_path / f"folder{number}").mkdir()
        monkeypatch.syspath_prepend(tmp_path / f"folder{number}")  # as the folder of a command
        with record_stage(tmp_path / f"{number}.json", "train", {}) as outcome:
            outcome["loss"] = 0.5
    assert len(asked) == len(set(asked)) >= len(RECORDED_PACKAGES)
    assert read_stage(tmp_path / "2.json")["packages"]["torch"] == "1.0"


def test_record_names_the_package_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vowels.py").write_text("a = len\n")
    info = tmp_path / "vowel_encoders-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vowel-encoders\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[embedcache.vowels]\na = vowels:a\n")
    (info / "top_level.txt").write_text("vowels\n")
    monkeypatch.syspath_prepend(tmp_path)
    Registry("vowel", {}, group="embedcache.vowels").load("a")
    with record_stage(tmp_path / "record.json", "train", {}) as outcome:
        outcome["loss"] = 0.5
    assert read_stage(tmp_path / "record.json")["packages"]["vowel-encoders"] == "1.5"


def test_record_stage_after_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record_stage(tmp_path / "record.json", "train", {}):
        raise ZeroDivisionError
    assert not (tmp_path / "record.json").exists()


def test_partial_file_of_another_process_is_not_foreign(tmp_path: Path) -> None:
    partial_path(tmp_path / "building.json").write_text("{}")  # of this process, which lives
    prepare_folder(tmp_path, kind="an index", marker="started.json", allowed=["started.json"])
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(PathError, match=r"not an index and not empty: it holds other\.txt;"):
        prepare_folder(tmp_path, kind="an index", marker="started.json", allowed=["started.json"])
