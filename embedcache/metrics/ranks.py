"""Ranks of retrieval, and what is made of them."""

import numpy as np

from embedcache.arrays import Floats, Ints, blocks
from embedcache.errors import DataError

_BLOCK_BYTES = 64 * 2**20


def best_ranks(queries_QP: Floats, candidates_CP: Floats, positives: tuple[Ints, Ints]) -> Ints:
    """Rank of each query's best positive among all candidates: (Q,) int64, 1 is the top.

    Similarity is the dot product: give rows of length 1 for the cosine. A candidate that is no positive and ties
    with the best positive counts as ranked before it, so that a constant embedding earns nothing; the other
    positives of the query are left out of the count.

    Exact and tiled: memory is about 64 MB above the inputs.

    Args:
        queries_QP: (Q, P) float32.
        candidates_CP: (C, P) float32.
        positives: two (M,) arrays, query i and candidate j of each positive pair; every query needs at least one.

    Raises:
        DataError: a query without a positive.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> best_ranks(eye, eye[[1, 0, 2]], (np.arange(3), np.arange(3))).tolist()
        [3, 3, 1]
    """
    query_M, candidate_M = positives
    order = np.argsort(query_M, kind="stable")
    query_M, candidate_M = query_M[order], candidate_M[order]
    starts_Q = np.searchsorted(query_M, np.arange(len(queries_QP)))
    missing = np.setdiff1d(np.arange(len(queries_QP)), query_M)
    if len(missing):
        raise DataError(f"{len(missing)} queries have no positive candidate, first query {missing[0]}")
    ranks_Q = np.empty(len(queries_QP), np.int64)
    for block in blocks(len(queries_QP), max(1, _BLOCK_BYTES // (4 * max(1, len(candidates_CP))))):
        sims_BC = queries_QP[block] @ candidates_CP.T
        inside = slice(
            starts_Q[block.start],
            starts_Q[block.stop] if block.stop < len(starts_Q) else len(query_M),
        )
        row, column = query_M[inside] - block.start, candidate_M[inside]
        best_B = np.full(len(sims_BC), -np.inf, np.float32)
        with np.errstate(invalid="ignore"):
            np.maximum.at(best_B, row, sims_BC[row, column])
        is_before_BC = ~(sims_BC < best_B[:, None])  # so that NaN counts as before
        is_before_BC[row, column] = False
        ranks_Q[block] = 1 + is_before_BC.sum(axis=1)
    return ranks_Q


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
