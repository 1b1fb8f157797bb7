"""Metrics of classes: rank of the true class, confusion matrix, class means, and inequality of counts."""

import numpy as np

from embedcache.arrays import Array, Floats, Ints
from embedcache.metrics.ranking import is_below, lowest_equal


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
