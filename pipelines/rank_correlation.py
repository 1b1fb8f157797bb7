"""Rank correlations with intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, rankdata

from embedcache.arrays import Array
from embedcache.errors import DataError
from embedcache.metrics.intervals import Estimate


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """How far two measures order the same things alike: 1 for the same order, -1 for the reverse order.

    Args:
        spearman: Spearman's rho.
        kendall: Kendall's tau-b, which accounts for ties.
    """

    spearman: Estimate
    kendall: Estimate


def rank_correlation(x_M: Array, y_M: Array, *, num_draws: int = 1000, seed: int = 0) -> RankCorrelation:
    """Compute Spearman's rho and Kendall's tau-b, with 95% percentile intervals from resampling the M rows.

    Rows are treated as independent. Resamples in which one measure is constant are left out.

    Args:
        x_M: (M,) float.
        y_M: (M,) float.
        num_draws: number of resamples.
        seed: random seed of the resampling.

    Raises:
        DataError: there are fewer than three rows, or one measure is constant.
    """
    if len(x_M) < 3 or min(len(np.unique(x_M)), len(np.unique(y_M))) < 2:
        raise DataError(f"rank correlation: expected at least 3 things that are not all equal, got {len(x_M)}")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(x_M), size=(num_draws, len(x_M)))
    usable = [draw for draw in draws if min(len(np.unique(x_M[draw])), len(np.unique(y_M[draw]))) > 1]

    def estimate(statistic: Callable[[Array, Array], float]) -> Estimate:
        low, high = np.quantile([statistic(x_M[draw], y_M[draw]) for draw in usable], [0.025, 0.975])
        return Estimate(statistic(x_M, y_M), float(low), float(high))

    return RankCorrelation(
        spearman=estimate(lambda x, y: float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])),
        kendall=estimate(lambda x, y: float(kendalltau(x, y, method="asymptotic").statistic)),
    )
