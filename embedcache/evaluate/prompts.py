"""One vector a class, from cached prompts that a run projects."""

from embedcache.arrays import Floats, mean_directions
from embedcache.cache import prompts as cached
from embedcache.cache.cache import Cache
from embedcache.cache.prompts import Prompts
from embedcache.evaluate.runs import Run, trained_side
from embedcache.projectors.saved import project


def read_prompts(cache: Cache, run: Run) -> Prompts:
    """Find the prompts that a run can project.

    Raises:
        DataError: the cache is no prompt set, or a class has no prompt with the run's text feature.
        FingerprintError: another text encoder made the cache's feature.
        UnfinishedError: the feature has missing chunks.
    """
    cached.require_prompts(cache, run.config.text.spec)
    return cached.read_prompts(cache, trained_side(cache, run.config, "text"))


def class_vectors(prompts: Prompts, run: Run) -> Floats:
    """Project the prompts and ensemble them as the field does: normalise, mean, normalise: (C, P) float32."""
    projected_TP = project(run.pair.text, prompts.side.read(prompts.rows))
    return mean_directions(projected_TP, prompts.classes, len(prompts.names))
