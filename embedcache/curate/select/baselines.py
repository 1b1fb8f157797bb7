"""Baselines of selection: random samples, the best matches of any concept, CLIP-score filtering, and any score."""

from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import pyarrow as pa
from pydantic import Field

from embedcache.arrays import Array, Floats, Ints
from embedcache.curate.select.pool import Pool, compute_cosines, whole_samples
from embedcache.dataset.selections import Score, Selection
from embedcache.errors import DataError, SettingError
from embedcache.modalities import name_pair
from embedcache.search.concepts import Concepts

Cosine: TypeAlias = Annotated[float, Field(ge=-1, le=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]


def random_draw(pool: Pool, *, budget: int, seed: int = 0) -> Selection:
    """Select a random sample of the pool, the baseline that every method must beat."""
    return Selection(rows=draw_rows(pool.samples, budget, seed=seed))


def draw_rows(samples_S: Ints, size: int, *, seed: int) -> Ints:
    """Draw `size` of some samples without replacement, or all if there are no more: ascending."""
    return np.sort(np.random.default_rng(seed).permutation(samples_S)[:size])


def top_score(pool: Pool, *, concepts: Concepts, budget: int) -> Selection:
    """Select the samples whose best cosine with any concept is highest, however unevenly over concepts.

    Memory: a score and a concept per sample.
    """
    best_scores = []
    best_concepts = []
    for samples_B, vectors_BP in whole_samples(pool.blocks("comparing with concepts")):
        _, starts_S = np.unique(samples_B, return_index=True)
        scores_SC = np.maximum.reduceat(compute_cosines(vectors_BP, concepts.vectors), starts_S, axis=0)
        best_scores.append(scores_SC.max(axis=1))
        best_concepts.append(scores_SC.argmax(axis=1))
    scores_S = np.concatenate(best_scores)
    concept_S = np.concatenate(best_concepts)

    chosen = find_highest(scores_S, budget)
    names = pa.array(concepts.names, pa.string())
    columns = {"concept": names.take(pa.array(concept_S[chosen])), "cosine": scores_S[chosen]}
    return Selection(rows=pool.samples[chosen], columns=columns)


def find_highest(scores_S: Array, size: int) -> Ints:
    """Return ascending positions of the `size` highest scores, or of all; of equal scores the first."""
    return np.sort(np.argsort(-scores_S, kind="stable")[:size])


def clip_score(pool: Pool, *, run: Path | str, budget: int | None = None, threshold: Cosine | None = None) -> Selection:
    """Select by the CLIP-score filter of "DataComp" (NeurIPS 2023): the best cosine of a sample's images and captions.

    Of a run of other modalities, it is the best cosine of a sample's items of these. The run must not have been
    trained on the test data. Its own training pairs score higher than others. Memory: a score per sample.
    """
    del run  # by which the pool projects its vectors
    check_one(budget=budget, threshold=threshold)
    samples_M, scores_M = pool.pair_scores()
    if budget is None:
        assert threshold is not None
        chosen = find_above(scores_M, threshold)
    elif budget > len(samples_M):
        raise DataError(
            f"budget: expected at most the {len(samples_M):,} samples that have both {name_pair(pool.pair)}, "
            f"got {budget:,}"
        )
    else:
        chosen = find_highest(scores_M, budget)
    return Selection(rows=samples_M[chosen], columns={"cosine": scores_M[chosen]})


def check_one(**arguments: object) -> None:
    """Check that exactly one of some arguments of a method is given, else raise `SettingError`."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        expected = " or ".join("--budget" if name == "budget" else f"the parameter {name}" for name in arguments)
        raise SettingError(f"expected either {expected}, got {' and '.join(given) or 'none'}")


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


def by_score(
    pool: Pool,
    *,
    scores: Score,
    budget: int | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Selection:
    """Select samples by a score of a table: within bounds, and of these the highest, as many as the budget.

    Memory: the table of scores.
    """
    if budget is None and at_least is None and at_most is None:
        raise SettingError("--method score: expected --budget or a parameter at_least or at_most, got none")
    scores_S = scores.values[pool.samples]
    low = -np.inf if at_least is None else at_least
    high = np.inf if at_most is None else at_most
    bounds = np.array([low, high], scores_S.dtype)  # rounded as the scores are
    inside = np.flatnonzero((scores_S >= bounds[0]) & (scores_S <= bounds[1]))

    if len(inside) < (budget or 1):
        lowest, middle, highest = np.quantile(scores_S, [0, 0.5, 1])
        wanted = "a sample" if budget is None else f"{budget:,} samples"
        raise DataError(
            f"expected {wanted} with {scores.name} from {low:g} to {high:g}, got {len(inside):,} of "
            f"{len(scores_S):,}; it ranges from {lowest:.4g} to {highest:.4g}, and half of them are above {middle:.4g}"
        )
    if budget is not None:
        inside = inside[find_highest(scores_S[inside], budget)]
    return Selection(rows=pool.samples[inside], columns={scores.name: scores_S[inside]})
