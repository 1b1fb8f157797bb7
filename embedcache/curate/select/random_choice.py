"""The baseline that every method must beat: samples drawn at random."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool


class RandomChoice:
    """As many samples as the budget says, each as likely as any other."""

    takes: ClassVar[tuple[str, ...]] = ("budget",)
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "image"
    needs: ClassVar[tuple[str, ...]] = ()
    draws: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Draw them."""
        assert settings.budget is not None
        rows = draw(pool.samples, settings.budget, seed=settings.seed)
        return Selection(rows=rows, reasons=[f"drawn at random, seed {settings.seed}"] * len(rows))


def draw(samples_S: Ints, size: int, *, seed: int) -> Ints:
    """Draw `size` of some samples without replacement, or all where there are no more: ascending."""
    drawn: Ints = np.sort(np.random.default_rng(seed).permutation(samples_S)[:size])
    return drawn
