"""Every benchmark can be imported; they run on demand, so nothing else would detect a renamed function."""

import pytest

from benchmarks.__main__ import NAMES, PARTS, load


@pytest.mark.parametrize("name", [*NAMES, *PARTS])
def test_benchmark_can_be_loaded(name: str) -> None:
    assert callable(load(name))
