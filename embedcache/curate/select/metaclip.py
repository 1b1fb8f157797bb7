"""MetaCLIP's balancing: of concepts that many samples show only some are kept, of rare ones all."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Array, Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.match import Matches, match_near, match_words
from embedcache.curate.select.pool import Pool
from embedcache.errors import DataError


class Metaclip:
    """The balancing of "Demystifying CLIP Data" (ICLR 2024), Algorithm 1.

    Samples match concepts by the words of their captions or, with `threshold`, by cosine. Each match of a concept with
    n matches is kept with probability min(1, t / n), and a sample with any of its matches. t is `head`, or the one that
    keeps `budget` samples. What matches no concept is never kept.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "head", "threshold")
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget", "head")
    modality: ClassVar[str | None] = "text"
    needs: ClassVar[tuple[str, ...]] = ("concepts",)
    draws: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: some 50 bytes a match."""
        names = pool.concepts.names
        matches = _match(pool, settings.threshold)
        if not len(matches.samples_M):
            raise DataError(
                f"none of {len(pool.samples):,} samples matches any of {len(names):,} concepts, such as {names[0]!r}; "
                "lower --threshold, or give other concepts"
            )
        first_M, heads_M = lowest_heads(matches, seed=settings.seed)
        if settings.budget is not None and settings.budget > len(first_M):
            raise DataError(
                f"only {len(first_M):,} of {len(pool.samples):,} samples match one of {len(names):,} concepts, fewer "
                f"than the budget of {settings.budget:,}; lower it, or match by a lower --threshold"
            )
        kept = first_M[_kept(heads_M, settings)]
        kept = kept[np.argsort(matches.samples_M[kept])]
        counts_C = np.bincount(matches.concepts_M)
        reasons = [f"concept {names[c]!r}, one of {counts_C[c]:,} matches" for c in matches.concepts_M[kept].tolist()]
        return Selection(rows=matches.samples_M[kept], reasons=reasons)


def lowest_heads(matches: Matches, *, seed: int) -> tuple[Ints, Array]:
    """Find the t from which on each sample is kept, and the match that keeps it then.

    A match of a concept with n of them is kept where its draw u, uniform in [0, 1), is below t / n: where t is above
    u n. So one draw gives nested selections for all t, and any budget is met exactly.

    Returns:
        (S,) position in the matches of each matching sample's first one, and (S,) float64 its t; by sample.
    """
    counts_C = np.bincount(matches.concepts_M)
    heads_M = np.random.default_rng(seed).random(len(matches.samples_M)) * counts_C[matches.concepts_M]
    order_M = np.lexsort((heads_M, matches.samples_M))
    _, first_S = np.unique(matches.samples_M[order_M], return_index=True)
    kept_S: Ints = order_M[first_S]
    return kept_S, heads_M[kept_S]


def _kept(heads_S: Array, settings: SelectSettings) -> Ints:
    if settings.budget is not None:
        return np.argsort(heads_S, kind="stable")[: settings.budget]
    return np.flatnonzero(heads_S < settings.head)


def _match(pool: Pool, threshold: float | None) -> Matches:
    if threshold is None:
        return match_words(pool.texts(), pool.concepts.names)
    return match_near(pool.blocks("comparing with concepts"), pool.concepts.vectors, threshold)
