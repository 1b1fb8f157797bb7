"""Divergence of two feature distributions that are known by their moments only."""

import numpy as np

from embedcache.arrays import Array
from embedcache.errors import DataError


def symmetric_kl(mean_D: Array, variance_D: Array, other_mean_D: Array, other_variance_D: Array) -> Array:
    """Compute the symmetric Kullback-Leibler divergence of two normal distributions per channel: (D,) float64.

    KL(p, q) + KL(q, p) = (v + d²) / 2w + (w + d²) / 2v - 1, with variances v and w and the difference d of the means.
    The arguments are variances, not their roots. A constant channel in either is infinitely far from a varying one, and
    at distance 0 from an equal constant.

    Raises:
        DataError: a variance is below 0.
    """
    values = [np.asarray(value, np.float64) for value in (mean_D, variance_D, other_mean_D, other_variance_D)]
    mean_D, variance_D, other_mean_D, other_variance_D = values
    if (lowest := np.minimum(variance_D, other_variance_D).min(initial=0)) < 0:
        raise DataError(f"expected variances of at least 0, got {lowest}")
    square_D = (mean_D - other_mean_D) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        forward_D = (variance_D + square_D) / other_variance_D
        backward_D = (other_variance_D + square_D) / variance_D
        divergence_D = (forward_D + backward_D) / 2 - 1
    both_constant_D = (variance_D == 0) & (other_variance_D == 0)
    divergence_D = np.where(both_constant_D, np.where(square_D > 0, np.inf, 0.0), divergence_D)
    return np.maximum(divergence_D, 0.0)


def domain_gap(mean_D: Array, variance_D: Array, other_mean_D: Array, other_variance_D: Array) -> float:
    """Compute the gap between two domains: the median over channels of the symmetric divergence of their moments.

    The moments of the source are those that a trained batch normalization keeps, so no source data are needed. The
    median, because a few nearly constant channels would dominate a mean.
    """
    return float(np.median(symmetric_kl(mean_D, variance_D, other_mean_D, other_variance_D)))
