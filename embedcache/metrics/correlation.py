"""Rank correlations with their intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.stats import rankdata

from embedcache.arrays import Array
from embedcache.errors import DataError
from embedcache.metrics.intervals import Estimate

_Statistic: TypeAlias = Callable[[Array, Array], float]


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """How far two figures order the same things alike: 1 wholly, 0 not at all, -1 the other way round.

    Args:
        spearman: rho.
        kendall: tau-b, which counts ties.
    """

    spearman: Estimate
    kendall: Estimate


def rank_correlation(x_M: Array, y_M: Array, *, num_draws: int = 1000, seed: int = 0) -> RankCorrelation:
    """Spearman's rho and Kendall's tau-b, with 95 % percentile intervals from resampling the M things.

    The things count as independent. Draws in which one side is all equal say nothing and are left out.

    Args:
        x_M: (M,) float.
        y_M: (M,) float.
        num_draws: how many resamples.
        seed: of the resampling.

    Raises:
        DataError: fewer than three things, or one side all equal.
    """
    if len(x_M) < 3 or min(len(np.unique(x_M)), len(np.unique(y_M))) < 2:
        raise DataError(f"no rank correlation of {len(x_M)} things; at least 3 are needed, not all equal")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(x_M), size=(num_draws, len(x_M)))
    usable = [draw for draw in draws if min(len(np.unique(x_M[draw])), len(np.unique(y_M[draw]))) > 1]
    return RankCorrelation(spearman=_estimate(_rho, x_M, y_M, usable), kendall=_estimate(_tau, x_M, y_M, usable))


def _estimate(statistic: _Statistic, x_M: Array, y_M: Array, draws: list[Array]) -> Estimate:
    low, high = np.quantile([statistic(x_M[draw], y_M[draw]) for draw in draws], [0.025, 0.975])
    return Estimate(statistic(x_M, y_M), float(low), float(high))


def _rho(x_M: Array, y_M: Array) -> float:
    """SciPy's own also finds a p value, which takes most of its time."""
    return _cosine(rankdata(x_M) - (len(x_M) + 1) / 2, rankdata(y_M) - (len(y_M) + 1) / 2)


def _tau(x_M: Array, y_M: Array) -> float:
    return _cosine(np.sign(np.subtract.outer(x_M, x_M)), np.sign(np.subtract.outer(y_M, y_M)))


def _cosine(x: Array, y: Array) -> float:
    return float(np.clip(np.vdot(x, y) / np.sqrt(np.vdot(x, x) * np.vdot(y, y)), -1, 1))
