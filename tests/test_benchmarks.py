"""Every benchmark still finds what it measures: they run on demand, so nothing else would tell."""

from importlib import import_module

import pytest

from benchmarks.__main__ import NAMES, PARTS


@pytest.mark.parametrize("name", [*NAMES, *PARTS])
def test_a_benchmark_can_be_started(name: str) -> None:
    assert callable(import_module(f"benchmarks.{name}").main)
