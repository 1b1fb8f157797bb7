"""Outputs replace files only with `--overwrite`, and never what is not a regular file."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.hooks import leaves
from embedcache.cli.main import root_command
from embedcache.errors import CorruptError, PathError
from embedcache.provenance import check_output, new_output, read_report_json, replacing_files, write_report_json
from tests.cli.run import embedcache, succeed


def test_functions_replace_files_and_commands_do_not(tmp_path: Path) -> None:
    path = tmp_path / "object.json"
    for loss in (1.0, 2.0):
        write_report_json(path, {"loss": loss})
    written = json.loads(path.read_text())
    assert written == {"loss": 2.0, "digest": written["digest"]}
    with replacing_files(False), pytest.raises(PathError, match="add --overwrite"):
        write_report_json(path, {"loss": 3.0})
    assert json.loads(path.read_text()) == written


def test_folders_that_take_no_files_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "new" / "folder" / "page.html")
    with pytest.raises(PathError, match=r"page.html: expected a file in a folder, but .*/file is a file; name another"):
        check_output(tmp_path / "file" / "page.html")
    with pytest.raises(PathError, match=r"^/: expected a file, got a folder; name a file in it"):
        check_output(Path("/"))  # no folder is above it
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(PathError, match=r"page.html: no permission to write into .*; name a file in another folder"):
        check_output(tmp_path / "new" / "page.html")


@pytest.mark.slow
@given(data=st.data())
def test_changed_reports_are_not_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "report.json"
    path.unlink(missing_ok=True)
    write_report_json(path, [{"recall": 0.25, "name": "a"}, {"recall": 0.5}])
    written = path.read_bytes()
    place = data.draw(st.integers(0, len(written) - 1))
    changed = bytearray(written)
    changed[place] ^= data.draw(st.integers(1, 127))
    path.write_bytes(changed)
    try:
        read = read_report_json(path)
    except CorruptError:
        return
    assert read == json.loads(written)


def test_links_devices_and_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(PathError, match=r"expected a (new or regular )?file, got a"), new_output(path):
            pass


def test_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with replacing_files(False), new_output(tmp_path / "a.txt") as temporary:
            temporary.write_text("ours")
            (tmp_path / "a.txt").write_text("mine")

    with pytest.raises(PathError):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


COMMANDS = [
    "curate dedup C --output C/cache.json",
    "curate dedup C --html C/samples-0.parquet",
    "curate dedup C C/samples-0.parquet --copies",
    "curate select C C/image/items-0.parquet --method random --budget 2",
    "curate combine C keys.txt and keys.txt mine.parquet",
    "curate leaks C C mine.parquet",
    "curate export C keys.txt mine.txt",
    "export parquet C mine.parquet",
    "evaluate retrieval C R --output C/zarr.json",
    "inspect C --output mine.txt",
]
WRITE_FOLDERS = {f"export {name} out" for name in ("clip-retrieval", "npy", "onnx", "open-clip")}
WRITE_FOLDERS |= {"export sentence-transformers out", "export transformers out", "curate index out"}
WRITE_FOLDERS |= {"cache cut out", "cache merge out"}


@pytest.fixture(scope="module")
def folder(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache `C` and files of a user, all of which must stay as they are."""
    folder = tmp_path_factory.mktemp("mine")
    shutil.copytree(small_cache, folder / "C")
    (folder / "C" / "zarr.json").write_text("{}")
    (folder / "mine.txt").write_text("mine")
    pq.write_table(pa.table({"key": ["a"]}), folder / "mine.parquet")
    (folder / "link").symlink_to("mine.txt")
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_replace_no_file_unasked(folder: Path, line: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = embedcache(*line.split(), cwd=folder)
    assert (done.code, done.stderr.count("\n")) == (1, 1)
    assert "add --overwrite" in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_every_output_is_checked() -> None:
    unchecked = {
        f"{words.removeprefix('embedcache ')} {parameter.name}"
        for words, command in leaves(root_command())
        for parameter in command.params
        if parameter.name in ("out", "output", "html", "srt", "vtt") and parameter.callback is None
    }
    assert unchecked == WRITE_FOLDERS


def test_overwrite_replaces_a_file(folder: Path, tmp_path: Path) -> None:
    words = ("inspect", folder / "C", "--output", "report.json")
    succeed(*words, cwd=tmp_path)
    first = (tmp_path / "report.json").stat().st_ino
    assert "expected a new file, got one that exists" in embedcache(*words, cwd=tmp_path).stderr
    assert (tmp_path / "report.json").stat().st_ino == first
    succeed(*words, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "report.json").stat().st_ino != first
    (tmp_path / "link").symlink_to("report.json")
    assert "got a link" in embedcache("inspect", folder / "C", "--output", "link", "--overwrite", cwd=tmp_path).stderr


def test_one_file_for_two_outputs_raises(tmp_path: Path) -> None:
    done = embedcache("evaluate", "pairs", "C", "--output", "x", "--html", "x", cwd=tmp_path)
    assert "--output, --html: expected two files, got x twice" in done.stderr
