"""Hierarchical k-means: a tree of clusters, from whose branches equal shares are drawn."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np

from embedcache.arrays import Floats, Ints, blocks
from embedcache.cache.selection import Selection
from embedcache.curate.select.clusters import default_clusters, find_centroids, most_training_vectors, nearest
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool
from embedcache.errors import SettingError

_RATIO = 10
_BLOCK = 4096


class Hierarchical:
    """The balancing of "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (TMLR 2024).

    k-means on the samples, then on its centroids, and so on; then the budget is cut from the top into equal shares of
    the branches, and what small branches cannot fill goes to the others, down to samples drawn at
    random. Unlike there, no level is clustered again on the points nearest its centroids. A sample is its first item.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "clusters")
    needs_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "image"
    needs: ClassVar[tuple[str, ...]] = ()
    draws: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: 256 vectors a cluster of the finest level, and an integer a sample and level."""
        assert settings.budget is not None
        rows_S = pool.first_items()
        sizes = settings.clusters or default_levels(len(rows_S))
        if any(finer <= coarser for finer, coarser in pairwise(sizes)):
            raise SettingError(
                f"--clusters {','.join(map(str, sizes))}: each level must have fewer than the one before it"
            )
        drawn = np.random.default_rng(settings.seed).permutation(rows_S)[: most_training_vectors(sizes[0])]
        centroids = find_centroids(pool.vectors.read(np.sort(drawn)), sizes[0], seed=settings.seed)
        leaf_S = nearest((pool.vectors.read(rows_S[block]) for block in blocks(len(rows_S), _BLOCK)), centroids)
        labels_SL = tree(leaf_S, centroids, sizes[1:], seed=settings.seed)
        kept = balanced(labels_SL, settings.budget, seed=settings.seed)
        counts = np.bincount(leaf_S, minlength=sizes[0])
        reasons = [_reason(path, counts[path[0]]) for path in labels_SL[kept].tolist()]
        return Selection(rows=pool.samples[kept], reasons=reasons)


def default_levels(num_samples: int) -> tuple[int, ...]:
    """Work out the levels: a centroid for 40 samples, and a tenth on each level above, while there are several."""
    sizes = [default_clusters(num_samples)]
    while sizes[-1] // _RATIO > 1:
        sizes.append(sizes[-1] // _RATIO)
    return tuple(sizes)


def tree(leaf_S: Ints, centroids_CP: Floats, sizes: Sequence[int], *, seed: int) -> Ints:
    """Cluster the centroids of each level: (S, L) int64, the cluster of each sample on each level, finest first."""
    labels = [leaf_S]
    for size in sizes:
        above_CP = find_centroids(centroids_CP, size, seed=seed)
        labels.append(nearest([centroids_CP], above_CP)[labels[-1]])
        centroids_CP = above_CP
    return np.stack(labels, axis=1)


def balanced(labels_SL: Ints, budget: int, *, seed: int) -> Ints:
    """Draw samples so that branches of the tree get equal shares, level by level.

    Args:
        labels_SL: (S, L) cluster of each sample on each level, finest first.
        budget: at most S.
        seed: of the draws.

    Returns:
        Exactly `budget` positions, ascending, each once.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels_SL))
    kept = _drawn(labels_SL[:, ::-1], shuffled, budget, rng)
    return np.sort(kept)


def fill(sizes_C: Ints, budget: int) -> Ints:
    """Cut a budget into shares as equal as the sizes allow: (C,) int64, their sum the budget, none above its size.

    The largest n with sum min(n, size) <= budget; what is left goes one by one to the first that have more.
    """
    order = np.argsort(sizes_C, kind="stable")
    shares_C = np.zeros(len(sizes_C), np.int64)
    left = budget
    for place, branch in enumerate(order.tolist()):
        shares_C[branch] = min(int(sizes_C[branch]), left // (len(order) - place))
        left -= int(shares_C[branch])
    return shares_C


def _drawn(labels_SL: Ints, rows: Ints, budget: int, rng: np.random.Generator) -> Ints:
    """Take `budget` of the shuffled rows, whose labels are coarsest first."""
    if budget >= len(rows) or not labels_SL.shape[1]:
        return rows[:budget]
    order = np.argsort(labels_SL[rows, 0], kind="stable")
    starts = np.unique(labels_SL[rows[order], 0], return_index=True)[1]
    branches = [rows[part] for part in np.split(order, starts[1:])]
    branches = [branches[place] for place in rng.permutation(len(branches))]  # who gets one more is drawn
    shares_C = fill(np.array([len(branch) for branch in branches]), budget)
    return np.concatenate(
        [_drawn(labels_SL[:, 1:], branch, int(share), rng) for branch, share in zip(branches, shares_C, strict=True)]
    )


def _reason(path: Sequence[int], size: int) -> str:
    return f"cluster {'/'.join(map(str, reversed(path)))}, of {size:,} samples"
