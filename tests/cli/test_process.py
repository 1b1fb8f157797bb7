"""The command as a process: start-up time, exit codes, signals, terminals and full disks."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.cli.run import TOY, embedcache
from tests.images import write_images

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "embedcache"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "150"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images with captions."""
    return write_images(tmp_path_factory.mktemp("process") / "photos", 64)


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    """One process shows all three, which take half a second each at most."""
    helps = [["--help"], ["train", "-h"], ["curate", "select", "-h"]]
    program = (
        "import sys, time\n"
        "from embedcache.cli.main import main\n"
        f"for words in {helps}:\n"
        "    sys.argv = ['embedcache', *words]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'transformers', 'numpy', 'faiss', 'zarr', 'pyarrow', 'scipy', 'matplotlib', 'PIL'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)), time.process_time())\n"
    )
    started = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert started.stdout.count("Usage: ") == len(helps)
    heavy, seconds = started.stdout.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "HEAVY []"
    assert float(seconds) < 1.5


def test_bug_of_embedcache_is_one(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.extract.extract.run_job", None)
    done = embedcache("extract", photos, "c", *TOY, cwd=tmp_path)
    assert (done.code, "This is a bug" in done.stderr) == (70, True)


def test_closed_streams_are_opened(tmp_path: Path) -> None:
    command = f"{sys.executable} -m embedcache inspect . >&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr.startswith("error: .")) == (1, True)


@pytest.mark.slow
def test_interrupt_of_an_extraction_is_one_line(photos: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "extract", str(photos), "c", "--chunk-size", "8"]
    command += ["--image-encoder", "tests.toy:open_toy,delay_ms=500"]
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores SIGINT
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT, preexec_fn=restore
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("c/image/*/chunks/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read().endswith("Interrupted. Run the same command again.\n")
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk_is_one_line_and_loses_nothing(photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    words = ["extract", photos, disk / "cache", *TOY, "--chunk-size", "8", "--feature", "tokens,patches"]
    try:
        done = embedcache(*words, cwd=tmp_path)
        assert done.code == 1
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "no space left on the disk" in line
        assert not list(disk.rglob("*.partial"))
        committed = len(list(disk.rglob("chunks/*.json")))
        assert committed > 0
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        done = embedcache(*words, cwd=tmp_path)
        assert done.code == 0, done.stderr
        reused = sum(map(int, re.findall(r"reused (\d+)", done.stdout)))
        assert 8 * (committed - 1) < reused <= 8 * committed  # the last chunk may be a short one
    finally:
        gc.collect()  # what still maps a file of the disk keeps it busy
        subprocess.run(["umount", disk], check=True)
