"""CLIP-score filtering: samples whose caption fits their image by a trained run."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool
from embedcache.curate.select.top_score import highest
from embedcache.errors import DataError


class ClipScore:
    """The CLIP-score filter of "DataComp" (NeurIPS 2023): the best cosine of a sample's images and captions.

    The run says what fits, so it must not have been trained on what is measured afterwards. Its own training pairs
    score higher than others.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "threshold")
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget", "threshold")
    modality: ClassVar[str | None] = None
    needs: ClassVar[tuple[str, ...]] = ("run",)
    draws: ClassVar[bool] = False

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: a score a sample."""
        samples_M, scores_M = pool.pair_scores()
        if settings.budget is not None:
            _refuse_few(settings.budget, len(samples_M))
            kept = highest(scores_M, settings.budget)
        else:
            kept = above(scores_M, settings.threshold or 0.0)
        reasons = [f"image and caption cosine {score:.3f}" for score in scores_M[kept].tolist()]
        return Selection(rows=samples_M[kept], reasons=reasons)


def above(scores_M: Floats, threshold: float) -> Ints:
    """Find the scores of at least a threshold: ascending positions.

    Raises:
        DataError: there are none; says where the scores lie.
    """
    kept: Ints = np.flatnonzero(scores_M >= threshold)
    if not len(kept):
        low, middle, high = np.quantile(scores_M, [0, 0.5, 1])
        raise DataError(
            f"none of {len(scores_M):,} cosines reaches {threshold}; they lie between {low:.3f} and {high:.3f}, "
            f"half of them above {middle:.3f}"
        )
    return kept


def _refuse_few(budget: int, num_scored: int) -> None:
    if budget > num_scored:
        raise DataError(
            f"the budget is {budget:,}, and {num_scored:,} samples have both an image and a caption; lower it"
        )
