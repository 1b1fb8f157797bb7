"""Records of stages, and the packages in them."""

import json
from pathlib import Path

import numpy as np
import pytest

from embedcache.provenance import read_json, record_stage
from embedcache.registry import Registry


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


@pytest.mark.slow
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
    assert read_json(tmp_path / "record.json")["packages"]["vowel-encoders"] == "1.5"


def test_record_stage_after_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), record_stage(tmp_path / "record.json", "train", {}):
        raise ZeroDivisionError
    assert not (tmp_path / "record.json").exists()
