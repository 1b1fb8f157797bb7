"""Ranks of retrieval, and what is made of them."""

import numpy as np

from embedcache.arrays import Array, Floats, Ints, blocks
from embedcache.errors import DataError

_BLOCK_BYTES = 64 * 2**20


def negatives_before(queries_QP: Floats, candidates_CP: Floats, positives: tuple[Ints, Ints]) -> Ints:
    """Count, for each positive pair, the candidates that are no positives of its query and come before: (M,) int64.

    Similarity is the dot product: give rows of length 1 for the cosine. A candidate that ties with the positive
    counts as before it, so that a constant embedding earns nothing; so does one that is no number.

    Exact and tiled: memory is about three times 64 MB above the inputs.

    Args:
        queries_QP: (Q, P) float32.
        candidates_CP: (C, P) float32.
        positives: two (M,) arrays, query i and candidate j of each positive pair; every query needs at least one.

    Raises:
        DataError: a query without a positive.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> negatives_before(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [2, 2, 0]
    """
    query_M, candidate_M = positives
    missing = np.setdiff1d(np.arange(len(queries_QP)), query_M)
    if len(missing):
        raise DataError(f"{len(missing)} queries have no positive candidate, first query {missing[0]}")
    order_M = np.argsort(query_M, kind="stable")
    before_M = np.empty(len(query_M), np.int64)
    rows = max(1, _BLOCK_BYTES // (4 * max(1, len(candidates_CP))))
    for block in blocks(len(queries_QP), rows):
        edges = np.searchsorted(query_M[order_M], [block.start, block.stop])
        inside = order_M[slice(*edges)]
        sims_BC = queries_QP[block] @ candidates_CP.T
        row, column = query_M[inside] - block.start, candidate_M[inside]
        own = sims_BC[row, column]
        sims_BC[row, column] = -np.inf  # positives do not stand before each other
        for part in blocks(len(inside), rows):
            is_after_EC = sims_BC[row[part]] < own[part, None]  # so that NaN counts as before
            before_M[inside[part]] = is_after_EC.shape[1] - is_after_EC.sum(axis=1)
    return before_M


def best_ranks(queries_QP: Floats, candidates_CP: Floats, positives: tuple[Ints, Ints]) -> Ints:
    """Rank of each query's best positive among all candidates: (Q,) int64, 1 is the top.

    The other positives of the query are left out of the count. Arguments, ties and errors are those of
    `negatives_before`.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> best_ranks(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [3, 3, 1]
    """
    return first_ranks(positives[0], negatives_before(queries_QP, candidates_CP, positives))


def first_ranks(query_M: Ints, before_M: Ints) -> Ints:
    """Make the ranks of `best_ranks` from what stands before each positive: (Q,) int64.

    Args:
        query_M: (M,) the query of each positive pair, every query from 0 at least once.
        before_M: (M,) of `negatives_before`.

    Example:
        >>> first_ranks(np.array([0, 1, 1]), np.array([2, 5, 0])).tolist()
        [3, 1]
    """
    ranks_Q = np.full(int(query_M.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(ranks_Q, query_M, before_M + 1)
    return ranks_Q


def average_precisions(query_M: Ints, before_M: Ints) -> Array:
    """Average precision of each query: (Q,) float64, the mean over its positives of i / (rank of the i-th of them).

    Args:
        query_M: as of `first_ranks`.
        before_M: as of `first_ranks`.

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
    """Share of queries whose best positive is among the first k.

    Example:
        >>> recall_at(np.array([1, 3, 12, 2]), 3)
        0.75
    """
    return float(np.mean(ranks_Q <= k))


def chance_recall(num_positives_Q: Ints, num_candidates: int, k: int) -> float:
    """Expected recall at k of a random order: the mean over queries of 1 - C(C - p, k) / C(C, k).

    Example:
        >>> round(chance_recall(np.array([1, 1]), 100, 10), 12)
        0.1
    """
    misses_Q = np.ones(len(num_positives_Q))
    for drawn in range(min(k, num_candidates)):
        left = num_candidates - drawn
        misses_Q *= np.clip((left - num_positives_Q) / left, 0, 1)
    return float(np.mean(1 - misses_Q))
