"""Classification metrics: rank of the true class, confusion matrix, class means."""

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints


def ranks_of(scores_NC: Floats, labels_N: Ints) -> Ints:
    """Compute the rank of each item's true class: (N,) int64, 1 is the best.

    A class with the same score or NaN counts as ranked before it, so that constant scores are never correct.

    Example:
        >>> ranks_of(np.array([[0.1, 0.9], [0.5, 0.5]], np.float32), np.array([1, 0])).tolist()
        [1, 2]
    """
    own_N = scores_NC[np.arange(len(labels_N)), labels_N]
    is_before_NC: Bools = ~(scores_NC < own_N[:, None])
    num_before_N = is_before_NC.sum(axis=1)
    ranks_N: Ints = np.where(np.isnan(own_N), scores_NC.shape[1], num_before_N)
    return ranks_N


def confusion(labels_N: Ints, predicted_N: Ints, num_classes: int) -> Ints:
    """Count items by true class (rows) and predicted class (columns): (C, C) int64.

    Example:
        >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
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
