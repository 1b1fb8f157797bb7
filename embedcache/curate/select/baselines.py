"""Baselines of selection: random samples, the best matches of any concept, CLIP-score filtering, and any score."""

from typing import ClassVar

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Floats, Ints
from embedcache.curate.select.pool import Pool, compute_cosines, whole_samples
from embedcache.curate.select.settings import SelectSettings
from embedcache.dataset.selections import Selection
from embedcache.errors import DataError, SettingError
from embedcache.modalities import name_pair


class RandomSelector:
    """A random sample of the pool, the baseline that every method must beat."""

    accepts: ClassVar[tuple[str, ...]] = ("budget",)
    requires_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "image"
    required_inputs: ClassVar[tuple[str, ...]] = ()
    uses_seed: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select the samples."""
        assert isinstance(settings.budget, int)
        return Selection(rows=draw_rows(pool.samples, settings.budget, seed=settings.seed))


def draw_rows(samples_S: Ints, size: int, *, seed: int) -> Ints:
    """Draw `size` of some samples without replacement, or all if there are no more: ascending."""
    return np.sort(np.random.default_rng(seed).permutation(samples_S)[:size])


class TopScoreSelector:
    """The samples whose best cosine with any concept is highest, however unevenly over concepts."""

    accepts: ClassVar[tuple[str, ...]] = ("budget",)
    requires_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "text"
    required_inputs: ClassVar[tuple[str, ...]] = ("concepts",)
    uses_seed: ClassVar[bool] = False

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select the samples. Memory: a score and a concept per sample."""
        assert isinstance(settings.budget, int)
        scores, concepts = [], []
        for samples_B, vectors_BP in whole_samples(pool.blocks("comparing with concepts")):
            _, starts_S = np.unique(samples_B, return_index=True)
            scores_SC = np.maximum.reduceat(compute_cosines(vectors_BP, pool.concepts.vectors), starts_S, axis=0)
            scores.append(scores_SC.max(axis=1))
            concepts.append(scores_SC.argmax(axis=1))
        scores_S, concept_S = np.concatenate(scores), np.concatenate(concepts)
        chosen = find_highest(scores_S, settings.budget)
        names = pa.array(pool.concepts.names, pa.string())
        columns = {"concept": names.take(pa.array(concept_S[chosen])), "cosine": scores_S[chosen]}
        return Selection(rows=pool.samples[chosen], columns=columns)


def find_highest(scores_S: Array, size: int) -> Ints:
    """Return ascending positions of the `size` highest scores, or of all; of equal scores the first."""
    return np.sort(np.argsort(-scores_S, kind="stable")[:size])


class ClipScoreSelector:
    """The CLIP-score filter of "DataComp" (NeurIPS 2023): the best cosine of a sample's images and captions.

    Of a run of other modalities, it is the best cosine of a sample's items of these. The run must not have been
    trained on the test data. Its own training pairs score higher than others.
    """

    accepts: ClassVar[tuple[str, ...]] = ("budget", "threshold")
    requires_one_of: ClassVar[tuple[str, ...]] = ("budget", "threshold")
    modality: ClassVar[str | None] = None
    required_inputs: ClassVar[tuple[str, ...]] = ("run",)
    uses_seed: ClassVar[bool] = False

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select the samples. Memory: a score per sample."""
        samples_M, scores_M = pool.pair_scores()
        if isinstance(settings.budget, int):
            if settings.budget > len(samples_M):
                raise DataError(
                    f"budget: expected at most the {len(samples_M):,} samples that have both {name_pair(pool.pair)}, "
                    f"got {settings.budget:,}"
                )
            chosen = find_highest(scores_M, settings.budget)
        else:
            chosen = find_above(scores_M, settings.threshold or 0.0)
        return Selection(rows=samples_M[chosen], columns={"cosine": scores_M[chosen]})


def find_above(scores_M: Floats, threshold: float) -> Ints:
    """Return ascending positions of the scores of at least a threshold; `DataError` with their range if none is."""
    chosen: Ints = np.flatnonzero(scores_M >= threshold)
    if not len(chosen):
        low, middle, high = np.quantile(scores_M, [0, 0.5, 1])
        raise DataError(
            f"threshold: expected one that some of {len(scores_M):,} cosines reach, got {threshold}; they range "
            f"from {low:.3f} to {high:.3f}, half of them above {middle:.3f}"
        )
    return chosen


class ScoreSelector:
    """Samples by a score of a table: within bounds, and of these the highest, as many as the budget."""

    accepts: ClassVar[tuple[str, ...]] = ("budget", "score", "at_least", "at_most")
    requires_one_of: ClassVar[tuple[str, ...]] = ()
    modality: ClassVar[str | None] = None
    required_inputs: ClassVar[tuple[str, ...]] = ("scores",)
    uses_seed: ClassVar[bool] = False

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select the samples. Memory: the table of scores."""
        if settings.budget is None and settings.at_least is None and settings.at_most is None:
            raise SettingError("--method score: expected --budget, --at-least or --at-most, got none")
        name, samples_S = pool.score.name, pool.samples
        scores_S = pool.score.values[samples_S]
        low = -np.inf if settings.at_least is None else settings.at_least
        high = np.inf if settings.at_most is None else settings.at_most
        bounds = np.array([low, high], scores_S.dtype)  # rounded as the scores are
        inside = np.flatnonzero((scores_S >= bounds[0]) & (scores_S <= bounds[1]))
        if len(inside) < (settings.budget or 1):
            lowest, middle, highest = np.quantile(scores_S, [0, 0.5, 1])
            wanted = "a sample" if settings.budget is None else f"{settings.budget:,} samples"
            raise DataError(
                f"expected {wanted} with {name} from {low:g} to {high:g}, got {len(inside):,} of {len(samples_S):,}; "
                f"it ranges from {lowest:.4g} to {highest:.4g}, and half of them are above {middle:.4g}"
            )
        if isinstance(settings.budget, int):
            inside = inside[find_highest(scores_S[inside], settings.budget)]
        return Selection(rows=samples_S[inside], columns={name: scores_S[inside]})
