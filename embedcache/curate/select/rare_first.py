"""The paper's curation: the best samples of each concept, concepts that have few good ones first."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Bools, Floats, Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.best_samples import best_samples
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool

_CANDIDATES_A_PLACE = 25


class RareFirst:
    """The curation of "Harnessing Frozen Unimodal Encoders for Flexible Multimodal Alignment" (CVPR 2025).

    About n samples a concept, each sample once.
    As there, a concept's candidates are the 25 n samples that fit it best, and concepts choose one after another, the
    rarest first. Unlike there, a concept's rarity is its score at rank n, the last that it hopes for, where the code
    takes the last candidate, whose rank memory decides; and cosines are kept as float32, not in steps of .0027.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "per_concept")
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget", "per_concept")
    modality: ClassVar[str | None] = "text"
    needs: ClassVar[tuple[str, ...]] = ("concepts",)
    draws: ClassVar[bool] = False

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: 16 bytes for each of C x 25 n candidates."""
        concepts = pool.concepts
        num_concepts = len(concepts.names)
        most = settings.per_concept or -(-(settings.budget or 0) // num_concepts)
        k = min(len(pool.samples), _CANDIDATES_A_PLACE * most)
        best = best_samples(pool.blocks("comparing with concepts"), concepts.vectors, k)
        order_C = rarest_first(best.scores_CK, most)
        quota_C = np.full(num_concepts, most)
        if settings.budget is not None:
            quota_C[order_C] = shares(settings.budget, num_concepts)
        concept_M, rank_M = assign(best.samples_CK, order_C, quota_C)
        rows_M = best.samples_CK[concept_M, rank_M]
        by_row = np.argsort(rows_M)
        reasons = [
            f"concept {concepts.names[concept]!r}, {pool.modality} cosine {best.scores_CK[concept, rank]:.3f}, "
            f"rank {rank + 1}"
            for concept, rank in zip(concept_M[by_row].tolist(), rank_M[by_row].tolist(), strict=True)
        ]
        return Selection(rows=rows_M[by_row], reasons=reasons)


def shares(budget: int, num_concepts: int) -> Ints:
    """Cut a budget into equal places, one more for the first where it does not divide: (C,) int64, their sum it."""
    return budget // num_concepts + (np.arange(num_concepts) < budget % num_concepts).astype(np.int64)


def rarest_first(scores_CK: Floats, quota: int) -> Ints:
    """Order concepts by their score at rank `quota`, or at the last rank there is, lowest first: (C,) int64."""
    return np.argsort(scores_CK[:, min(quota, scores_CK.shape[1]) - 1], kind="stable")


def assign(samples_CK: Ints, order_C: Ints, quota_C: Ints) -> tuple[Ints, Ints]:
    """Let concepts choose one after another, each its best candidates that no other has chosen.

    Args:
        samples_CK: (C, K) each concept's candidates, best first.
        order_C: the concepts in the order in which they choose.
        quota_C: (C,) the most that each chooses; one whose candidates are taken gets fewer.

    Returns:
        Two (M,) arrays: the concept that chose, and the rank of its candidate, from 0.
    """
    is_taken: Bools = np.zeros(int(samples_CK.max(initial=-1)) + 1, bool)
    chosen = []
    for concept in order_C.tolist():
        ranks = np.flatnonzero(~is_taken[samples_CK[concept]])[: quota_C[concept]]
        is_taken[samples_CK[concept, ranks]] = True
        chosen.append((np.full(len(ranks), concept), ranks))
    return np.concatenate([concept for concept, _ in chosen]), np.concatenate([ranks for _, ranks in chosen])
