"""DataComp's image-based filter: samples that lie where a target's items lie.

Hierarchical k-means: a tree of clusters, from whose branches equal shares are drawn.

Diversity: samples as far from one another as they can be.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np

from embedcache.arrays import Floats, Ints, blocks
from embedcache.curate.select.baselines import draw
from embedcache.curate.select.pool import Pool, default_clusters, find_centroids, most_training_vectors
from embedcache.curate.select.select import SelectSettings
from embedcache.dataset.selections import Selection
from embedcache.errors import DataError, SettingError
from embedcache.metrics.neighbors import closest


class ImageBasedSelector:
    """The image-based filter of "DataComp" (NeurIPS 2023).

    The pool is cut into clusters; those that hold the nearest centroid of an item of the target are kept whole, and
    `budget`, where it is given, is drawn from them. The target must not hold what is measured afterwards.
    """

    accepts: ClassVar[tuple[str, ...]] = ("budget", "clusters")
    requires_one_of: ClassVar[tuple[str, ...]] = ()
    modality: ClassVar[str | None] = "image"
    required_inputs: ClassVar[tuple[str, ...]] = ("target",)
    uses_seed: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: 256 vectors a cluster, and two integers an item."""
        num_clusters = _one_level(settings.clusters) or default_clusters(len(pool.samples))
        drawn = pool.sample(most_training_vectors(num_clusters), seed=settings.seed)
        centroids_CP = find_centroids(drawn, num_clusters, seed=settings.seed)
        target_T = _nearest_centroids((vectors for _, vectors in pool.target.blocks()), centroids_CP)
        samples, clusters = [], []
        for samples_B, vectors_BP in pool.blocks("looking for the nearest centroids"):
            samples.append(samples_B)
            clusters.append(closest(vectors_BP, [centroids_CP]).rows)
        kept_S, cluster_S = near_target(np.concatenate(samples), np.concatenate(clusters), target_T)
        if settings.budget is not None:
            if settings.budget > len(kept_S):
                raise DataError(
                    f"{len(kept_S):,} of {len(pool.samples):,} samples lie in the target's {len(set(target_T)):,} "
                    f"clusters, fewer than the budget of {settings.budget:,}; lower it, or give fewer --clusters"
                )
            drawn_rows = draw(kept_S, settings.budget, seed=settings.seed)
            cluster_S, kept_S = cluster_S[np.searchsorted(kept_S, drawn_rows)], drawn_rows
        counts_C = np.bincount(target_T, minlength=num_clusters)
        reasons = [f"cluster {c}, with {counts_C[c]:,} items of the target" for c in cluster_S.tolist()]
        return Selection(rows=kept_S, reasons=reasons)


def _nearest_centroids(vectors: Iterable[Floats], centroids_CP: Floats) -> Ints:
    return np.concatenate([closest(vectors_BP, [centroids_CP]).rows for vectors_BP in vectors])


def near_target(samples_N: Ints, clusters_N: Ints, target_T: Ints) -> tuple[Ints, Ints]:
    """Keep the samples with an item in a cluster that holds an item of the target.

    Args:
        samples_N: the sample of each item.
        clusters_N: its cluster.
        target_T: the cluster of each item of the target.

    Returns:
        The samples, ascending and each once, (S,), and the cluster of each one's first such item, (S,).
    """
    inside = np.flatnonzero(np.isin(clusters_N, target_T))
    kept, first = np.unique(samples_N[inside], return_index=True)
    return kept, clusters_N[inside[first]]


def _one_level(clusters: tuple[int, ...] | None) -> int | None:
    if clusters is not None and len(clusters) > 1:
        raise SettingError(f"--clusters names {len(clusters)} levels; image-based has one")
    return clusters[0] if clusters else None


_RATIO = 10
_BLOCK = 4096


class HierarchicalSelector:
    """The balancing of "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (TMLR 2024).

    k-means on the samples, then on its centroids, and so on; then the budget is cut from the top into equal shares of
    the branches, and what small branches cannot fill goes to the others, down to samples drawn at
    random. Unlike there, no level is clustered again on the points nearest its centroids. A sample is its first item.
    """

    accepts: ClassVar[tuple[str, ...]] = ("budget", "clusters")
    requires_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "image"
    required_inputs: ClassVar[tuple[str, ...]] = ()
    uses_seed: ClassVar[bool] = True

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
        leaf_S = _nearest_centroids(
            (pool.vectors.read(rows_S[block]) for block in blocks(len(rows_S), _BLOCK)), centroids
        )
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
        labels.append(closest(centroids_CP, [above_CP]).rows[labels[-1]])
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


_DRAWN = 20_000


class KCenterSelector:
    """The greedy k-center coreset of "Active Learning for Convolutional Neural Networks" (ICLR 2018), Algorithm 1.

    On samples drawn from the pool, as its time is budget x drawn. It starts from one drawn at random. Noise is far
    from everything, so it is chosen early: clean the pool first. A sample is its first item.
    """

    accepts: ClassVar[tuple[str, ...]] = ("budget", "drawn")
    requires_one_of: ClassVar[tuple[str, ...]] = ("budget",)
    modality: ClassVar[str | None] = "image"
    required_inputs: ClassVar[tuple[str, ...]] = ()
    uses_seed: ClassVar[bool] = True

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
