"""Methods on vectors alone: DataComp's image-based filter, hierarchical k-means, and the greedy k-center coreset."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from embedcache.arrays import Floats, Ints, blocks, normalize
from embedcache.curate.select.baselines import Count, draw_rows
from embedcache.curate.select.pool import Pool
from embedcache.dataset.selections import Selection
from embedcache.dataset.vectors import Vectors
from embedcache.devices import AUTO
from embedcache.errors import DataError, SettingError
from embedcache.neighbors.knn import knn
from embedcache.progress import NullProgress, Progress, watch
from embedcache.search.faiss_index import spherical_kmeans

_ITERATIONS = 20
_TRAINING_PER_CLUSTER = 256  # vectors that k-means trains on at most
_ITEMS_PER_CLUSTER = 40
_MAX_CLUSTERS = 10_000


def image_based(
    pool: Pool,
    *,
    target: Vectors,
    budget: int | None = None,
    clusters: Count | None = None,
    seed: int = 0,
    device: str = AUTO,
) -> Selection:
    """Select by the image-based filter of "DataComp" (NeurIPS 2023), which compares vectors of any modality.

    The pool is divided into clusters, by default one per 40 samples. The samples of those that hold an item of the
    target are selected, or, with a budget, a random sample of them. The target must not hold test data.

    Memory: 256 vectors per cluster, and two integers per item.
    """
    num_clusters = clusters or default_clusters(len(pool.samples))
    drawn = pool.sample(_TRAINING_PER_CLUSTER * num_clusters, seed=seed)
    centroids_CP = find_centroids(drawn, num_clusters, seed=seed, progress=pool.progress, device=device)
    target_blocks = target.blocks("assigning the target to clusters", pool.progress)
    target_T = np.concatenate([_nearest_centroids(vectors_BP, centroids_CP) for _, vectors_BP in target_blocks])

    item_samples = []
    item_clusters = []
    for samples_B, vectors_BP in pool.blocks("assigning to clusters"):
        item_samples.append(samples_B)
        item_clusters.append(_nearest_centroids(vectors_BP, centroids_CP))
    selected_S, cluster_S = find_near_target(np.concatenate(item_samples), np.concatenate(item_clusters), target_T)

    if budget is not None:
        if budget > len(selected_S):
            raise DataError(
                f"budget: expected at most the {len(selected_S):,} of {len(pool.samples):,} samples in the "
                f"target's {len(set(target_T)):,} clusters, got {budget:,}; lower it, or give fewer clusters"
            )
        drawn_rows = draw_rows(selected_S, budget, seed=seed)
        cluster_S = cluster_S[np.searchsorted(selected_S, drawn_rows)]
        selected_S = drawn_rows
    counts_C = np.bincount(target_T)
    return Selection(rows=selected_S, columns={"cluster": cluster_S, "num_target_items": counts_C[cluster_S]})


def _nearest_centroids(vectors_NP: Floats, centroids_CP: Floats) -> Ints:
    nearest_N1, _ = knn(vectors_NP, centroids_CP, 1)
    return nearest_N1[:, 0]


def find_near_target(samples_N: Ints, clusters_N: Ints, target_T: Ints) -> tuple[Ints, Ints]:
    """Find the samples with an item in a cluster that holds an item of the target.

    Returns unique samples, ascending, (S,), and the cluster of each one's first such item, (S,).
    """
    inside = np.flatnonzero(np.isin(clusters_N, target_T))
    samples_S, first_S = np.unique(samples_N[inside], return_index=True)
    return samples_S, clusters_N[inside[first_S]]


_RATIO = 10
_BLOCK = 4096


def default_clusters(num_vectors: int) -> int:
    """Return the default number of clusters: one per 40 vectors, 10,000 at most."""
    return max(1, min(_MAX_CLUSTERS, num_vectors // _ITEMS_PER_CLUSTER))


def find_centroids(vectors_NP: Floats, num_clusters: int, *, seed: int, progress: Progress, device: str) -> Floats:
    """Cluster rows of length 1 by cosine similarity: (C, P) float32 rows of length 1.

    Raises `SettingError` if there are fewer vectors than clusters, and `MissingExtraError` without faiss.
    """
    if num_clusters > len(vectors_NP):
        raise SettingError(f"clusters: expected at most the {len(vectors_NP):,} vectors, got {num_clusters:,}")
    return normalize(
        spherical_kmeans(
            vectors_NP,
            num_clusters,
            seed=seed % 2**31,
            iterations=_ITERATIONS,
            max_per_cluster=_TRAINING_PER_CLUSTER,
            progress=progress,
            device=device,
        )
    )


def hierarchical(
    pool: Pool,
    *,
    budget: int,
    clusters: tuple[Count, ...] | None = None,
    seed: int = 0,
    device: str = AUTO,
) -> Selection:
    """Balance as "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (TMLR 2024).

    k-means on the samples, then on its centroids, and so on: `clusters` has their number on each level, finest first.
    From the top, the budget is divided equally among the branches; what small branches cannot use goes to the others,
    down to samples drawn at random. Unlike in the paper, no level is clustered again on the points nearest its
    centroids. A sample is represented by its first item.

    Memory: 256 vectors per finest cluster, and an integer per sample and level.
    """
    rows_S = pool.first_items()
    sizes = clusters or default_levels(len(rows_S))
    if any(finer <= coarser for finer, coarser in pairwise(sizes)):
        raise SettingError(
            f"clusters: expected fewer on each level than on the one before, got {'+'.join(map(str, sizes))}"
        )
    drawn = np.random.default_rng(seed).permutation(rows_S)[: _TRAINING_PER_CLUSTER * sizes[0]]
    vectors_NP = pool.vectors.read(np.sort(drawn), pool.progress)
    centroids = find_centroids(vectors_NP, sizes[0], seed=seed, progress=pool.progress, device=device)

    parts = (pool.vectors.read(rows_S[block]) for block in blocks(len(rows_S), _BLOCK))
    shown = watch(parts, pool.progress, "assigning to clusters", len(rows_S), "samples")
    leaf_S = np.concatenate([_nearest_centroids(vectors_BP, centroids) for vectors_BP in shown])
    labels_SL = build_tree(leaf_S, centroids, sizes[1:], seed=seed, device=device)
    chosen = draw_balanced(labels_SL, budget, seed=seed)

    columns = {f"cluster_{level}": labels_SL[chosen, -level] for level in range(1, labels_SL.shape[1] + 1)}
    columns["cluster_size"] = np.bincount(leaf_S)[leaf_S[chosen]]
    return Selection(rows=pool.samples[chosen], columns=columns)


def default_levels(num_samples: int) -> tuple[int, ...]:
    """Return the default levels: a cluster per 40 samples, and a tenth on each level above, while there are several."""
    sizes = [default_clusters(num_samples)]
    while sizes[-1] // _RATIO > 1:
        sizes.append(sizes[-1] // _RATIO)
    return tuple(sizes)


def build_tree(leaf_S: Ints, centroids_CP: Floats, sizes: Sequence[int], *, seed: int, device: str = AUTO) -> Ints:
    """Cluster the centroids of each level: (S, L) int64, cluster of each sample on each level, finest first."""
    labels = [leaf_S]
    for size in sizes:
        above_CP = find_centroids(centroids_CP, size, seed=seed, progress=NullProgress(), device=device)
        labels.append(_nearest_centroids(centroids_CP, above_CP)[labels[-1]])
        centroids_CP = above_CP
    return np.stack(labels, axis=1)


def draw_balanced(labels_SL: Ints, budget: int, *, seed: int) -> Ints:
    """Draw exactly `budget` samples equally from the branches of a tree, level by level: ascending positions.

    `labels_SL` has the cluster of each sample on each level, finest first.
    """
    rng = np.random.default_rng(seed)
    return np.sort(_draw(labels_SL[:, ::-1], rng.permutation(len(labels_SL)), budget, rng))


def divide_budget(sizes_C: Ints, budget: int) -> Ints:
    """Divide a budget as equally as the sizes allow: (C,) int64, their sum is the budget, none is above its size.

    The largest n with sum min(n, size) <= budget; the remainder goes one by one to the first that have more.
    """
    order = np.argsort(sizes_C, kind="stable")
    counts_C = np.zeros(len(sizes_C), np.int64)
    left = budget
    for position, branch in enumerate(order.tolist()):
        counts_C[branch] = min(int(sizes_C[branch]), left // (len(order) - position))
        left -= int(counts_C[branch])
    return counts_C


def _draw(labels_SL: Ints, rows: Ints, budget: int, rng: np.random.Generator) -> Ints:
    """Return `budget` of the shuffled rows; labels are coarsest first."""
    if budget >= len(rows) or not labels_SL.shape[1]:
        return rows[:budget]
    order = np.argsort(labels_SL[rows, 0], kind="stable")
    starts = np.unique(labels_SL[rows[order], 0], return_index=True)[1]
    branches = [rows[part] for part in np.split(order, starts[1:])]
    branches = [branches[index] for index in rng.permutation(len(branches))]  # which branches get one more is random
    counts_C = divide_budget(np.array([len(branch) for branch in branches]), budget)
    return np.concatenate(
        [_draw(labels_SL[:, 1:], branch, int(count), rng) for branch, count in zip(branches, counts_C, strict=True)]
    )


_CANDIDATES = 20_000


def k_center(pool: Pool, *, budget: int, candidates: Count | None = None, seed: int = 0) -> Selection:
    """Select the greedy k-center coreset of "Active Learning for Convolutional Neural Networks" (ICLR 2018), Alg. 1.

    It chooses from candidates drawn at random, by default 20,000 or twice the budget, as its time is
    budget x candidates, and starts from a random one. Noise is far from everything, so it is chosen early: clean the
    pool first. A sample is represented by its first item. Memory: the vectors of the candidates.
    """
    num_candidates = candidates or max(_CANDIDATES, 2 * budget)
    if num_candidates < budget:
        raise SettingError(f"candidates: expected at least the budget of {budget:,}, got {num_candidates:,}")
    drawn = np.random.default_rng(seed).permutation(len(pool.samples))[:num_candidates]
    vectors_NP = pool.vectors.read(pool.first_items()[drawn], pool.progress)
    chosen, cosines = farthest_first(vectors_NP, budget, progress=pool.progress)

    order = np.argsort(drawn[chosen])
    # A sample is compared with those that were chosen before it.
    columns = {"number": order + 1, "nearest_cosine": cosines[order]}
    return Selection(rows=pool.samples[drawn[chosen[order]]], columns=columns)


def farthest_first(vectors_NP: Floats, size: int, *, progress: Progress | None = None) -> tuple[Ints, Floats]:
    """Choose the first vector, then repeatedly the one that is farthest from all chosen ones.

    Returns `size` positions in the order of choice, and the cosine of each to the nearest one before it, -1 for the
    first. The cosines never decrease.
    """
    nearest_N = np.full(len(vectors_NP), -1, np.float32)
    chosen, cosines = np.empty(size, np.int64), np.empty(size, np.float32)
    position, progress = 0, progress or NullProgress()
    progress.start("choosing samples", size, "samples")
    for number in range(size):
        chosen[number], cosines[number] = position, nearest_N[position]
        nearest_N = np.maximum(nearest_N, vectors_NP @ vectors_NP[position])
        nearest_N[position] = np.inf
        position = int(nearest_N.argmin())
        progress.advance(1)
    progress.finish()
    return chosen, cosines
