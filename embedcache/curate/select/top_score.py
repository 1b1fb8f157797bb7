"""A baseline: the samples that fit any concept best, however unevenly."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Array, Floats, Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.best_samples import cosines, to_keys, whole_samples
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool


class TopScore:
    """The samples whose best cosine with any concept is highest."""

    takes: ClassVar[tuple[str, ...]] = ("budget",)
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "text"
    needs: ClassVar[tuple[str, ...]] = ("concepts",)
    draws: ClassVar[bool] = False

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: a score and a concept a sample."""
        assert settings.budget is not None
        scores_S, concept_S = nearest_concepts(pool, pool.concepts.vectors)
        kept = highest(scores_S, settings.budget)
        names = pool.concepts.names
        reasons = [
            f"concept {names[concept]!r}, {pool.modality} cosine {score:.3f}"
            for concept, score in zip(concept_S[kept].tolist(), scores_S[kept].tolist(), strict=True)
        ]
        return Selection(rows=pool.samples[kept], reasons=reasons)


def highest(scores_S: Array, size: int) -> Ints:
    """Find the `size` highest scores, or all where there are no more; of equals the first. Ascending positions."""
    keys_S = to_keys(scores_S, np.arange(len(scores_S)))
    kept: Ints = np.sort(np.argsort(-keys_S)[:size])
    return kept


def nearest_concepts(pool: Pool, concepts_CP: Floats) -> tuple[Floats, Ints]:
    """Find what concept fits each sample of a pool best, by its best item: (S,) cosine and (S,) concept."""
    scores, concepts = [], []
    for samples_B, vectors_BP in whole_samples(pool.blocks("comparing with concepts")):
        _, starts_S = np.unique(samples_B, return_index=True)
        scores_SC = np.maximum.reduceat(cosines(vectors_BP, concepts_CP), starts_S, axis=0)
        scores.append(scores_SC.max(axis=1))
        concepts.append(scores_SC.argmax(axis=1))
    return np.concatenate(scores), np.concatenate(concepts)
