import ctypes
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import fsspec
import pyarrow as pa
import pytest

from embedcache.cli.config_files import read_config
from embedcache.cli.console import read_lines
from embedcache.errors import (
    CorruptError,
    DataError,
    DiskFullError,
    EmbedcacheError,
    ItemError,
    PathError,
    SettingError,
    UnfinishedError,
)
from embedcache.files import (
    building,
    expand_home,
    find_files,
    folder_bytes,
    io_reason,
    is_io_error,
    is_remote,
    make_folder,
    open_path,
    put_file,
    read_file,
    reading,
    remove_file,
    remove_folder,
    remove_partials,
    replacing,
    user_folder,
    write_atomic,
    writing,
)
from embedcache.locks import Leases, locked
from embedcache.sweep.space import read_space

TEXTS: list[tuple[str, Callable[[Path], Any], type[EmbedcacheError]]] = [
    ("a red square\na circle\n", read_lines, DataError),
    ("lr = 0.25\n", read_config, SettingError),
    ("[space]\ndropout = [0.1, 0.2]\n", read_space, SettingError),
]


@pytest.mark.parametrize(("text", "read", "error"), TEXTS, ids=["queries", "config", "space"])
def test_byte_order_mark_is_no_part_of_a_text(
    tmp_path: Path, text: str, read: Callable[[Path], Any], error: type[EmbedcacheError]
) -> None:
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8")
    plain = read(path)
    path.write_text(text, encoding="utf-8-sig")
    assert read(path) == plain
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(error, match=rf"^{re.escape(str(path))} is not UTF-8 \(byte 5 is 0xe9\); save it as UTF-8$"):
        read(path)


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


def test_full_disk_raises(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="no space left.*rerun the same command"), writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_by_message_raises(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError), writing(tmp_path):
        raise RuntimeError("Error in faiss: write error: No space left on device")
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path):
        raise RuntimeError("another")


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


def test_reading_an_item_gives_a_reason_that_begins_with_its_kind() -> None:
    with pytest.raises(ItemError, match="^cannot be read: FILE: Input/output error$"):  # noqa: SIM117
        with reading("FILE", error_class=ItemError):
            raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(ItemError, match="^a folder$"), reading("FILE", error_class=ItemError):
        raise PathError("a folder")
    with pytest.raises(ValueError, match="a bug"), reading("FILE", error_class=ItemError):
        raise ValueError("a bug")


def test_reason_of_arrow_is_that_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Detail") as raised:
        pa.OSFile(str(tmp_path / "nowhere"))
    assert io_reason(raised.value) == "No such file or directory"


def test_make_folder_at_file_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PathError, match="is a file"):
            make_folder(path)


OTHER = """
import sys, time
from pathlib import Path
from embedcache.locks import Leases
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


def test_lease_can_be_released(tmp_path: Path) -> None:
    leases = Leases(tmp_path)
    leases.acquire(1)
    leases.release(1)
    with other_process(tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "[True, True, True]\n"
        other.kill()


def test_remote_files(tmp_path: Path) -> None:
    folder = open_path("memory://disk/cache")
    write_atomic(folder / "a" / "one.json", b"1")
    with replacing(folder / "a" / "two") as temporary:
        temporary.write_bytes(b"2")
    (tmp_path / "three").write_bytes(b"3")
    put_file(tmp_path / "three", folder / "a" / "three")
    assert {path.name: read_file(path) for path in folder.rglob("*") if path.is_file()} == {
        "one.json": b"1",
        "two": b"2",
        "three": b"3",
    }
    with locked(folder), locked(folder):
        assert Leases(folder).acquire(1)
    remove_folder(folder)
    assert not (folder / "a" / "two").exists()


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a number which its list of users does not have."""
    for name in ("EMBEDCACHE_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    assert expand_home("~/weights.pth") == Path("~/weights.pth")
    with pytest.raises(PathError, match="has no home folder; set EMBEDCACHE_HOME"):
        user_folder()
    monkeypatch.setenv("HOME", "/home/me")
    assert user_folder() == expand_home("~/.cache/embedcache") == Path("/home/me/.cache/embedcache")


def test_open_path_local(tmp_path: Path) -> None:
    for location in (str(tmp_path), tmp_path, "shards/{00..09}.tar", "a:b", "a::b", "a.tar::b.tar"):
        path = open_path(location)
        assert isinstance(path, Path)
        assert not is_remote(path)
        assert path == Path(location)
    assert open_path(f"file://{tmp_path}/a b") == tmp_path / "a b"


def test_open_path_url() -> None:
    folder = open_path("memory://bucket/folder")
    assert is_remote(folder)
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "sub" / "a.txt").write_bytes(b"hello")
    assert (folder / "sub" / "a.txt").read_bytes() == b"hello"
    assert [path.name for path in folder.glob("*/a.txt")] == ["a.txt"]
    assert str(folder / "sub") == "memory://bucket/folder/sub"


@pytest.mark.parametrize("url", ["simplecache::http://localhost:1/x", "zip://a::memory://x", "memory://a::b"])
def test_open_path_chained_url_raises(url: str) -> None:
    with pytest.raises(PathError, match=f"expected one URL, got several chained by a double colon: {url}; name the"):
        open_path(url)


def test_a_url_is_no_pattern() -> None:
    folder, other = (open_path(f"memory://pattern/{name}") for name in ("photos [1]", "photos 1"))
    for path in (folder, other):
        for name in ("image/a/zarr.json", "image/b/zarr.json", "image/a/chunks/0.json", "image/zarr.json"):
            write_atomic(path / name, b"{}")
    found = sorted(str(path.relative_to(folder)) for path in find_files(folder, "*/*/zarr.json"))
    assert found == ["image/a/zarr.json", "image/b/zarr.json"]
    assert [path.name for path in find_files(folder, "image/a/chunks/*.json")] == ["0.json"]
    assert not list(find_files(folder / "text", "*/zarr.json"))
    assert folder_bytes(folder) == 8
    remove_file(folder / "image" / "zarr.json")
    remove_file(folder / "image" / "zarr.json", missing_ok=True)
    remove_folder(folder / "image" / "a")
    assert [str(path.relative_to(folder)) for path in find_files(folder, "*/*/zarr.json")] == ["image/b/zarr.json"]
    assert folder_bytes(folder) == 2
    assert folder_bytes(other) == 8


def test_only_what_services_raise_is_an_io_error() -> None:
    """Not an error that they raise of an argument of the wrong type, nor one of ours that they called."""
    memory, web = fsspec.filesystem("memory"), fsspec.filesystem("http")

    class Wrong:
        def __fspath__(self) -> str:
            raise ValueError("a bug of ours")

    def caught(call: Callable[[], object]) -> bool:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            call()
        return is_io_error(raised.value)

    assert caught(lambda: web.cat_file("http://localhost:99999/"))  # a ValueError
    assert caught(lambda: web.cat_file(f"http://{'a' * 70}.b/"))  # of the standard library
    assert caught(lambda: web.rm("http://localhost:1/x"))  # a NotImplementedError
    assert not caught(lambda: memory.cat_file(None))
    assert not caught(lambda: memory.cat_file(Wrong()))


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


def drop_rights() -> None:
    """Take from this process, if it is root's, the rights to read and write where permissions forbid it."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if os.getuid() == 0 and ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP
            os._exit(77)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_folders_without_permission(tmp_path: Path) -> None:
    """A folder that must not be read is not empty, and one that must not be made is not unreadable."""
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "fixed").mkdir(mode=0o555)
    code = (
        "import sys; from pathlib import Path; from embedcache.files import find_files, make_folder\n"
        "try: make_folder(Path('fixed/new'))\n"
        "except OSError as error: print(error)\n"
        "try: list(find_files(Path('closed'), '*/zarr.json'))\n"
        "except PermissionError as error: print(error.filename)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, preexec_fn=drop_rights, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "fixed/new: no permission to make this folder; give the path of one elsewhere",
        "closed",
    ], done.stderr
