"""DataComp's image-based filter: samples that lie where a target's items lie."""

from typing import ClassVar

import numpy as np

from embedcache.arrays import Ints
from embedcache.cache.selection import Selection
from embedcache.curate.select.clusters import default_clusters, find_centroids, most_training_vectors, nearest
from embedcache.curate.select.contract import SelectSettings
from embedcache.curate.select.pool import Pool
from embedcache.curate.select.random_choice import draw
from embedcache.errors import DataError, SettingError


class ImageBased:
    """The image-based filter of "DataComp" (NeurIPS 2023).

    The pool is cut into clusters; those that hold the nearest centroid of an item of the target are kept whole, and
    `budget`, where it is given, is drawn from them. The target must not hold what is measured afterwards.
    """

    takes: ClassVar[tuple[str, ...]] = ("budget", "clusters")
    needs_one_of: ClassVar[tuple[str, ...]] = ()
    modality: ClassVar[str | None] = "image"
    needs: ClassVar[tuple[str, ...]] = ("target",)
    draws: ClassVar[bool] = True

    def select(self, pool: Pool, settings: SelectSettings) -> Selection:
        """Select them. Memory: 256 vectors a cluster, and two integers an item."""
        num_clusters = _one_level(settings.clusters) or default_clusters(len(pool.samples))
        drawn = pool.sample(most_training_vectors(num_clusters), seed=settings.seed)
        centroids_CP = find_centroids(drawn, num_clusters, seed=settings.seed)
        target_T = nearest((vectors for _, vectors in pool.target.blocks()), centroids_CP)
        samples, clusters = [], []
        for samples_B, vectors_BP in pool.blocks("looking for the nearest centroids"):
            samples.append(samples_B)
            clusters.append(nearest([vectors_BP], centroids_CP))
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
