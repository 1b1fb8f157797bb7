"""Rank correlations against scipy."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from pipelines.icons.correlations import rank_correlation


def test_rank_correlation_is_spearmans_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    y = x + rng.standard_normal(30)
    for one, other in ((x, y), (np.round(x), np.round(y))):
        found = rank_correlation(one, other, num_draws=50)
        assert found.value == pytest.approx(spearmanr(one, other).statistic)
        assert found.low < found.value < found.high


def test_draws_of_equal_values_are_left_out() -> None:
    found = rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), num_draws=200)
    assert found.low == pytest.approx(1)
