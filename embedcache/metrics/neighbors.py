"""Exact nearest neighbors by dot product: the top k, the closest of each row, pairs above a cosine, k-means, kNN votes.

Rows of length 1 make the dot product the cosine. Everything is tiled; a tie goes to the candidate with the lower row.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy

from embedcache.arrays import Floats, Ints, Products, blocks, dot_products, normalize
from embedcache.progress import NullProgress, Progress, watch

_TILE = 1024  # queries per tile
_CANDIDATES = 16_384  # candidates per tile: 64 MB of similarities


def top_k(
    queries_QP: Floats,
    candidates_CP: Floats,
    k: int,
    *,
    exclude_self: bool = False,
    groups: tuple[Ints, Ints] | None = None,
    products: Products = dot_products,
) -> tuple[Ints, Floats]:
    """Find the k candidates with the largest dot product. Memory: about 200 MB above the inputs and the result.

    Args:
        k: number of candidates per query, from 0 to C, or to C - 1 with `exclude_self`.
        exclude_self: queries and candidates are the same rows; a row is not its own neighbor.
        groups: (Q,) and (C,) groups of queries and candidates; one of the query's own group has the similarity -inf.
        products: computes dot products, perhaps on a GPU.

    Returns:
        (Q, K) int64 rows of candidates, best first, and (Q, K) float32 their similarities.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> top_k(eye[:1], 2 * eye + eye[[1, 2, 0]], 2)[0].tolist()
        [[0, 2]]
    """
    rows_QK = np.empty((len(queries_QP), k), np.int64)
    sims_QK = np.empty((len(queries_QP), k), np.float32)
    for tile in blocks(len(queries_QP), _TILE):
        rows_BK = np.empty((tile.stop - tile.start, 0), np.int64)
        sims_BK = np.empty(rows_BK.shape, np.float32)
        for block in blocks(len(candidates_CP), _CANDIDATES):
            sims_BC = products(queries_QP[tile], candidates_CP[block])
            if exclude_self:
                own = np.arange(max(tile.start, block.start), min(tile.stop, block.stop))
                sims_BC[own - tile.start, own - block.start] = -np.inf
            if groups is not None:
                sims_BC[groups[0][tile, None] == groups[1][block]] = -np.inf
            rows_BC = _largest(sims_BC, k)
            rows_BK = np.concatenate([rows_BK, rows_BC + block.start], axis=1)
            sims_BK = np.concatenate([sims_BK, np.take_along_axis(sims_BC, rows_BC, axis=1)], axis=1)
            kept_BK = _largest(sims_BK, k)
            rows_BK = np.take_along_axis(rows_BK, kept_BK, axis=1)
            sims_BK = np.take_along_axis(sims_BK, kept_BK, axis=1)
        order_BK = np.argsort(-sims_BK, axis=1, kind="stable")  # rows ascend, so ties stay in order of rows
        rows_QK[tile] = np.take_along_axis(rows_BK, order_BK, axis=1)
        sims_QK[tile] = np.take_along_axis(sims_BK, order_BK, axis=1)
    return rows_QK, sims_QK


def _largest(values_BC: Floats, k: int) -> Ints:
    """Return the columns of the k largest values of each row, ascending; of equal values the first columns."""
    if values_BC.shape[1] <= k:
        return np.broadcast_to(np.arange(values_BC.shape[1]), values_BC.shape)
    if k == 0:
        return np.empty((len(values_BC), 0), np.int64)
    columns_BK: Ints = np.sort(np.argpartition(values_BC, -k, axis=1)[:, -k:], axis=1)
    lowest_B = np.take_along_axis(values_BC, columns_BK, axis=1).min(axis=1)
    for row in np.flatnonzero((values_BC >= lowest_B[:, None]).sum(axis=1) > k):  # a tie at the end of the list
        columns_BK[row] = np.sort(np.argsort(-values_BC[row], kind="stable")[:k])
    return columns_BK


class Closest(NamedTuple):
    """The closest pairs between queries and candidates."""

    rows: Ints
    """(Q,) closest candidate of each query; -1 without candidates."""
    sims: Floats
    """(Q,) its similarity; -inf without candidates."""
    candidate_sims: Floats
    """(C,) similarity of each candidate to its closest query."""


def find_closest(queries_QP: Floats, candidates: Iterable[Floats], *, products: Products = dot_products) -> Closest:
    """Find the closest candidate of each query and the similarity of each candidate to its closest query.

    Memory: a block of candidates, its product with 1,024 queries, and the result.

    Args:
        candidates: blocks of (B, P) float32 rows; rows are counted across blocks.
        products: computes dot products, perhaps on a GPU.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> find_closest(eye[:2], [eye[2:], 0.5 * eye[:1]]).rows.tolist()
        [1, 0]
    """
    rows_Q = np.full(len(queries_QP), -1, np.int64)
    sims_Q = np.full(len(queries_QP), -np.inf, np.float32)
    candidate_sims = [np.empty(0, np.float32)]
    num_before = 0
    for block_BP in candidates:
        best_B = np.full(len(block_BP), -np.inf, np.float32)
        for tile in blocks(len(queries_QP) if len(block_BP) else 0, _TILE):
            sims_TB = products(queries_QP[tile], block_BP)
            nearest_T = sims_TB.argmax(axis=1)
            sims = sims_TB[np.arange(len(nearest_T)), nearest_T]
            is_closer = sims > sims_Q[tile]
            rows_Q[tile][is_closer] = nearest_T[is_closer] + num_before
            sims_Q[tile][is_closer] = sims[is_closer]
            best_B = np.maximum(best_B, sims_TB.max(axis=0))
        candidate_sims.append(best_B)
        num_before += len(block_BP)
    return Closest(rows_Q, sims_Q, np.concatenate(candidate_sims))


def iterate_pairs_above(
    vectors_NP: Floats, cosine: float, *, what: str = "", progress: Progress | None = None
) -> Iterator[tuple[Ints, Ints]]:
    """Iterate over all pairs of rows above a cosine, each row with itself included, in tiles of 1,024 rows.

    Rows have length 1; a tile yields two (M,) int64 arrays of row indices. Memory: 1,024 x N similarities. Progress is
    in rows, as the step `what`.
    """
    tiles = blocks(len(vectors_NP), _TILE)
    for block in watch(tiles, progress or NullProgress(), what, len(vectors_NP), "items"):
        left, right = np.nonzero(vectors_NP[block] @ vectors_NP.T > cosine)
        yield left + block.start, right


ITERATIONS = 10
"""Iterations of `spherical_means`."""


def spherical_means(
    vectors_NP: Floats, num_clusters: int, *, seed: int, what: str = "", progress: Progress | None = None
) -> Floats:
    """Cluster rows of length 1 by k-means with cosines: (K, P) float32 centroids of length 1, K at most N.

    Ten iterations from random rows; a cluster that loses all its rows keeps its centroid. Memory: a tile of
    similarities. Progress is in iterations, as the step `what`.
    """
    progress = progress or NullProgress()
    progress.start(what, ITERATIONS, "iterations")
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(vectors_NP), min(num_clusters, len(vectors_NP)), replace=False)
    centroids_KP = vectors_NP[np.sort(chosen)]
    for _ in range(ITERATIONS):
        nearest = [(vectors_NP[tile] @ centroids_KP.T).argmax(axis=1) for tile in blocks(len(vectors_NP), _TILE)]
        members = scipy.sparse.csr_array(
            (np.ones(len(vectors_NP), np.float32), (np.concatenate(nearest), np.arange(len(vectors_NP)))),
            shape=(len(centroids_KP), len(vectors_NP)),
        )
        means_KP = normalize(members @ vectors_NP)
        centroids_KP = np.where(np.any(means_KP, axis=1)[:, None], means_KP, centroids_KP)
        progress.advance(1)
    progress.finish()
    return centroids_KP


def vote(labels_QK: Ints, sims_QK: Floats, num_classes: int, *, temperature: float) -> Floats:
    """Compute the score of each class for each query, exp(similarity / temperature) per neighbor: (Q, C) float32.

    The weights are those of "Emerging Properties in Self-Supervised Vision Transformers" (DINO, ICCV 2021), divided by
    the nearest neighbor's weight so that no temperature overflows.

    Args:
        labels_QK: class of each neighbor.
        sims_QK: similarity of each neighbor, best first.
        temperature: a lower temperature gives more weight to the nearest neighbors.
    """
    weights_QK = np.exp((sims_QK - sims_QK[:, :1]) / temperature)
    votes_QC = np.zeros((len(labels_QK), num_classes), np.float32)
    np.add.at(votes_QC, (np.arange(len(labels_QK))[:, None], labels_QK), weights_QK)
    return votes_QC
