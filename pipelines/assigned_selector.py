"""Selection of the samples that `curate coverage` assigns to each concept: a method of `pipelines.curate_concepts`."""

from typing import ClassVar

import numpy as np

from embedcache.curate.prevalence import COUNTED, measure_scale
from embedcache.curate.select.baselines import draw_rows
from embedcache.curate.select.pool import Pool
from embedcache.curate.select.settings import SelectSettings
from embedcache.dataset.selections import Selection


class AssignedSelector:
    """As many samples of each concept as there are, or an equal share, of those that `curate coverage` assigns to it.

    A sample is of its best concept, if it is above the threshold. Rare concepts give all, the others share the rest,
    the most similar samples first. If all concepts have fewer than the budget, the rest is drawn from all samples.
    """

    accepts: ClassVar[tuple[str, ...]] = ("budget",)
    requires_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "text"
    required_inputs: ClassVar[tuple[str, ...]] = ("concepts",)
    uses_seed: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select the samples."""
        blocks = list(pool.blocks("comparing with concepts"))
        samples_N = np.concatenate([samples for samples, _ in blocks])
        sims_NC = np.concatenate([vectors for _, vectors in blocks]) @ pool.concepts.vectors.T
        scale = measure_scale(np.ascontiguousarray(sims_NC.T))
        concepts_N = sims_NC.argmax(axis=1)
        best_N = sims_NC[np.arange(len(sims_NC)), concepts_N]
        scores_N = (best_N - scale.medians[concepts_N]) / (scale.reaches * scale.spreads)[concepts_N]

        budget = int(settings.budget or 0)
        order = np.lexsort((-scores_N, concepts_N))
        order = order[scores_N[order] > COUNTED]
        ranks = np.arange(len(order)) - np.searchsorted(concepts_N[order], concepts_N[order])
        chosen = samples_N[order[np.argsort(ranks, kind="stable")[:budget]]]
        others = np.setdiff1d(pool.samples, chosen)
        drawn = draw_rows(others, budget - len(chosen), seed=settings.seed)
        rows = np.sort(np.concatenate([chosen, drawn]))
        return Selection(rows=rows, reasons=["assigned to a concept"] * len(rows))
