"""kill -9 at any moment, then the same command again: the same bytes as a run that was never stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.extract.cases import tree
from tests.pictures import write_pictures

ENCODERS = ["--image-encoder", "tests.toy:open_toy,delay_ms=20", "--text-encoder", "tests.toy:open_toy,delay_ms=5"]
ENCODERS += ["--feature", "cls", "--feature", "patches", "--feature", "tokens", "--chunk-size", "16"]
MOMENTS_S = (0.0, 0.05, 0.2, 0.45, 0.8)


def command(source: Path, cache: Path) -> list[str]:
    return [sys.executable, "-m", "embedcache", "extract", str(source), str(cache), *ENCODERS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("kill") / "source", 200)


@pytest.fixture(scope="module")
def uninterrupted(source: Path) -> dict[str, str]:
    cache = source.parent / "whole"
    subprocess.run(command(source, cache), check=True, capture_output=True)
    return tree(cache)


def kill_when(process: subprocess.Popen[bytes], cache: Path, moment_s: float) -> None:
    """Wait for the first sign of the cache, then a moment more, then kill."""
    deadline = time.monotonic() + 60
    while not cache.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(moment_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("moment_s", MOMENTS_S)
def test_killed_and_run_again_gives_the_same_bytes(
    source: Path, uninterrupted: dict[str, str], tmp_path: Path, moment_s: float
) -> None:
    cache = tmp_path / "cache"
    process = subprocess.Popen(command(source, cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when(process, cache, moment_s)
    assert process.returncode == -signal.SIGKILL
    assert tree(cache) != uninterrupted
    subprocess.run(command(source, cache), check=True, capture_output=True)
    assert tree(cache) == uninterrupted


@pytest.mark.slow
def test_killed_five_times_in_a_row_it_still_gets_there(
    source: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for moment_s in MOMENTS_S:
        process = subprocess.Popen(command(source, cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.8)  # past the imports
        kill_when(process, cache, moment_s)
    subprocess.run(command(source, cache), check=True, capture_output=True)
    assert tree(cache) == uninterrupted


@pytest.mark.slow
def test_two_processes_on_one_cache_share_the_chunks_and_leave_the_same_bytes(
    source: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    both = [
        subprocess.Popen(command(source, cache), stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        for _ in "ab"
    ]
    said = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    encoded = re.findall(r"encoded (\d+) (image|text)s", said)
    for modality in ("image", "text"):
        assert sum(int(count) for count, kind in encoded if kind == modality) == 200, "no chunk was encoded twice"
    assert tree(cache) == uninterrupted
