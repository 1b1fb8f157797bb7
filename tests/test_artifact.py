import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedcache.errors import CorruptError, DiskFullError, FingerprintError, PathError
from embedcache.files import disk_errors, make_folder, remove_partials, write_atomic
from embedcache.provenance import check_same, digest, read_json, run_record


def test_failed_write_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_remove_partials_of_dead_processes(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from embedcache.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    (left,) = tmp_path.iterdir()
    alive = tmp_path / left.name.replace(left.name.split(".")[3], str(os.getpid()))
    alive.write_bytes(b"half")
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [alive]


def test_full_disk_raises(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="no space left.*run the same command again"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_by_message_raises(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError), disk_errors(tmp_path):
        raise RuntimeError("Error in faiss: write error: No space left on device")
    with pytest.raises(RuntimeError, match="another"), disk_errors(tmp_path):
        raise RuntimeError("another")


def test_digest_of_equal_values() -> None:
    assert digest({"a": 1, "b": [1.5, "é"]}) == digest({"b": [1.5, "é"], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_check_same_names_both_values() -> None:
    check_same("cache c", {"a": 1}, {"a": 1}, next_step="")
    with pytest.raises(FingerprintError, match=r"x\.y: 1 there, 2 asked"):
        check_same("cache c", {"x": {"y": 1, "z": 3}}, {"x": {"y": 2, "z": 3}}, next_step="")
    with pytest.raises(FingerprintError, match=r"cache c .*a: 1 there, 2 asked; b: None there, 3 asked; do this"):
        check_same("cache c", {"a": 1}, {"a": 2, "b": 3}, next_step="do this")


def test_read_json_of_other_content_raises(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="does not exist"):
        read_json(tmp_path / "no")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(CorruptError, match="not valid JSON"):
        read_json(tmp_path / "bad")


def test_make_folder_at_file_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PathError, match="is a file"):
            make_folder(path)


def test_run_record(tmp_path: Path) -> None:
    with run_record(tmp_path / "record.json", "train", {"seed": 1}) as outcome:
        outcome["loss"] = 0.5
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["stage"] == "train"
    assert record["settings"] == {"seed": 1}
    assert record["outcome"] == {"loss": 0.5}
    assert record["peak_memory_bytes"] > 1e6
    assert "numpy" in record["packages"]


def test_run_record_after_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_record(tmp_path / "record.json", "train", {}):
        raise ZeroDivisionError
    assert not (tmp_path / "record.json").exists()
