"""Diversity: samples as far from one another as they can be."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool
from embedcache.errors import SettingError

_DRAWN = 20_000


class KCentre:
    """The greedy k-centre coreset of "Active Learning for Convolutional Neural Networks" (ICLR 2018), Algorithm 1.

    On samples drawn from the pool, as its time is budget x drawn. It starts from one drawn at random. Noise is far
    from everything, so it is chosen early: clean the pool first. A sample is its first item.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "drawn")
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "image"
    needs: ClassVar[tuple[str, ...]] = ()
    draws: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: the vectors of those drawn."""
        assert settings.budget is not None
        num_drawn = settings.drawn or max(_DRAWN, 2 * settings.budget)
        if num_drawn < settings.budget:
            raise SettingError(f"--drawn {num_drawn:,} is fewer than the budget of {settings.budget:,}")
        drawn = np.random.default_rng(settings.seed).permutation(len(pool.samples))[:num_drawn]
        chosen, cosines = farthest_first(pool.vectors.read(pool.first_items()[drawn]), settings.budget)
        order = np.argsort(drawn[chosen])
        reasons = [
            f"number {n + 1} of those drawn, cosine {cosines[n]:.3f} to the nearest before" for n in order.tolist()
        ]
        return Selection(rows=pool.samples[drawn[chosen[order]]], reasons=reasons)


def farthest_first(vectors_NP: Floats, size: int) -> tuple[Ints, Floats]:
    """Begin with the first vector; then take, again and again, the one whose nearest of those taken is farthest.

    Args:
        vectors_NP: (N, P) float32 unit rows.
        size: how many, at most N.

    Returns:
        (M,) positions in the order in which they were taken, and (M,) the cosine of each to the nearest before it, -1
        for the first. The cosines never fall.
    """
    nearest_N = np.full(len(vectors_NP), -1, np.float32)
    chosen, cosines = np.empty(size, np.int64), np.empty(size, np.float32)
    position = 0
    for number in range(size):
        chosen[number], cosines[number] = position, nearest_N[position]
        nearest_N = np.maximum(nearest_N, vectors_NP @ vectors_NP[position])
        nearest_N[position] = np.inf
        position = int(nearest_N.argmin())
    return chosen, cosines
