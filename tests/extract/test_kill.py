"""SIGKILL at any moment, then the same command again: the same bytes as an uninterrupted run."""

import re
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.crash import start
from tests.extract.cases import tree
from tests.images import write_images

ENCODERS = ["--image-encoder", "tests.toy:open_toy,delay_ms=50", "--text-encoder", "tests.toy:open_toy,delay_ms=20"]
ENCODERS += ["--feature", "cls,patches,tokens", "--chunk-size", "8", "--device", "cpu"]
MOMENTS_S = (0.0, 0.05, 0.15, 0.3, 0.5)
NUM_IMAGES = 100

pytestmark = pytest.mark.slow


def command(source: Path, cache: Path) -> list[str]:
    return ["extract", str(source), str(cache), *ENCODERS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("kill") / "source", NUM_IMAGES)


@pytest.fixture(scope="module")
def uninterrupted(source: Path) -> dict[str, str]:
    cache = source.parent / "whole"
    start(command(source, cache)).join()
    return tree(cache)


def kill_when(process: BaseProcess, cache: Path, moment_s: float) -> None:
    """Kill a process some time after the cache's folder exists."""
    deadline = time.monotonic() + 60
    while not cache.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(moment_s)
    process.kill()
    process.join()


@pytest.mark.parametrize("moment_s", MOMENTS_S)
def test_resume_after_kill_is_identical(
    source: Path, uninterrupted: dict[str, str], tmp_path: Path, moment_s: float
) -> None:
    cache = tmp_path / "cache"
    kill_when(start(command(source, cache)), cache, moment_s)
    assert tree(cache) != uninterrupted
    start(command(source, cache)).join()
    assert tree(cache) == uninterrupted


def test_two_processes_share_the_chunks(source: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    outputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    processes = [start(command(source, cache), output=output) for output in outputs]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    encoded = re.findall(r"encoded (\d+) (image|text)s", "".join(output.read_text() for output in outputs))
    for modality in ("image", "text"):
        num_encoded = sum(int(count) for count, kind in encoded if kind == modality)
        assert num_encoded == NUM_IMAGES, "no chunk was encoded twice"
    assert tree(cache) == uninterrupted
