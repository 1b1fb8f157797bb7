"""Figures with their intervals."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

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
    if not len(values):
        raise DataError("no value to take a mean of")
    _, cluster_M = np.unique(np.arange(len(values)) if clusters is None else clusters, return_inverse=True)
    sum_G = np.bincount(cluster_M, weights=values.astype(np.float64))
    count_G = np.bincount(cluster_M)
    rng = np.random.default_rng(seed)
    means = np.empty(num_draws)
    for draw in range(num_draws):
        chosen = rng.integers(len(sum_G), size=len(sum_G))
        means[draw] = sum_G[chosen].sum() / count_G[chosen].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high))


def bootstrap_runs(values_RM: Array, clusters: Ints, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean of several runs on the same items, with a 95 % percentile interval from resampling both runs and clusters.

    Args:
        values_RM: (R, M) float or bool, a row a run.
        clusters: (M,) int, which cluster each item belongs to; those of one are drawn together.
        num_draws: how many resamples.
        seed: of the resampling.

    Raises:
        DataError: there is no value.
    """
    if not values_RM.size:
        raise DataError("no value to take a mean of")
    _, cluster_M = np.unique(clusters, return_inverse=True)
    sum_RG = np.stack([np.bincount(cluster_M, weights=row.astype(np.float64)) for row in values_RM])
    count_G = np.bincount(cluster_M)
    rng = np.random.default_rng(seed)
    means = np.empty(num_draws)
    for draw in range(num_draws):
        times_G = np.bincount(rng.integers(len(count_G), size=len(count_G)), minlength=len(count_G))
        mean_R = sum_RG @ times_G / (count_G @ times_G)
        means[draw] = mean_R[rng.integers(len(mean_R), size=len(mean_R))].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values_RM.mean()), float(low), float(high))


def chance_estimate(share: float, num_queries: int) -> Estimate:
    """Give what chance is expected to reach, and where 95 % of such draws lie.

    Args:
        share: the probability that one query is right by chance.
        num_queries: independent draws.
    """
    low, high = binom.ppf([0.025, 0.975], num_queries, share) / num_queries
    return Estimate(share, float(low), float(high))
