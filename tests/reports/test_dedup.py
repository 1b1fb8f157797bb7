"""Histograms of the largest cosines, as dedup prints them."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from embedcache.reports.dedup import histogram


@given(st.lists(st.integers(-400, 200), max_size=40))
@example([190])  # 0.95, which float32 rounds down
@example([168])  # 0.84, of which 32 bins of the smallest width reach to 1
@example([167])
@example([])
@example([200])
@example([137])
@example([135, 40])
@example([-400, -200])
def test_histogram_counts_each_cosine_in_its_bin(steps: list[int]) -> None:
    """Check bins against whole numbers: a lower bound belongs to its bin, and all below -1 to the first."""
    counted = histogram(np.array(steps, np.float32) / np.float32(200))
    below_one = [200 - max(step, -200) for step in steps]  # in steps of 0.005
    steps_per_bin = next(number for number in (1, 2, 4, 10, 20) if max(below_one, default=0) <= 32 * number)
    assert counted.width == steps_per_bin * 0.005
    bins = [max(0, (number - 1) // steps_per_bin) for number in below_one]
    expected = [bins.count(number) for number in reversed(range(max(bins, default=0) + 1))]
    assert counted.counts.tolist() == expected
    lows = [1 - counted.width * number for number in range(len(expected), 0, -1)]
    np.testing.assert_allclose(counted.lows, lows, atol=1e-6)
