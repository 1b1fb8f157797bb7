"""One vector a class, from the cached prompts of a cache that `extract prompts:…` made."""

from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Array, Floats, Ints, normalize
from embedcache.cache.cache import Cache
from embedcache.cache.side import SideFeature
from embedcache.errors import DataError
from embedcache.evaluate.runs import Run, trained_side
from embedcache.projectors.saved import project

CLASS = "class"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The cached prompts of some classes.

    Args:
        cache: a sample is a class, its captions are its prompts.
        names: of the classes, in the order of their numbers.
        rows: (T,) rows of the text items that were encoded.
        classes: (T,) the class of each.
    """

    cache: Cache
    names: list[str]
    rows: Ints
    classes: Ints

    @property
    def counts(self) -> Ints:
        """Prompts of each class: (C,)."""
        counts: Ints = np.bincount(self.classes, minlength=len(self.names))
        return counts


def read_prompts(cache: Cache, run: Run) -> Prompts:
    """Find the prompts that a run can project.

    Raises:
        DataError: the cache is no prompt set, or a class has no prompt with the run's text feature.
        FingerprintError: another text encoder made the cache's feature.
        UnfinishedError: the feature has missing chunks.
    """
    if CLASS not in cache.columns:
        raise DataError(
            f"{cache.path} is no set of prompts: it has no column {CLASS!r}; make one: embedcache extract "
            f"prompts:CLASSES+TEMPLATES {cache.path.name}-prompts --text {run.config.text.spec}"
        )
    side = trained_side(cache, run.config, "text")
    side.require_complete()
    names: list[str] = cache.samples[CLASS].to_pylist()
    rows = np.flatnonzero(side.valid)
    prompts = Prompts(cache=cache, names=names, rows=rows, classes=cache.items("text")["sample"].to_numpy()[rows])
    without = [name for name, count in zip(names, prompts.counts, strict=True) if not count]
    if without:
        raise DataError(
            f"{len(without)} of {len(names)} classes of {cache.path} have no prompt that was encoded, first "
            f"{without[0]!r}; give each class a prompt"
        )
    return prompts


def class_vectors(prompts: Prompts, run: Run) -> Floats:
    """Project the prompts and ensemble them as the field does: normalise, mean, normalise: (C, P) float32."""
    side: SideFeature = trained_side(prompts.cache, run.config, "text")
    projected_TP = project(run.pair.text, side.read(prompts.rows))
    sums_CP: Array = np.zeros((len(prompts.names), projected_TP.shape[1]), np.float64)
    np.add.at(sums_CP, prompts.classes, projected_TP)
    return normalize(sums_CP)
