"""Figures with their intervals."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, t

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
