"""Inequality of counts."""

import numpy as np

from embedcache.arrays import Array


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
