import subprocess
import sys
from pathlib import Path

from embedcache.files import Leases, locked, open_path, put_file, remove_folder, replacing, write_atomic

OTHER = """
import sys, time
from pathlib import Path
from embedcache.files import Leases
claims = Leases(Path(sys.argv[1]))
print([claims.take(number) for number in (0, 1, 2)], flush=True)
sys.stdin.read()
"""


def other_process(folder: Path) -> "subprocess.Popen[str]":
    """Start a process that takes 0, 1 and 2, says what it got and lives until its input ends."""
    command = [sys.executable, "-c", OTHER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_lease_excludes_other_processes(tmp_path: Path) -> None:
    claims = Leases(tmp_path)
    assert claims.take(1)
    with other_process(tmp_path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "[True, False, True]\n"
        assert not claims.take(0)
        assert claims.take(3)
        other.kill()
        other.wait()
    assert claims.take(0), "a killed process has taken nothing"


def test_lease_can_be_released(tmp_path: Path) -> None:
    claims = Leases(tmp_path)
    claims.take(1)
    claims.give_back(1)
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
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        "one.json": b"1",
        "two": b"2",
        "three": b"3",
    }
    with locked(folder), locked(folder):
        assert Leases(folder).take(1)
    remove_folder(folder)
    assert not (folder / "a" / "two").exists()
