"""How unevenly counts are spread."""

import numpy as np

from embedcache.arrays import Array


def gini(counts_C: Array) -> float:
    """Gini coefficient: 0 where all counts are equal, near 1 where one has everything. NaN where all are 0.

    Half the mean absolute difference of two counts, over their mean; "Variabilità e mutabilità", Gini 1912.

    Args:
        counts_C: (C,) not negative.

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


def top_share(counts_C: Array, share: float) -> float:
    """Share of the sum that the largest counts hold, where they are a share of all, at least one. NaN where all are 0.

    Args:
        counts_C: (C,) not negative.
        share: of the counts, 0 to 1.

    Example:
        >>> top_share(np.array([1, 6, 1, 2]), 0.25)
        0.6
    """
    sorted_C = np.sort(np.asarray(counts_C, np.float64))[::-1]
    total = sorted_C.sum()
    num = max(1, round(share * len(sorted_C)))
    return float(sorted_C[:num].sum() / total) if total else float("nan")
