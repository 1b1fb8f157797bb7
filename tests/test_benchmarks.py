"""Every benchmark can be imported; they run on demand, so nothing else would detect a renamed function."""

from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, PARTS, load
from benchmarks.measure import run_command


@pytest.mark.parametrize("name", sorted({*NAMES, *PARTS}))
def test_benchmark_can_be_loaded(name: str) -> None:
    assert callable(load(name))


def test_command_is_measured(tmp_path: Path) -> None:
    words = ["-n", "5", "-r", "1", "-s", "data = bytearray(200_000_000)", "data.count(1)"]  # for several of its looks
    usage = run_command(["timeit", *words], folder=tmp_path)
    assert 0.2 < usage.peak_gb < 0.4
    assert 0.15 < usage.memory_gb <= usage.peak_gb
    assert 0 < usage.cpu_s < usage.seconds + 1
