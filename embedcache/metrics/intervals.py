"""Figures with their intervals.

Rank correlations with their intervals.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.stats import binom, rankdata, t

from embedcache.arrays import Array, Ints
from embedcache.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: Array, clusters: Ints | None = None, *, num_draws: int = 2000, seed: int = 0) -> Estimate:
    """Mean with a 95 % percentile interval from resampling whole clusters.

    Values of one cluster (captions of one image, seeds of one item) are drawn together, since they are not
    independent.

    Args:
        values: (M,) float or bool.
        clusters: (M,) int, which cluster each value belongs to; None is each its own.
        num_draws: how many resamples.
        seed: of the resampling.

    Raises:
        DataError: there is no value.
    """
    return bootstrap_means(values[:, None], clusters, num_draws=num_draws, seed=seed)[0]


def bootstrap_means(
    values_MK: Array, clusters: Ints | None = None, *, num_draws: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Do what `bootstrap_mean` does for each of K columns, on the same resamples."""
    if not len(values_MK):
        raise DataError("no value to take a mean of")
    cluster_M, count_G = _clusters(clusters, len(values_MK))
    sum_GK = np.stack([np.bincount(cluster_M, weights=column.astype(np.float64)) for column in values_MK.T], axis=1)
    means = [weight_G @ sum_GK / (weight_G @ count_G) for weight_G in _resamples(len(count_G), num_draws, seed)]
    return _estimates(values_MK.mean(axis=0, dtype=np.float64), np.array(means))


def bootstrap_median(values: Array, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Do what `bootstrap_mean` does for the median, the lower one of two."""
    if not len(values):
        raise DataError("no value to take a median of")
    order_M = np.argsort(values)
    cluster_M, count_G = _clusters(clusters, len(values))
    cluster_M = cluster_M[order_M]

    def median(weights_M: Array) -> float:
        totals_M = np.cumsum(weights_M)
        return float(values[order_M[np.searchsorted(totals_M, totals_M[-1] / 2)]])

    medians = [median(weight_G[cluster_M]) for weight_G in _resamples(len(count_G), num_draws, seed)]
    return _estimates(np.array([median(np.ones(len(values)))]), np.array(medians)[:, None])[0]


def bootstrap_class_mean(
    values: Array, labels: Ints, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0
) -> Estimate:
    """Mean over classes of each class's mean, with a 95 % percentile interval from resampling whole clusters.

    Args:
        values: (M,) float or bool.
        labels: (M,) int from 0, the class of each; classes without a value are left out.
        clusters: as of `bootstrap_mean`.
        num_draws: how many resamples.
        seed: of the resampling.

    Raises:
        DataError: there is no value.
    """
    if not len(values):
        raise DataError("no value to take a mean of")
    values = values.astype(np.float64)
    cluster_M, count_G = _clusters(clusters, len(values))

    def class_mean(weights_M: Array) -> float:
        sums, counts = np.bincount(labels, weights=weights_M * values), np.bincount(labels, weights=weights_M)
        return float((sums[counts > 0] / counts[counts > 0]).mean())

    means = [class_mean(weight_G[cluster_M]) for weight_G in _resamples(len(count_G), num_draws, seed)]
    return _estimates(np.array([class_mean(np.ones(len(values)))]), np.array(means)[:, None])[0]


def bootstrap_runs(values_RM: Array, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of several runs on the same items, with a 95 % percentile interval from resampling both runs and clusters.

    Args:
        values_RM: (R, M) float or bool, a row a run.
        clusters: (M,) as of `bootstrap_mean`.
        num_draws: how many resamples.
        seed: of the resampling.

    Raises:
        DataError: there is no value.
    """
    if not values_RM.size:
        raise DataError("no value to take a mean of")
    num_runs, num_items = values_RM.shape
    cluster_M, count_G = _clusters(clusters, num_items)
    sum_RG = np.stack([np.bincount(cluster_M, weights=row.astype(np.float64)) for row in values_RM])
    draws = zip(_resamples(len(count_G), num_draws, seed), _resamples(num_runs, num_draws, seed + 1), strict=True)
    means = [weight_R @ sum_RG @ weight_G / (num_runs * (weight_G @ count_G)) for weight_G, weight_R in draws]
    return _estimates(np.array([values_RM.mean(dtype=np.float64)]), np.array(means)[:, None])[0]


def _clusters(clusters: Ints | None, num_values: int) -> tuple[Ints, Ints]:
    """Number the clusters from 0: which each value belongs to, and the sizes."""
    numbers: Ints = np.arange(num_values)
    if clusters is not None:
        _, numbers = np.unique(clusters, return_inverse=True)
    return numbers, np.bincount(numbers)


def _resamples(num_clusters: int, num_draws: int, seed: int) -> Iterator[Ints]:
    """Say for each draw how often each cluster is in it."""
    rng = np.random.default_rng(seed)
    for _ in range(num_draws):
        yield np.bincount(rng.integers(num_clusters, size=num_clusters), minlength=num_clusters)


def _estimates(values_K: Array, means_RK: Array) -> list[Estimate]:
    low_K, high_K = np.quantile(means_RK, [0.025, 0.975], axis=0)
    return [Estimate(*map(float, figures)) for figures in zip(values_K, low_K, high_K, strict=True)]


def chance_estimate(share: float, num_queries: int) -> Estimate:
    """Give what chance is expected to reach, and where 95 % of such draws lie.

    Args:
        share: the probability that one query is right by chance.
        num_queries: independent draws.
    """
    low, high = binom.ppf([0.025, 0.975], num_queries, share) / num_queries
    return Estimate(share, float(low), float(high))


def jackknife(values: Array, sizes: Ints) -> Estimate:
    """Give a figure with a 95 % interval from leaving out each of some blocks of rows in turn.

    Where a figure compares rows with each other, drawing rows with replacement would make each draw compare rows with
    copies of themselves; leaving rows out does not. "Delete-m jackknife for unequal m" (Statistics and Computing
    1999), with Student's t of one degree of freedom less than there are blocks.

    Args:
        values: (1 + G,) the figure of all rows, then without each block.
        sizes: (G,) rows of each block; all rows are in one.

    Raises:
        DataError: fewer than two blocks.
    """
    value, without_G = float(values[0]), values[1:]
    num_blocks = len(without_G)
    if num_blocks < 2:
        raise DataError(f"{num_blocks} blocks are too few to see how a figure varies; at least 2 are needed")
    ratio_G = sizes.sum() / sizes
    pseudo_G = ratio_G * value - (ratio_G - 1) * without_G
    mean = num_blocks * value - ((1 - 1 / ratio_G) * without_G).sum()
    reach = float(t.ppf(0.975, num_blocks - 1) * np.sqrt(np.mean((pseudo_G - mean) ** 2 / (ratio_G - 1))))
    return Estimate(value, value - reach, value + reach)


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
