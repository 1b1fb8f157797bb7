"""Retrieval metrics: ranks of positives, recall at k, average precision, and their chance levels."""

from math import comb

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, Products, blocks, distinct, dot_products
from embedcache.errors import DataError

_BLOCK_BYTES = 64 * 2**20


def negatives_before(
    queries_QP: Floats,
    candidates_CP: Floats,
    positives: tuple[Ints, Ints],
    *,
    products: Products = dot_products,
) -> Ints:
    """Count the negatives ranked before each positive pair: (M,) int64.

    Similarity is the dot product, the cosine for rows of length 1. A negative with the same similarity, to within
    rounding (`is_below`), or NaN counts as ranked before the positive, so that a constant embedding scores zero. Tiled:
    about 200 MB above the inputs.

    Args:
        positives: two (M,) arrays, query and candidate of each positive pair; every query needs at least one.
        products: computes dot products, perhaps on a GPU.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> negatives_before(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [2, 2, 0]
    """
    query_M, candidate_M = positives
    missing = np.flatnonzero(np.bincount(query_M, minlength=len(queries_QP)) == 0)
    if len(missing):
        raise DataError(
            f"expected a positive candidate per query, got none for {len(missing)}, first query {missing[0]}"
        )
    order_M = np.argsort(query_M, kind="stable")
    before_M = np.empty(len(query_M), np.int64)
    rows = max(1, _BLOCK_BYTES // (4 * max(1, len(candidates_CP))))
    for block in blocks(len(queries_QP), rows):
        edges = np.searchsorted(query_M[order_M], [block.start, block.stop])
        inside = order_M[slice(*edges)]
        sims_BC = products(queries_QP[block], candidates_CP)
        row, column = query_M[inside] - block.start, candidate_M[inside]
        own = sims_BC[row, column]
        sims_BC[row, column] = -np.inf  # positives do not count as negatives of each other
        for part in blocks(len(inside), rows):
            is_after_EC = is_below(sims_BC[row[part]], own[part, None])  # so that NaN counts as before
            before_M[inside[part]] = is_after_EC.shape[1] - is_after_EC.sum(axis=1)
    return before_M


def is_below(values: Floats, others: Floats) -> Bools:
    """Return whether values lie below others by more than rounding: 2 steps of float32 below 1, or a larger value.

    A product with equal rows may differ by a step or two from one to the other, as libraries sum some of them in
    another order.

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

    Arguments, ties and errors are those of `negatives_before`.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> best_ranks(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [3, 3, 1]
    """
    return first_ranks(positives[0], negatives_before(queries_QP, candidates_CP, positives, products=products))


def first_ranks(query_M: Ints, before_M: Ints) -> Ints:
    """Compute the ranks of `best_ranks` from the result of `negatives_before` and the query of each positive pair.

    Example:
        >>> first_ranks(np.array([0, 1, 1]), np.array([2, 5, 0])).tolist()
        [3, 1]
    """
    ranks_Q = np.full(int(query_M.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(ranks_Q, query_M, before_M + 1)
    return ranks_Q


def average_precisions(query_M: Ints, before_M: Ints) -> Array:
    """Compute the average precision of each query: (Q,) float64, the mean over positives i of i / rank of the i-th.

    Arguments are those of `first_ranks`.

    Example:
        >>> average_precisions(np.array([0, 1, 1]), np.array([1, 0, 1])).round(3).tolist()
        [0.5, 0.833]
    """
    order_M = np.lexsort((before_M, query_M))
    query_M, before_M = query_M[order_M], before_M[order_M]
    counts_Q = np.bincount(query_M)
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

    Equal captions are ranked one after another, so that a query's best positive is reached later than if each caption
    had a place of its own. All equal candidates of a positive must be
    positives, too. Memory: k numbers per query.

    Args:
        positives: two (M,) arrays, query and candidate of each positive pair.
        contents_C: (C,) number of each candidate's content.

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

    Groups are in random order, so that each set of n groups is equally likely to come first. The sum is over n: the
    fraction of these sets that have negative groups and fewer than k items alone, times the probability that the next
    one of the other groups is positive.

    Args:
        negatives_K: (K,) number of negative groups of s items, for s from 1 on.
        num_positives: number of positive groups.
        num_groups: number of all groups.
        k: number of items that are looked at.
    """
    sets_JS = np.zeros((k, k))  # number of sets of j negative groups with s items in all
    sets_JS[0, 0] = 1
    for size in range(1, k):
        before_JS, sets_JS = sets_JS, np.zeros((k, k))
        for count in range(min((k - 1) // size, int(negatives_K[size])) + 1):
            shifted = before_JS[: k - count, : k - count * size]
            sets_JS[count:, count * size :] += comb(int(negatives_K[size]), count) * shifted
    probability = sum(
        float(sets_JS[num].sum()) / comb(num_groups, num) * num_positives / (num_groups - num)
        for num in range(min(k, num_groups - num_positives + 1))
    )
    return min(1.0, probability)  # a sum of nine ninths is a little more


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

    The true class comes after others of the same score, to within rounding, so that it is the first only where its rank
    in `rank_labels` is 1; others of the same score are in the order of their numbers.

    Example:
        >>> top_classes(np.array([[0.1, 0.9], [0.5, 0.5]], np.float32), np.array([1, 0]), 2).tolist()
        [[1, 0], [1, 0]]
    """
    scores_NC, true = scores_NC.copy(), (np.arange(len(labels_N)), labels_N)
    scores_NC[true] = lowest_equal(scores_NC[true])
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

    Half the mean absolute difference of two counts, over their mean; "Variabilità e mutabilità", Gini 1912.

    Example:
        >>> gini(np.array([1, 1, 1, 1])), gini(np.array([0, 0, 0, 4]))
        (0.0, 0.75)
    """
    sorted_C = np.sort(np.asarray(counts_C, np.float64))
    total, num = sorted_C.sum(), len(sorted_C)
    if not total:
        return float("nan")
    weights_C = 2 * np.arange(1, num + 1) - num - 1
    return float((weights_C * sorted_C).sum() / (num * total))


def top_fraction(counts_C: Array, fraction: float) -> float:
    """Return the fraction of the sum in the largest fraction of the counts, at least one count; NaN if all are 0.

    Example:
        >>> top_fraction(np.array([1, 6, 1, 2]), 0.25)
        0.6
    """
    sorted_C = np.sort(np.asarray(counts_C, np.float64))[::-1]
    total = sorted_C.sum()
    num = max(1, round(fraction * len(sorted_C)))
    return float(sorted_C[:num].sum() / total) if total else float("nan")
