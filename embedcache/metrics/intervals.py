"""Estimates with 95% intervals: bootstrap by clusters, jackknife by blocks, chance levels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array, Ints, blocks
from embedcache.errors import DataError

_DRAWS_PER_BLOCK = 1 << 18


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the value and its interval with three decimals, such as `0.066 [0.046, 0.101]`."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class MetricValues(NamedTuple):
    """The values of a metric, one per query, example or word.

    Args:
        values_M: (M,) values, whose mean is the metric.
        clusters_M: (M,) row of the item of each value; values of one item are drawn together.
    """

    values_M: Array
    clusters_M: Ints

    def estimate(self, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
        """Return the mean with a 95% interval over items."""
        return bootstrap_mean(self.values_M, self.clusters_M, num_draws=num_draws, seed=seed)


def bootstrap_mean(values: Array, clusters: Ints | None = None, *, num_draws: int = 2000, seed: int = 0) -> Estimate:
    """Compute a mean with a 95% percentile interval from resampling whole clusters.

    Values of one cluster, such as captions of one image or seeds of one item, are not independent: they are drawn
    together.

    Args:
        values: (M,) float or bool.
        clusters: (M,) int, cluster of each value; None: every value is its own cluster.
        num_draws: number of resamples.
        seed: random seed of the resampling.

    Raises:
        DataError: there are no values.
    """
    return bootstrap_means(values[:, None], clusters, num_draws=num_draws, seed=seed)[0]


def bootstrap_means(
    values_MK: Array, clusters: Ints | None = None, *, num_draws: int = 2000, seed: int = 0
) -> list[Estimate]:
    """Compute `bootstrap_mean` of each of K columns, on the same resamples."""
    cluster_M, size_G = _clusters(clusters, len(values_MK))
    sum_GK = np.stack([np.bincount(cluster_M, weights=column.astype(np.float64)) for column in values_MK.T], axis=1)
    resamples = _resamples(len(size_G), num_draws, seed)
    means = [weight_BG @ sum_GK / (weight_BG @ size_G)[:, None] for weight_BG in resamples]
    means_RK = np.concatenate([values_MK.mean(axis=0, dtype=np.float64)[None], *means])
    return [interval_of(means_R) for means_R in means_RK.T]


def bootstrap_median(values: Array, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Compute a median, the lower of the two middle values, with an interval as in `bootstrap_mean`."""
    order_M = np.argsort(values)

    def median(weights_M: Array) -> float:
        totals_M = np.cumsum(weights_M[order_M])
        return float(values[order_M[np.searchsorted(totals_M, totals_M[-1] / 2)]])

    return bootstrap(median, len(values), clusters, num_draws=num_draws, seed=seed)


def bootstrap_class_mean(
    values: Array, labels: Ints, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0
) -> Estimate:
    """Compute the mean of class means, with an interval as in `bootstrap_mean`.

    `labels` are (M,) int from 0, the class of each value; classes without a value are left out.
    """
    values_M = values.astype(np.float64)

    def class_mean(weights_M: Array) -> float:
        sums, counts = np.bincount(labels, weights=weights_M * values_M), np.bincount(labels, weights=weights_M)
        return float((sums[counts > 0] / counts[counts > 0]).mean())

    return bootstrap(class_mean, len(values), clusters, num_draws=num_draws, seed=seed)


def bootstrap_runs(values_RM: Array, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Compute the mean of several runs on the same items, (R, M), from resampling both runs and clusters."""
    clusters = np.arange(values_RM.shape[1]) if clusters is None else clusters
    means = resample_runs(list(values_RM[:, :, None]), [clusters] * len(values_RM), num_draws=num_draws, seed=seed)
    return interval_of(means[:, 0])


def resample_runs(
    values: Sequence[Array], clusters: Sequence[Ints], *, num_draws: int = 1000, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Compute means over several runs of all values, then of resamples of both runs and clusters.

    Columns are compared on the same resamples, so that any statistic of the means has an interval: `interval_of`.

    Args:
        values: (M, K) float or bool of each run, whose items may be its own.
        clusters: (M,) int of each run, cluster of each value; one cluster is drawn together in all runs.
        num_draws: number of resamples.
        seed: random seed of the resampling.

    Returns:
        (1 + num_draws, K) means of K columns. A resample without any value is 0.

    Raises:
        DataError: there are no values.
    """
    cluster_M, count_G = _clusters(np.concatenate([np.empty(0, np.int64), *clusters]), sum(map(len, values)))
    num_runs, num_clusters = len(values), len(count_G)
    count_RG, sums = np.zeros((num_runs, num_clusters)), []
    parts = np.split(cluster_M, np.cumsum([len(of_run) for of_run in clusters])[:-1])
    for run, (values_MK, part_M) in enumerate(zip(values, parts, strict=True)):
        count_RG[run] = np.bincount(part_M, minlength=num_clusters)
        columns = [np.bincount(part_M, column, minlength=num_clusters) for column in values_MK.T.astype(np.float64)]
        sums.append(np.stack(columns, axis=1))
    weight_DR = np.concatenate(list(_resamples(num_runs, num_draws, seed + 1)))
    means, done = [np.concatenate(values).mean(axis=0, dtype=np.float64)[None]], 0
    for weight_BG in _resamples(num_clusters, num_draws, seed):
        weight_BR = weight_DR[done : done + len(weight_BG)]
        sum_BK = sum(weight_BR[:, [run]] * (weight_BG @ sum_GK) for run, sum_GK in enumerate(sums))
        means.append(sum_BK / np.maximum((weight_BR * (weight_BG @ count_RG.T)).sum(axis=1), 1)[:, None])
        done += len(weight_BG)
    return np.concatenate(means)


def interval_of(values_R: Array) -> Estimate:
    """Return a statistic of all values, which is first, with the 95% percentile interval of that of the resamples.

    Infinite ones are allowed: an end of the interval is one of the values.
    """
    low, high = np.quantile(
        values_R[1:], [0.025, 0.975], method="inverted_cdf" if np.isinf(values_R).any() else "linear"
    )
    return Estimate(float(values_R[0]), float(low), float(high))


def bootstrap(
    statistic: Callable[[Array], float],
    num_values: int,
    clusters: Ints | None = None,
    *,
    num_draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Compute any statistic with an interval as in `bootstrap_mean`.

    Args:
        statistic: function of how often each value is drawn, (M,).
        num_values: M, the number of values.
        clusters: (M,) int, cluster of each value; None: every value is its own cluster.
        num_draws: number of resamples.
        seed: random seed of the resampling.
    """
    cluster_M, size_G = _clusters(clusters, num_values)
    resamples = _resamples(len(size_G), num_draws, seed)
    draws = [statistic(weight_G[cluster_M]) for weight_BG in resamples for weight_G in weight_BG]
    return interval_of(np.array([statistic(np.ones(num_values)), *draws]))


def _clusters(clusters: Ints | None, num_values: int) -> tuple[Ints, Ints]:
    """Return the number of each value's cluster, from 0, and the cluster sizes."""
    if not num_values:
        raise DataError("bootstrap: expected at least one value, got none")
    cluster_M: Ints = np.arange(num_values)
    if clusters is not None:
        _, cluster_M = np.unique(clusters, return_inverse=True)
    return cluster_M, np.bincount(cluster_M)


def _resamples(num_clusters: int, num_draws: int, seed: int) -> Iterator[Ints]:
    """Iterate over blocks of resamples: how often each cluster is drawn, (B, G)."""
    rng = np.random.default_rng(seed)
    for block in blocks(num_draws, max(1, _DRAWS_PER_BLOCK // num_clusters)):
        count = block.stop - block.start
        drawn_BG = rng.integers(num_clusters, size=(count, num_clusters))
        places_BG = drawn_BG + num_clusters * np.arange(count)[:, None]
        yield np.bincount(places_BG.ravel(), minlength=places_BG.size).reshape(places_BG.shape)


def chance_estimate(probability: float, num_queries: int) -> Estimate:
    """Return the chance level of a fraction of correct independent queries, with its 95% binomial interval."""
    from scipy.stats import binom

    low, high = binom.ppf([0.025, 0.975], num_queries, probability) / num_queries
    return Estimate(probability, float(low), float(high))


def hit_rates(ranks: Sequence[Ints], clusters: Sequence[Ints], ks: Mapping[str, int]) -> dict[str, Estimate]:
    """Estimate how many queries of all runs have their answer among the first k, by name, as by `bootstrap_mean`.

    Args:
        ranks: (Q,) rank of the answer of each query of a run.
        clusters: (Q,) cluster of each query.
        ks: name -> k.
    """
    hits_QK = np.concatenate(ranks)[:, None] <= np.array(list(ks.values()))
    return dict(zip(ks, bootstrap_means(hits_QK, np.concatenate(clusters)), strict=True))


def over_seeds(
    estimates: Mapping[str, Estimate], values: Mapping[str, Sequence[float]], clusters: Sequence[Ints]
) -> dict[str, Estimate]:
    """Return means of fractions over runs with 95% intervals that hold the variance of their seeds.

    Student's t over the runs' own values. Runs on the same items share the choice of these, so that the half width of
    the interval over items is added, in quadrature; runs on items of their own differ by it already.

    Args:
        estimates: name -> mean with its interval over items.
        values: name -> value of each run, at least two.
        clusters: cluster of each item of each run.
    """
    num_runs = len(clusters)
    has_same_items = all(np.array_equal(clusters[0], others) for others in clusters[1:])
    intervals = {}
    for name, items in estimates.items():
        reach = float(_student(num_runs - 1) * np.std(values[name], ddof=1) / np.sqrt(num_runs))
        below, above = (items.value - items.low, items.high - items.value) if has_same_items else (0, 0)
        low, high = items.value - np.hypot(reach, below), items.value + np.hypot(reach, above)
        intervals[name] = Estimate(items.value, max(0.0, float(low)), min(1.0, float(high)))
    return intervals


def effective_number(contents: Ints) -> int:
    """Return of how many independent queries a mean over queries with equal contents is worth: (sum n)^2 / sum n^2."""
    counts = np.unique(contents, return_counts=True)[1]
    return max(1, round(float(counts.sum() ** 2 / (counts**2).sum())))


def jackknife(values: Array, sizes: Ints) -> Estimate:
    """Compute a 95% interval of a statistic from leaving out each block of rows in turn.

    For a statistic that compares rows with each other, resampling with replacement would compare rows with copies of
    themselves; leaving rows out does not. "Delete-m jackknife for unequal m" (Statistics and Computing
    1999), with Student's t of as many degrees of freedom as blocks minus one.

    Args:
        values: (1 + G,) statistic of all rows, then without each block.
        sizes: (G,) number of rows of each block, at least two; every row is in one block.
    """
    value, without_G = float(values[0]), values[1:]
    num_blocks = len(without_G)
    if num_blocks < 2:
        raise DataError(f"jackknife: expected at least 2 blocks, got {num_blocks}")
    ratio_G = sizes.sum() / sizes
    pseudo_G = ratio_G * value - (ratio_G - 1) * without_G
    mean = num_blocks * value - ((1 - 1 / ratio_G) * without_G).sum()
    reach = float(_student(num_blocks - 1) * np.sqrt(np.mean((pseudo_G - mean) ** 2 / (ratio_G - 1))))
    return Estimate(value, value - reach, value + reach)


def _student(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))
