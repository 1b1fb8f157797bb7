"""The nearest of many vectors, exactly, and what their labels vote for."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Floats, Ints, blocks

_TILE = 1024  # queries at a time
_CANDIDATES = 16_384  # at a time: a tile of similarities is 64 MB


def nearest(queries_QP: Floats, candidates_CP: Floats, k: int) -> tuple[Ints, Floats]:
    """Find the candidates with the largest dot product: give rows of length 1 for the cosine.

    Exact and tiled: memory is about 200 MB above the inputs and the result. Of candidates that tie at the end of the
    list, any may be in it.

    Args:
        queries_QP: (Q, P) float32.
        candidates_CP: (C, P) float32.
        k: how many, from 1 to C.

    Returns:
        (Q, k) int64 rows of candidates, best first, and (Q, k) float32 their similarities.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> nearest(eye[:1], 2 * eye + eye[[1, 2, 0]], 2)[0].tolist()
        [[0, 2]]
    """
    rows_QK = np.empty((len(queries_QP), k), np.int64)
    sims_QK = np.empty((len(queries_QP), k), np.float32)
    for tile in blocks(len(queries_QP), _TILE):
        rows_BK = np.empty((tile.stop - tile.start, 0), np.int64)
        sims_BK = np.empty(rows_BK.shape, np.float32)
        for block in blocks(len(candidates_CP), _CANDIDATES):
            sims_BC = queries_QP[tile] @ candidates_CP[block].T
            rows_BC = _largest(sims_BC, k)
            rows_BK = np.concatenate([rows_BK, rows_BC + block.start], axis=1)
            sims_BK = np.concatenate([sims_BK, np.take_along_axis(sims_BC, rows_BC, axis=1)], axis=1)
            kept_BK = _largest(sims_BK, k)
            rows_BK = np.take_along_axis(rows_BK, kept_BK, axis=1)
            sims_BK = np.take_along_axis(sims_BK, kept_BK, axis=1)
        order_BK = np.argsort(-sims_BK, axis=1, kind="stable")
        rows_QK[tile] = np.take_along_axis(rows_BK, order_BK, axis=1)
        sims_QK[tile] = np.take_along_axis(sims_BK, order_BK, axis=1)
    return rows_QK, sims_QK


class Closest(NamedTuple):
    """Who is closest between two sets of vectors.

    Args:
        rows: (Q,) int64, each query's closest candidate; -1 where there is none.
        sims: (Q,) float32, its similarity; -inf where there is none.
        candidate_sims: (C,) float32, each candidate's similarity to the query that it is closest to.
    """

    rows: Ints
    sims: Floats
    candidate_sims: Floats


def closest(queries_QP: Floats, candidates: Iterable[Floats]) -> Closest:
    """Find each query's closest candidate, and how close each candidate comes to any query: of all pairs, in one go.

    Exact and tiled: memory is a block of candidates, its product with 1,024 queries, and the result.

    Args:
        queries_QP: (Q, P) float32, at least one row; give rows of length 1 for the cosine.
        candidates: blocks of rows (B, P) float32; rows are counted on from block to block.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> closest(eye[:2], [eye[2:], 0.5 * eye[:1]]).rows.tolist()
        [1, 0]
    """
    rows_Q = np.full(len(queries_QP), -1, np.int64)
    sims_Q = np.full(len(queries_QP), -np.inf, np.float32)
    candidate_sims = [np.empty(0, np.float32)]
    num_before = 0
    for block_BP in candidates:
        best_B = np.full(len(block_BP), -np.inf, np.float32)
        for tile in blocks(len(queries_QP) if len(block_BP) else 0, _TILE):
            sims_TB = queries_QP[tile] @ block_BP.T
            found = sims_TB.argmax(axis=1)
            sims = sims_TB[np.arange(len(found)), found]
            is_closer = sims > sims_Q[tile]
            rows_Q[tile][is_closer] = found[is_closer] + num_before
            sims_Q[tile][is_closer] = sims[is_closer]
            best_B = np.maximum(best_B, sims_TB.max(axis=0))
        candidate_sims.append(best_B)
        num_before += len(block_BP)
    return Closest(rows_Q, sims_Q, np.concatenate(candidate_sims))


def vote(labels_QK: Ints, sims_QK: Floats, num_classes: int, *, temperature: float) -> Floats:
    """Add up the votes of each query's neighbors: (Q, num_classes) float32, exp(similarity / temperature) a neighbor.

    As in "Emerging Properties in Self-Supervised Vision Transformers" (DINO), Caron et al. 2021; here relative to the
    nearest neighbor's vote, which is 1, so that no temperature is too small.

    Args:
        labels_QK: (Q, K) int64, the class of each neighbor.
        sims_QK: (Q, K) float32, its similarity, best first.
        num_classes: how many classes there are.
        temperature: the smaller, the more the nearest neighbor decides.
    """
    weights_QK = np.exp((sims_QK - sims_QK[:, :1]) / temperature)
    votes_QC = np.zeros((len(labels_QK), num_classes), np.float32)
    np.add.at(votes_QC, (np.arange(len(labels_QK))[:, None], labels_QK), weights_QK)
    return votes_QC


def _largest(values_BC: Floats, k: int) -> Ints:
    """Find the columns of the k largest values of each row, in no order; all where there are fewer."""
    if values_BC.shape[1] <= k:
        return np.broadcast_to(np.arange(values_BC.shape[1]), values_BC.shape)
    columns_BK: Ints = np.argpartition(values_BC, -k, axis=1)[:, -k:]
    return columns_BK
