"""Metrics as pure functions of arrays. They know no model, no file and no device.

They compute ranks of positives, recall at k and average precision with their chance levels. They estimate 95% intervals
by a bootstrap over clusters or a jackknife over blocks. And they compare two features by debiased CKA with a linear
kernel and by mutual nearest neighbors. There x is (N, D) and y is (N, E), and row i of both is the same sample. No
N × N matrix is made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from embedcache.arrays import (
    Array,
    Bools,
    Floats,
    Ints,
    Products,
    blocks,
    check_finite,
    distinct,
    dot_products,
    normalize,
)
from embedcache.errors import DataError
from embedcache.neighbors.knn import knn

_BLOCK_BYTES = 64 * 2**20
_DRAWS_PER_BLOCK = 1 << 18
_MOST_CLUSTERS = 2**14  # resampling a million would take most of the time of an evaluation
Doubles = npt.NDArray[np.float64]

_ROUNDING = 1e-24  # of float64, squared


def negatives_before(
    queries_QP: Floats,
    candidates_CP: Floats,
    positives: tuple[Ints, Ints],
    *,
    products: Products = dot_products,
) -> Ints:
    """Count the negatives ranked before each positive pair: (M,) int64.

    Similarity is the dot product, the cosine for rows of length 1. A negative with the same similarity, to within
    rounding (`is_below`), or NaN counts as ranked before the positive, so that a constant embedding scores zero. Memory
    of the tiles: about 200 MB above the inputs.

    Args:
        queries_QP: vectors of the queries.
        candidates_CP: vectors of the candidates.
        positives: two (M,) arrays, query and candidate of each positive pair. Every query needs at least one.
        products: computes dot products, perhaps on a GPU.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> negatives_before(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [2, 2, 0]
    """
    query_M, candidate_M = positives
    unpaired = np.flatnonzero(np.bincount(query_M, minlength=len(queries_QP)) == 0)
    if len(unpaired):
        raise DataError(
            f"expected a positive candidate per query, got none for {len(unpaired)}, first query {unpaired[0]}"
        )

    order_M = np.argsort(query_M, kind="stable")
    before_M = np.empty(len(query_M), np.int64)
    rows = max(1, _BLOCK_BYTES // (4 * max(1, len(candidates_CP))))
    for block in blocks(len(queries_QP), rows):
        edges = np.searchsorted(query_M[order_M], [block.start, block.stop])
        inside = order_M[slice(*edges)]
        sims_BC = products(queries_QP[block], candidates_CP)
        row = query_M[inside] - block.start
        column = candidate_M[inside]
        positive_sims = sims_BC[row, column]
        sims_BC[row, column] = -np.inf  # positives do not count as negatives of each other

        # Counting the negatives after a positive makes NaN one of those before it.
        for part in blocks(len(inside), rows):
            is_after_EC = is_below(sims_BC[row[part]], positive_sims[part, None])
            before_M[inside[part]] = is_after_EC.shape[1] - is_after_EC.sum(axis=1)
    return before_M


def is_below(values: Floats, others: Floats) -> Bools:
    """Return whether values lie below others by more than rounding.

    Rounding is the epsilon of float32 times the other value, or times 1 if that is larger. Products with equal rows may
    differ by a step or two of float32, as libraries sum some of them in another order.

    Example:
        >>> is_below(np.float32([0.5, 0.49, np.nan]), np.float32([0.50000006])).tolist()
        [False, True, False]
    """
    result: Bools = values < lowest_equal(others)
    return result


def lowest_equal(values: Floats) -> Floats:
    """Return the lowest numbers that are not below values by more than rounding, see `is_below`."""
    rounding: Floats = np.finfo(np.float32).eps * np.maximum(1, np.abs(values))
    return values - rounding


def best_ranks(
    queries_QP: Floats, candidates_CP: Floats, positives: tuple[Ints, Ints], *, products: Products = dot_products
) -> Ints:
    """Compute the rank of each query's best positive among the negatives: (Q,) int64, 1 is the best.

    See `negatives_before` for arguments, ties and errors.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> best_ranks(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [3, 3, 1]
    """
    return first_ranks(positives[0], negatives_before(queries_QP, candidates_CP, positives, products=products))


def first_ranks(query_M: Ints, before_M: Ints) -> Ints:
    """Compute the ranks of `best_ranks` from the query of each positive pair and the result of `negatives_before`.

    Example:
        >>> first_ranks(np.array([0, 1, 1]), np.array([2, 5, 0])).tolist()
        [3, 1]
    """
    ranks_Q = np.full(int(query_M.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(ranks_Q, query_M, before_M + 1)
    return ranks_Q


def average_precisions(query_M: Ints, before_M: Ints) -> Array:
    """Compute the average precision of each query: (Q,) float64, the mean over positives i of i / rank of the i-th.

    The arguments are the same as in `first_ranks`.

    Example:
        >>> average_precisions(np.array([0, 1, 1]), np.array([1, 0, 1])).round(3).tolist()
        [0.5, 0.833]
    """
    order_M = np.lexsort((before_M, query_M))
    query_M = query_M[order_M]
    before_M = before_M[order_M]
    counts_Q = np.bincount(query_M)

    # The i-th positive of a query has i - 1 positives and its negatives before it.
    place_M = 1 + np.arange(len(query_M)) - np.repeat(np.cumsum(counts_Q) - counts_Q, counts_Q)
    precisions_Q: Array = np.bincount(query_M, weights=place_M / (place_M + before_M)) / counts_Q
    return precisions_Q


def recall_at(ranks_Q: Ints, k: int) -> float:
    """Return the fraction of queries whose best positive is among the first k.

    Example:
        >>> recall_at(np.array([1, 3, 12, 2]), 3)
        0.75
    """
    return float(np.mean(ranks_Q <= k))


def tied_chance_recall(positives: tuple[Ints, Ints], contents_C: Ints, k: int) -> float:
    """Compute the expected recall at k of random vectors where equal candidates have equal vectors.

    Equal captions are ranked one after another, so a query's best positive is reached later than if each caption had a
    separate place. All equal candidates of a positive must also be positives. Memory: k numbers per query.

    Args:
        positives: two (M,) arrays, query and candidate of each positive pair.
        contents_C: (C,) number of each candidate's content.
        k: number of candidates in the first places.

    Example:
        >>> positives = np.array([0, 1, 1]), np.array([0, 1, 2])
        >>> round(tied_chance_recall(positives, np.array([0, 1, 1]), 1), 12)
        0.5
        >>> round(tied_chance_recall(positives, np.array([0, 1, 1]), 2), 12)
        0.75
    """
    _, number_C, size_G = np.unique(contents_C, return_inverse=True, return_counts=True)
    num_groups = len(size_G)
    query_P, group_P = np.divmod(distinct(positives[0] * num_groups + number_C[positives[1]]), num_groups)

    # Queries with the same numbers of positive groups of each size have the same chance, which is computed once.
    counts_QK = np.zeros((int(query_P.max()) + 1, k), np.int64)  # column s: positive groups of s items, 0: of any size
    np.add.at(counts_QK[:, 0], query_P, 1)
    is_small = size_G[group_P] < k
    np.add.at(counts_QK, (query_P[is_small], size_G[group_P[is_small]]), 1)
    sizes_K = np.bincount(size_G[size_G < k], minlength=k)  # number of groups of s items
    positives_FK, num_queries_F = np.unique(counts_QK, axis=0, return_counts=True)
    recalls = [_first_within(sizes_K - counts_K, int(counts_K[0]), num_groups, k) for counts_K in positives_FK]
    return float(np.average(recalls, weights=num_queries_F))


def _first_within(negatives_K: Ints, num_positives: int, num_groups: int, k: int) -> float:
    """Return the probability that fewer than k items are in the groups before the first positive one.

    Groups are in random order, so that each set of n groups is equally likely to come first. The probability is a sum
    over n. A term is the fraction of these sets with only negative groups and fewer than k items, times the probability
    that the next group is positive.

    Args:
        negatives_K: (K,) number of negative groups of s items, for s from 1 on.
        num_positives: number of positive groups.
        num_groups: number of all groups.
        k: number of items in the first places.
    """
    sets = np.zeros((k, k))  # number of sets of j negative groups with s items in all
    sets[0, 0] = 1
    for size in range(1, k):
        smaller_sets = sets
        sets = np.zeros((k, k))
        for count in range(min((k - 1) // size, int(negatives_K[size])) + 1):
            shifted = smaller_sets[: k - count, : k - count * size]
            sets[count:, count * size :] += comb(int(negatives_K[size]), count) * shifted

    probability = 0.0
    for num in range(min(k, num_groups - num_positives + 1)):
        fraction = float(sets[num].sum()) / comb(num_groups, num)
        probability += fraction * num_positives / (num_groups - num)

    # A sum of nine ninths is a little more than 1.
    return min(1.0, probability)


def metric_label(name: str) -> str:
    """Return a metric's name as tables show it: `i2t r@1` becomes `i2t R@1`."""
    return name.replace("r@", "R@")


def rank_labels(scores_NC: Floats, labels_N: Ints) -> Ints:
    """Compute the rank of each item's true class: (N,) int64, 1 is the best.

    A class with the same score, to within rounding, or NaN counts as ranked before it, so that constant scores are
    never correct.

    Example:
        >>> rank_labels(np.array([[0.1, 0.9], [0.5, 0.5]], np.float32), np.array([1, 0])).tolist()
        [1, 2]
    """
    own_N = scores_NC[np.arange(len(labels_N)), labels_N]
    is_before_NC = ~is_below(scores_NC, own_N[:, None])
    num_before_N = is_before_NC.sum(axis=1)
    ranks_N: Ints = np.where(np.isnan(own_N), scores_NC.shape[1], num_before_N)
    return ranks_N


def top_classes(scores_NC: Floats, labels_N: Ints, k: int) -> Ints:
    """Return the k classes with the highest scores of each item, best first: (N, K) int64.

    The true class comes after others of the same score, to within rounding. So it is the first only if its rank in
    `rank_labels` is 1. Other classes of the same score are in the order of their numbers.

    Example:
        >>> top_classes(np.array([[0.1, 0.9], [0.5, 0.5]], np.float32), np.array([1, 0]), 2).tolist()
        [[1, 0], [1, 0]]
    """
    scores_NC = scores_NC.copy()
    true_places = (np.arange(len(labels_N)), labels_N)
    scores_NC[true_places] = lowest_equal(scores_NC[true_places])
    best_NK = np.sort(np.argpartition(-scores_NC, k - 1, axis=1)[:, :k], axis=1)
    order_NK = np.argsort(-np.take_along_axis(scores_NC, best_NK, axis=1), axis=1, kind="stable")
    top_NK: Ints = np.take_along_axis(best_NK, order_NK, axis=1)
    return top_NK


def count_confusion(labels_N: Ints, predicted_N: Ints, num_classes: int) -> Ints:
    """Count items by true class (rows) and predicted class (columns): (C, C) int64.

    Example:
        >>> count_confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    flat: Ints = np.bincount(labels_N * num_classes + predicted_N, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def class_means(values_N: Array, labels_N: Ints, num_classes: int) -> Array:
    """Compute the mean value of each class: (C,) float64, NaN for a class without items.

    Example:
        >>> class_means(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 1]), 2).tolist()
        [0.5, 1.0]
    """
    sums_C = np.bincount(labels_N, weights=values_N, minlength=num_classes)
    counts_C = np.bincount(labels_N, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        means_C: Array = sums_C / counts_C
    return means_C


def gini(counts_C: Array) -> float:
    """Compute the Gini coefficient: 0 for equal counts, near 1 if one has everything, NaN if all are 0.

    It is half the mean absolute difference of two counts, divided by their mean ("Variabilità e mutabilità", Gini
    1912).

    Example:
        >>> gini(np.array([1, 1, 1, 1])), gini(np.array([0, 0, 0, 4]))
        (0.0, 0.75)
    """
    sorted_C = np.sort(np.asarray(counts_C, np.float64))
    total = sorted_C.sum()
    num = len(sorted_C)
    if not total:
        return float("nan")
    weights_C = 2 * np.arange(1, num + 1) - num - 1
    return float((weights_C * sorted_C).sum() / (num * total))


def top_fraction(counts_C: Array, fraction: float) -> float:
    """Return the fraction of the sum in the largest fraction of the counts, at least one. It is NaN if all are 0.

    Example:
        >>> top_fraction(np.array([1, 6, 1, 2]), 0.25)
        0.6
    """
    sorted_C = np.sort(np.asarray(counts_C, np.float64))[::-1]
    total = sorted_C.sum()
    num = max(1, round(fraction * len(sorted_C)))
    return float(sorted_C[:num].sum() / total) if total else float("nan")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval.

    Example:
        >>> print(Estimate(0.066, 0.046, 0.101))
        0.066 [0.046, 0.101]
    """

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
        clusters_M: (M,) row of the item of each value. Values of one item are drawn together.
    """

    values_M: Array
    clusters_M: Ints

    def estimate(self, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
        """Return the mean with a 95% interval over items."""
        return bootstrap_mean(self.values_M, self.clusters_M, num_draws=num_draws, seed=seed)


def bootstrap_mean(values: Array, clusters: Ints | None = None, *, num_draws: int = 2000, seed: int = 0) -> Estimate:
    """Compute a mean with a 95% percentile interval from resampling whole clusters.

    Values of one cluster, such as captions of one image or seeds of one item, are not independent. They are drawn
    together.

    Args:
        values: (M,) float or bool.
        clusters: (M,) int, cluster of each value. If None, every value is its own cluster.
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

    # A resample is a weight per cluster, so its means are products with the sums of the clusters.
    means = [values_MK.mean(axis=0, dtype=np.float64)[None]]
    for weight_BG in _resamples(len(size_G), num_draws, seed):
        means.append(weight_BG @ sum_GK / (weight_BG @ size_G)[:, None])
    return list(map(interval_of, np.concatenate(means).T))


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

    `labels` are (M,) int from 0, the class of each value. Classes without a value are left out.
    """
    from scipy.sparse import csr_array

    cluster_M, size_G = _clusters(clusters, len(values))
    shape = (int(labels.max()) + 1, len(size_G))
    sum_CG = csr_array((values.astype(np.float64), (labels, cluster_M)), shape)
    count_CG = csr_array((np.ones(len(values)), (labels, cluster_M)), shape)

    def class_means(weight_GB: Array) -> Array:
        sum_CB = sum_CG @ weight_GB
        count_CB = count_CG @ weight_GB
        mean_CB = sum_CB / np.maximum(count_CB, 1)
        return np.asarray(mean_CB.sum(axis=0) / (count_CB > 0).sum(axis=0))

    # The first value is the mean of all data, with each cluster once.
    means = [class_means(np.ones((len(size_G), 1)))]
    for weight_BG in _resamples(len(size_G), num_draws, seed):
        means.append(class_means(weight_BG.T))
    return interval_of(np.concatenate(means))


def bootstrap_runs(values_RM: Array, clusters: Ints | None = None, *, num_draws: int = 1000, seed: int = 0) -> Estimate:
    """Compute the mean of several runs on the same items, (R, M), from resampling both runs and clusters."""
    clusters = np.arange(values_RM.shape[1]) if clusters is None else clusters
    means = resample_runs(list(values_RM[:, :, None]), [clusters] * len(values_RM), num_draws=num_draws, seed=seed)
    return interval_of(means[:, 0])


def resample_runs(
    values: Sequence[Array], clusters: Sequence[Ints], *, num_draws: int = 1000, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Compute means over several runs of all values, then of resamples of both runs and clusters.

    Columns are compared on the same resamples, so that `interval_of` gives an interval of any statistic of the means.

    Args:
        values: (M, K) float or bool of each run. Runs may have different items.
        clusters: (M,) int of each run, cluster of each value. One cluster is drawn together in all runs.
        num_draws: number of resamples.
        seed: random seed of the resampling.

    Returns:
        (1 + num_draws, K) means of K columns. A resample without any value is 0.

    Raises:
        DataError: there are no values.
    """
    cluster_M, count_G = _clusters(np.concatenate([np.empty(0, np.int64), *clusters]), sum(map(len, values)))
    num_runs = len(values)
    num_clusters = len(count_G)

    # Counts and sums of each run and cluster: a resample is a weighted sum of them.
    count_RG = np.zeros((num_runs, num_clusters))
    sums = []
    parts = np.split(cluster_M, np.cumsum(list(map(len, clusters)))[:-1])
    for run, (values_MK, part_M) in enumerate(zip(values, parts, strict=True)):
        count_RG[run] = np.bincount(part_M, minlength=num_clusters)
        columns = [np.bincount(part_M, column, minlength=num_clusters) for column in values_MK.T.astype(np.float64)]
        sums.append(np.stack(columns, axis=1))

    weight_DR = np.concatenate(list(_resamples(num_runs, num_draws, seed + 1)))
    means = [np.concatenate(values).mean(axis=0, dtype=np.float64)[None]]
    start = 0
    for weight_BG in _resamples(num_clusters, num_draws, seed):
        weight_BR = weight_DR[start : start + len(weight_BG)]
        sum_BK = sum(weight_BR[:, [run]] * (weight_BG @ sum_GK) for run, sum_GK in enumerate(sums))
        means.append(sum_BK / np.maximum((weight_BR * (weight_BG @ count_RG.T)).sum(axis=1), 1)[:, None])
        start += len(weight_BG)
    return np.concatenate(means)


def interval_of(values_R: Array) -> Estimate:
    """Return the first value, a statistic of all data, with the 95% percentile interval of the others, its resamples.

    Values may be infinite. An end of the interval is then one of the values.
    """
    method: Literal["inverted_cdf", "linear"] = "inverted_cdf" if np.isinf(values_R).any() else "linear"
    low, high = np.quantile(values_R[1:], [0.025, 0.975], method=method)
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
        clusters: (M,) int, cluster of each value. If None, every value is its own cluster.
        num_draws: number of resamples.
        seed: random seed of the resampling.
    """
    cluster_M, size_G = _clusters(clusters, num_values)
    values = [statistic(np.ones(num_values))]
    for weight_BG in _resamples(len(size_G), num_draws, seed):
        values += [statistic(weight_G[cluster_M]) for weight_G in weight_BG]
    return interval_of(np.array(values))


def _clusters(clusters: Ints | None, num_values: int) -> tuple[Ints, Ints]:
    """Return the number of each value's cluster, from 0, and the cluster sizes.

    If there are more than `_MOST_CLUSTERS`, groups of clusters are drawn together. As clusters are independent, so are
    the groups, and the intervals have the same expected width.
    """
    if not num_values:
        raise DataError("bootstrap: expected at least one value, got none")
    cluster_M: Ints = np.arange(num_values)
    if clusters is not None:
        _, cluster_M = np.unique(clusters, return_inverse=True)
    cluster_M = cluster_M % _MOST_CLUSTERS
    return cluster_M, np.bincount(cluster_M)


def _resamples(num_clusters: int, num_draws: int, seed: int) -> Iterator[Ints]:
    """Iterate over blocks of resamples, each the number of times that each cluster is drawn: (B, G)."""
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
    """Estimate the fraction of queries of all runs with their answer among the first k. See `bootstrap_mean`.

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
    """Return means of fractions over runs with 95% intervals that cover the variance of their seeds.

    The interval is Student's t over the values of the runs. Runs on the same items share the choice of items, so the
    half width of the interval over items is added in quadrature. Runs on different items differ by it already.

    Args:
        estimates: name -> mean with its interval over items.
        values: name -> value of each run, at least two.
        clusters: cluster of each item of each run.
    """
    num_runs = len(clusters)
    has_same_items = all(map(partial(np.array_equal, clusters[0]), clusters[1:]))
    intervals = {}
    for name, items in estimates.items():
        reach = float(_student(num_runs - 1) * np.std(values[name], ddof=1) / np.sqrt(num_runs))
        lower_width = items.value - items.low if has_same_items else 0
        upper_width = items.high - items.value if has_same_items else 0
        low = float(items.value - np.hypot(reach, lower_width))
        high = float(items.value + np.hypot(reach, upper_width))
        intervals[name] = Estimate(items.value, max(0.0, low), min(1.0, high))
    return intervals


def effective_number(contents: Ints) -> int:
    """Return the number of independent queries that a mean over queries with equal contents is worth.

    It is (sum n)^2 / sum n^2, with n queries per content.
    """
    counts = np.unique(contents, return_counts=True)[1]
    return max(1, round(float(counts.sum() ** 2 / (counts**2).sum())))


def jackknife(values: Array, sizes: Ints) -> Estimate:
    """Compute a 95% interval of a statistic from leaving out each block of rows in turn.

    Use it for a statistic that compares rows with each other. Resampling with replacement would compare rows with
    copies of themselves, and leaving rows out does not. The method is "Delete-m jackknife for unequal m" (Statistics
    and Computing 1999), with Student's t of as many degrees of freedom as blocks minus one.

    Args:
        values: (1 + G,) statistic of all rows, then without each block.
        sizes: (G,) number of rows of each block, at least two blocks. Every row is in one block.
    """
    value = float(values[0])
    without_G = values[1:]
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


def nearest_others(rows_ND: Array, k: int, *, products: Products = dot_products) -> Ints:
    """Find the k nearest other rows of each row by cosine: (N, K) int64. See `knn` for memory and `products`.

    The mean overlap of the neighbors by two features is mutual kNN ("The Platonic Representation Hypothesis", ICML
    2024). Its chance level is k / (N - 1).
    """
    num_rows = len(rows_ND)
    if not 0 < k < num_rows:
        raise DataError(f"k: expected a number from 1 to {num_rows - 1} for {num_rows} rows, got {k}")
    check_finite(rows_ND, "the rows")
    unit_ND = normalize(rows_ND)
    return knn(unit_ND, unit_ND, k, own=np.arange(num_rows), products=products)[0]


def neighbor_overlap(first_NK: Ints, second_NK: Ints) -> Doubles:
    """Return the fraction of common neighbors of each row, (N,) float64, from two (N, K) arrays of row indices."""
    num_rows, k = first_NK.shape
    ids = np.concatenate([first_NK, second_NK], axis=1)
    ids.sort(axis=1)  # neighbors of one feature are distinct, so equal indices come from both
    overlap_N: Doubles = (ids[:, 1:] == ids[:, :-1]).sum(axis=1).reshape(num_rows) / k
    return overlap_N


class CenteredRows:
    """Centered rows with the sums that products need, of all rows and without each block of rows.

    Args:
        rows: (N, D) of any float dtype. They are stored centered, as float64.
        block_N: (N,) int64, block of each row, from 0. If None, there are no blocks.
    """

    def __init__(self, rows: Array, block_N: Ints | None = None) -> None:
        check_finite(rows, "the rows")
        block_N = np.zeros(0, np.int64) if block_N is None else block_N
        order = np.argsort(block_N, kind="stable") if len(block_N) else slice(None)
        sizes = np.bincount(block_N)
        self.num_rows = np.concatenate([[len(rows)], len(rows) - sizes])
        if self.num_rows.min() < 4:
            raise DataError(f"expected at least 4 rows to compare, got {self.num_rows.min()}")

        # Centered rows keep small differences of large sums accurate.
        self.rows_ND: Doubles = np.asarray(rows, np.float64)[order]
        mean_D = self.rows_ND.mean(axis=0)
        self.rows_ND = self.rows_ND - mean_D

        # Rows are sorted by block, so each block is a slice; the first slice leaves out nothing.
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.slices = [slice(0, 0), *map(slice, bounds[:-1].tolist(), bounds[1:].tolist())]
        sums_GD = -np.stack([self.rows_ND[block].sum(axis=0) for block in self.slices])

        self.squares_N: Doubles = np.einsum("nd,nd->n", self.rows_ND, self.rows_ND)
        if self.squares_N.sum() <= _ROUNDING * np.vdot(mean_D, mean_D) * len(rows):
            raise DataError("expected rows that differ, got equal rows")
        self.others_NG: Doubles = self.rows_ND @ sums_GD.T - self.squares_N[:, None]


def kernel_products(x: CenteredRows, y: CenteredRows) -> Doubles:
    """Compute unbiased HSIC of two features, with the same blocks, of all rows and without each block: (1 + G,).

    It is HSIC_1 of "Feature Selection via Dependence Maximization" (JMLR 2012) with linear kernels. For independent
    features it is about 0, and may be below. Memory: two D × E matrices.
    """
    total_DE = x.rows_ND.T @ y.rows_ND
    return np.array([_product_without(x, y, number, total_DE) for number in range(len(x.slices))])


def cka(xy: Doubles, xx: Doubles, yy: Doubles) -> Doubles:
    """Compute debiased linear CKA, (M,), from the products of both features and of each with itself, all (M,)."""
    if min(xx.min(), yy.min()) <= 0:
        raise DataError("CKA: expected an unbiased HSIC above 0, got a feature of too few or too similar rows")
    ratio_M: Doubles = xy / np.sqrt(xx * yy)
    return ratio_M


def _product_without(x: CenteredRows, y: CenteredRows, number: int, total_DE: Doubles) -> float:
    block = x.slices[number]
    n = int(x.num_rows[number])
    cross_DE = total_DE - x.rows_ND[block].T @ y.rows_ND[block]
    is_kept_N = np.ones(len(x.squares_N), bool)
    is_kept_N[block] = False

    # Sums over kernels without their diagonals, which makes HSIC unbiased.
    diagonal = float(x.squares_N[is_kept_N] @ y.squares_N[is_kept_N])
    row_sums_x = x.others_NG[is_kept_N, number]
    row_sums_y = y.others_NG[is_kept_N, number]
    product = (
        np.vdot(cross_DE, cross_DE)
        - diagonal
        + row_sums_x.sum() * row_sums_y.sum() / ((n - 1) * (n - 2))
        - 2 * (row_sums_x @ row_sums_y) / (n - 2)
    )
    return float(product) / (n * (n - 3))
