import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from embedcache.errors import DataError
from pipelines.rank_correlation import rank_correlation


def test_rank_correlation_limits() -> None:
    x = np.arange(12.0)
    same, opposite = rank_correlation(x, np.exp(x), num_draws=50), rank_correlation(x, -(x**3), num_draws=50)
    for estimate, expected in ((same.spearman, 1), (same.kendall, 1), (opposite.spearman, -1), (opposite.kendall, -1)):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((expected,) * 3)


@pytest.mark.slow
def test_rank_correlation_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    y = x + rng.standard_normal(30)
    found = rank_correlation(x, y, num_draws=300)
    for one, other in ((x, y), (np.round(x), np.round(y))):  # with ties too
        ranked = rank_correlation(one, other, num_draws=10)
        assert ranked.spearman.value == pytest.approx(spearmanr(one, other).statistic)
        assert ranked.kendall.value == pytest.approx(kendalltau(one, other).statistic)
    assert found.spearman.low < found.spearman.value < found.spearman.high
    redrawn = []
    for _ in range(300):
        drawn = rng.standard_normal(30)
        redrawn.append(spearmanr(drawn, drawn + rng.standard_normal(30)).statistic)
    width = np.quantile(redrawn, 0.975) - np.quantile(redrawn, 0.025)
    assert found.spearman.high - found.spearman.low == pytest.approx(width, rel=0.5)


def test_rank_correlation_skips_constant_draws() -> None:
    found = rank_correlation(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), num_draws=200)
    assert found.spearman.low == pytest.approx(1)


def test_rank_correlation_of_constant_raises() -> None:
    with pytest.raises(DataError, match="at least 3 things that are not all equal, got 2"):
        rank_correlation(np.array([1.0, 2]), np.array([1.0, 2]))
    with pytest.raises(DataError, match="not all equal"):
        rank_correlation(np.ones(5), np.arange(5.0))
