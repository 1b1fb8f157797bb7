import errno
import os
import subprocess
import sys
from pathlib import Path
from zipfile import BadZipFile

import pyarrow as pa
import pytest

from embedcache.errors import (
    CorruptError,
    DiskFullError,
    PathError,
    UnfinishedError,
)
from embedcache.files import (
    Leases,
    building,
    is_remote,
    make_folder,
    open_path,
    reading,
    remove_partials,
    write_atomic,
    writing,
)


def test_failed_write_keeps_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_file_is_flushed_before_its_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, replace = list[str | Path](), Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(Path(f"/proc/self/fd/{file}").readlink()))
    monkeypatch.setattr(Path, "replace", lambda *paths: steps.append("renamed") or replace(*paths))
    write_atomic(tmp_path / "new" / "file", b"x")
    write_atomic(tmp_path / "new" / "file", b"y")
    first, second = (steps[:4], steps[4:])
    assert first[0] == tmp_path  # the entry of the new folder
    for file, renamed, folder in (first[1:], second):
        assert isinstance(file, Path)
        assert (file.parent, file.suffix) == (tmp_path / "new", ".partial")
        assert (renamed, folder) == ("renamed", tmp_path / "new")


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


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("faiss: No space left on device")])
def test_full_disk_raises(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFullError, match="no space left.*rerun the same command"), writing(tmp_path):
        raise error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file"), PathError, "no such file: FILE"),
        (PermissionError(errno.EACCES, "Permission denied"), PathError, "cannot read FILE: Permission denied"),
        (
            pa.ArrowInvalid("not Parquet\nat all"),
            CorruptError,
            "FILE cannot be read: not Parquet at all; copy it again",
        ),
        (OSError("a damaged page"), CorruptError, "FILE cannot be read: a damaged page; copy it again"),
        (BadZipFile("not a zip file"), CorruptError, "FILE cannot be read: not a zip file; copy it again"),
        (OSError(errno.EMFILE, "Too many open files"), OSError, r"[Errno 24] Too many open files"),
        (ZeroDivisionError("a bug of ours"), ZeroDivisionError, "a bug of ours"),
        (UnfinishedError("chunks are missing"), UnfinishedError, "chunks are missing"),
    ],
)
def test_reading_gives_the_file_the_reason_and_the_next_step(error: Exception, kind: type, text: str) -> None:
    with pytest.raises(kind) as raised, reading("FILE", "copy it again"):
        raise error
    assert str(raised.value) == text
    assert type(raised.value) is kind


def test_make_folder_at_file_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PathError, match="is a file"):
            make_folder(path)


OTHER = """
import sys, time
from pathlib import Path
from embedcache.files import Leases
leases = Leases(Path(sys.argv[1]))
print([leases.acquire(number) for number in (0, 1, 2)], flush=True)
sys.stdin.read()
"""


def other_process(folder: Path) -> "subprocess.Popen[str]":
    """Start a process that takes 0, 1 and 2, says what it got and lives until its input ends."""
    command = [sys.executable, "-c", OTHER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_lease_excludes_other_processes(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    assert leases.acquire(1)
    with other_process(tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "[True, False, True]\n"
        assert not leases.acquire(0)
        assert leases.acquire(3)
        other.kill()
        other.wait()
    assert leases.acquire(0), "a killed process has taken nothing"


def test_open_path_local(tmp_path: Path) -> None:
    for location in (str(tmp_path), tmp_path, "shards/{00..09}.tar", "a:b", "a::b", "a.tar::b.tar"):
        path = open_path(location)
        assert isinstance(path, Path)
        assert not is_remote(path)
        assert path == Path(location)
    assert open_path(f"file://{tmp_path}/a b") == tmp_path / "a b"


@pytest.mark.parametrize("url", ["simplecache::http://localhost:1/x", "zip://a::memory://x", "memory://a::b"])
def test_open_path_chained_url_raises(url: str) -> None:
    with pytest.raises(PathError, match=f"expected one URL, got several chained by a double colon: {url}; name the"):
        open_path(url)


@pytest.mark.parametrize("is_folder", [True, False])
def test_building_what_another_process_wrote_raises(tmp_path: Path, *, is_folder: bool) -> None:
    folder = tmp_path / "model"
    other = folder / "theirs" if is_folder else folder

    def build() -> None:
        with building(folder) as temporary:
            (temporary / "ours").write_text("ours")
            other.parent.mkdir(exist_ok=True)
            other.write_text("theirs")

    with pytest.raises(PathError, match=r"/model: expected a new folder, but another process wrote it meanwhile; run"):
        build()
    assert other.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
