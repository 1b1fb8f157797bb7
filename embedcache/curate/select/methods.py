"""Methods of selection, which are baselines or use clusters of vectors or concepts."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from pydantic import Field

from embedcache.arrays import Array, Bools, Floats, Ints, blocks, distinct, normalize
from embedcache.curate.select.select import Pool
from embedcache.dataset.selections import Score, Selection
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, SettingError
from embedcache.neighbors.knn import KBest, knn
from embedcache.processes import AUTO
from embedcache.progress import NullProgress, Progress, watch
from embedcache.search.concepts import Concepts
from embedcache.search.faiss_index import spherical_kmeans

Cosine: TypeAlias = Annotated[float, Field(ge=-1, le=1)]
Count: TypeAlias = Annotated[int, Field(ge=1)]

_ITERATIONS = 20
_TRAINING_PER_CLUSTER = 256  # vectors that k-means trains on at most
_ITEMS_PER_CLUSTER = 40
_MAX_CLUSTERS = 10_000
_RATIO = 10
_BLOCK = 4096
_CANDIDATES = 20_000  # of the coreset
_CANDIDATES_PER_SAMPLE = 25
_CONCEPTS_PER_BLOCK = 32
_WORD = re.compile(r"\w+")


def random_draw(pool: Pool, *, budget: int, seed: int = 0) -> Selection:
    """Select a random sample of the pool, the baseline that every method must beat."""
    return Selection(rows=draw_rows(pool.samples, budget, seed=seed))


def draw_rows(samples_S: Ints, size: int, *, seed: int) -> Ints:
    """Draw `size` of some samples without replacement, or all if there are no more: ascending."""
    return np.sort(np.random.default_rng(seed).permutation(samples_S)[:size])


def top_score(pool: Pool, *, concepts: Concepts, budget: int) -> Selection:
    """Select the samples whose best cosine with any concept is highest, however unevenly over concepts.

    Memory: a score and a concept per sample.
    """
    best_scores = []
    best_concepts = []
    for samples_B, vectors_BP in whole_samples(pool.blocks("comparing with concepts")):
        _, starts_S = np.unique(samples_B, return_index=True)
        scores_SC = np.maximum.reduceat(compute_cosines(vectors_BP, concepts.vectors), starts_S, axis=0)
        best_scores.append(scores_SC.max(axis=1))
        best_concepts.append(scores_SC.argmax(axis=1))
    scores_S = np.concatenate(best_scores)
    concept_S = np.concatenate(best_concepts)

    # Positions in `scores_S` are positions in `pool.samples`, as both ascend by sample.
    chosen = find_highest(scores_S, budget)
    names = pa.array(concepts.names, pa.string())
    columns = {"concept": names.take(pa.array(concept_S[chosen])), "cosine": scores_S[chosen]}
    return Selection(rows=pool.samples[chosen], columns=columns)


def find_highest(scores_S: Array, size: int) -> Ints:
    """Return ascending positions of the `size` highest scores, or of all scores. Ties go to the first positions."""
    return np.sort(np.argsort(-scores_S, kind="stable")[:size])


def clip_score(pool: Pool, *, run: Path | str, budget: int | None = None, threshold: Cosine | None = None) -> Selection:
    """Select by the CLIP-score filter of "DataComp" (NeurIPS 2023): the best cosine of a sample's images and captions.

    With a run of other modalities, the items of these modalities are compared. The run must not have been trained on
    the test data. Its own training pairs score higher than others. Memory: a score per sample.
    """
    del run  # the pool has opened it, and projects its vectors
    check_one(budget=budget, threshold=threshold)
    samples_M, scores_M = pool.pair_scores()

    if budget is None:
        assert threshold is not None
        chosen = find_above(scores_M, threshold)
    elif budget > len(samples_M):
        raise DataError(f"budget: expected at most the {len(samples_M):,} samples with both, got {budget:,}")
    else:
        chosen = find_highest(scores_M, budget)
    return Selection(rows=samples_M[chosen], columns={"cosine": scores_M[chosen]})


def check_one(**arguments: object) -> None:
    """Raise `SettingError` unless exactly one of the arguments is given."""
    names = [name for name, value in arguments.items() if value is not None]
    if len(names) != 1:
        expected = " or ".join("--budget" if name == "budget" else f"the parameter {name}" for name in arguments)
        raise SettingError(f"expected either {expected}, got {' and '.join(names) or 'none'}")


def find_above(scores_M: Floats, threshold: float) -> Ints:
    """Return ascending positions of the scores of at least a threshold.

    Raises `DataError` with the range of the scores if none reaches it.
    """
    chosen: Ints = np.flatnonzero(scores_M >= threshold)
    if not len(chosen):
        low, middle, high = np.quantile(scores_M, [0, 0.5, 1])
        raise DataError(
            f"threshold: expected one that some of {len(scores_M):,} cosines reach, got {threshold}; they range "
            f"from {low:.3f} to {high:.3f}, half of them above {middle:.3f}"
        )
    return chosen


def by_score(
    pool: Pool,
    *,
    scores: Score,
    budget: int | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Selection:
    """Select samples whose score in a table lies within bounds. With a budget, select the highest of these scores.

    Memory: the table of scores.
    """
    if budget is None and at_least is None and at_most is None:
        raise SettingError("--method score: expected --budget or a parameter at_least or at_most, got none")

    scores_S = scores.values[pool.samples]
    low = -np.inf if at_least is None else at_least
    high = np.inf if at_most is None else at_most
    bounds = np.array([low, high], scores_S.dtype)  # rounded as the scores are
    inside = np.flatnonzero((scores_S >= bounds[0]) & (scores_S <= bounds[1]))

    if len(inside) < (budget or 1):
        lowest, middle, highest = np.quantile(scores_S, [0, 0.5, 1])
        expected = "a sample" if budget is None else f"{budget:,} samples"
        raise DataError(
            f"expected {expected} with {scores.name} from {low:g} to {high:g}, got {len(inside):,} of "
            f"{len(scores_S):,}; it ranges from {lowest:.4g} to {highest:.4g}, and half of them are above {middle:.4g}"
        )
    if budget is not None:
        inside = inside[find_highest(scores_S[inside], budget)]
    return Selection(rows=pool.samples[inside], columns={scores.name: scores_S[inside]})


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

    The pool is divided into clusters, by default one per 40 samples. The samples in clusters with an item of the target
    are selected, or, with a budget, a random part of them. The target must not contain test data.

    Memory: 256 vectors per cluster, and two integers per item.
    """
    num_clusters = clusters or default_clusters(len(pool.samples))
    training_MP = pool.sample(_TRAINING_PER_CLUSTER * num_clusters, seed=seed)
    centroids_CP = find_centroids(training_MP, num_clusters, seed=seed, progress=pool.progress, device=device)

    target_blocks = target.blocks("assigning the target to clusters", pool.progress)
    target_N = np.concatenate([_nearest_centroids(vectors_BP, centroids_CP) for _, vectors_BP in target_blocks])

    item_samples = []
    item_clusters = []
    for samples_B, vectors_BP in pool.blocks("assigning to clusters"):
        item_samples.append(samples_B)
        item_clusters.append(_nearest_centroids(vectors_BP, centroids_CP))
    selected_S, cluster_S = find_near_target(np.concatenate(item_samples), np.concatenate(item_clusters), target_N)

    if budget is not None:
        if budget > len(selected_S):
            raise DataError(
                f"budget: expected at most the {len(selected_S):,} of {len(pool.samples):,} samples in the "
                f"target's {len(set(target_N)):,} clusters, got {budget:,}; lower it, or give fewer clusters"
            )
        drawn_rows = draw_rows(selected_S, budget, seed=seed)
        cluster_S = cluster_S[np.searchsorted(selected_S, drawn_rows)]
        selected_S = drawn_rows

    counts_C = np.bincount(target_N)
    return Selection(rows=selected_S, columns={"cluster": cluster_S, "num_target_items": counts_C[cluster_S]})


def _nearest_centroids(vectors_NP: Floats, centroids_CP: Floats) -> Ints:
    nearest_N1, _ = knn(vectors_NP, centroids_CP, 1)
    return nearest_N1[:, 0]


def find_near_target(samples_N: Ints, clusters_N: Ints, target_N: Ints) -> tuple[Ints, Ints]:
    """Find the samples with an item in a cluster that contains an item of the target.

    Returns unique samples, ascending, (S,), and the cluster of each one's first such item, (S,).
    """
    inside = np.flatnonzero(np.isin(clusters_N, target_N))
    samples_S, first_S = np.unique(samples_N[inside], return_index=True)
    return samples_S, clusters_N[inside[first_S]]


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

    k-means runs on the samples, then on its centroids, and so on. `clusters` has the number of clusters on each level,
    finest first. From the top, the budget is divided equally among the branches. The rest that small branches cannot
    use goes to the others. Within a finest cluster, samples are drawn at random. Unlike in the paper, no level is
    clustered again on the points nearest its centroids. A sample is represented by its first item.

    Memory: 256 vectors per finest cluster, and an integer per sample and level.
    """
    rows_S = pool.first_items()
    sizes = clusters or default_levels(len(rows_S))
    if any(finer <= coarser for finer, coarser in pairwise(sizes)):
        raise SettingError(f"clusters: expected fewer on each level, got {'+'.join(map(str, sizes))}")

    # k-means trains on a sample; then every sample of the pool gets its nearest centroid.
    drawn = np.random.default_rng(seed).permutation(rows_S)[: _TRAINING_PER_CLUSTER * sizes[0]]
    vectors_NP = pool.vectors.read(np.sort(drawn), pool.progress)
    centroids = find_centroids(vectors_NP, sizes[0], seed=seed, progress=pool.progress, device=device)

    parts = (pool.vectors.read(rows_S[block]) for block in blocks(len(rows_S), _BLOCK))
    shown = watch(parts, pool.progress, "assigning to clusters", len(rows_S), "samples")
    leaf_S = np.concatenate([_nearest_centroids(vectors_BP, centroids) for vectors_BP in shown])
    labels_SL = build_tree(leaf_S, centroids, sizes[1:], seed=seed, device=device)
    chosen = draw_balanced(labels_SL, budget, seed=seed)

    # Columns are numbered from the coarsest level, so that `cluster_1` is always the top.
    columns = {f"cluster_{level}": labels_SL[chosen, -level] for level in range(1, labels_SL.shape[1] + 1)}
    columns["cluster_size"] = np.bincount(leaf_S)[leaf_S[chosen]]
    return Selection(rows=pool.samples[chosen], columns=columns)


def default_levels(num_samples: int) -> tuple[int, ...]:
    """Return the default levels: a cluster per 40 samples, then a tenth on each level above, down to at least two."""
    sizes = [default_clusters(num_samples)]
    while sizes[-1] // _RATIO > 1:
        sizes.append(sizes[-1] // _RATIO)
    return tuple(sizes)


def build_tree(leaf_S: Ints, centroids_CP: Floats, sizes: Sequence[int], *, seed: int, device: str = AUTO) -> Ints:
    """Cluster the centroids of each level: (S, L) int64, cluster of each sample on each level, finest first."""
    labels = [leaf_S]
    for size in sizes:
        coarser_CP = find_centroids(centroids_CP, size, seed=seed, progress=NullProgress(), device=device)
        labels.append(_nearest_centroids(centroids_CP, coarser_CP)[labels[-1]])
        centroids_CP = coarser_CP
    return np.stack(labels, axis=1)


def draw_balanced(labels_SL: Ints, budget: int, *, seed: int) -> Ints:
    """Draw exactly `budget` samples equally from the branches of a tree, level by level: ascending positions.

    `labels_SL` has the cluster of each sample on each level, finest first.
    """
    rng = np.random.default_rng(seed)
    return np.sort(_draw(labels_SL[:, ::-1], rng.permutation(len(labels_SL)), budget, rng))


def divide_budget(sizes_C: Ints, budget: int) -> Ints:
    """Divide a budget as equally as the sizes allow: (C,) int64. The sum is the budget, and no part exceeds its size.

    Each part gets min(n, size) with the largest n whose sum is within the budget. The largest parts share the
    remainder.
    """
    order = np.argsort(sizes_C, kind="stable")
    counts_C = np.zeros(len(sizes_C), np.int64)
    remainder = budget

    # From the smallest branch: the part that it cannot use is divided among the larger ones.
    for position, branch in enumerate(order.tolist()):
        counts_C[branch] = min(int(sizes_C[branch]), remainder // (len(order) - position))
        remainder -= int(counts_C[branch])
    return counts_C


def _draw(labels_SL: Ints, rows: Ints, budget: int, rng: np.random.Generator) -> Ints:
    """Return `budget` of the shuffled rows; labels are coarsest first."""
    if budget >= len(rows) or not labels_SL.shape[1]:
        return rows[:budget]

    order = np.argsort(labels_SL[rows, 0], kind="stable")
    starts = np.unique(labels_SL[rows[order], 0], return_index=True)[1]
    branches = [rows[part] for part in np.split(order, starts[1:])]

    # The branches that get one more are drawn at random.
    branches = [branches[index] for index in rng.permutation(len(branches))]
    counts_C = divide_budget(np.array([len(branch) for branch in branches]), budget)
    return np.concatenate(
        [_draw(labels_SL[:, 1:], branch, int(count), rng) for branch, count in zip(branches, counts_C, strict=True)]
    )


def k_center(pool: Pool, *, budget: int, candidates: Count | None = None, seed: int = 0) -> Selection:
    """Select the greedy k-center coreset of "Active Learning for Convolutional Neural Networks" (ICLR 2018), Alg. 1.

    It starts from a random candidate. Candidates are drawn at random, by default 20,000 or twice the budget, as the
    time is budget x candidates. Noise is far from everything, so it is chosen early. Clean the pool first. A sample is
    represented by its first item. Memory: the vectors of the candidates.
    """
    num_candidates = candidates or max(_CANDIDATES, 2 * budget)
    if num_candidates < budget:
        raise SettingError(f"candidates: expected at least the budget of {budget:,}, got {num_candidates:,}")
    drawn = np.random.default_rng(seed).permutation(len(pool.samples))[:num_candidates]
    vectors_NP = pool.vectors.read(pool.first_items()[drawn], pool.progress)
    chosen, cosines = farthest_first(vectors_NP, budget, progress=pool.progress)

    # A sample is compared with the samples chosen before it, so its number gives the cosine a meaning.
    order = np.argsort(drawn[chosen])
    columns = {"number": order + 1, "nearest_cosine": cosines[order]}
    return Selection(rows=pool.samples[drawn[chosen[order]]], columns=columns)


def farthest_first(vectors_NP: Floats, size: int, *, progress: Progress | None = None) -> tuple[Ints, Floats]:
    """Choose the first vector, then repeatedly the one that is farthest from all chosen ones.

    Returns `size` positions in the order of choice, and the cosine of each to the nearest one before it, -1 for the
    first. The cosines never decrease.
    """
    nearest_N = np.full(len(vectors_NP), -1, np.float32)
    chosen = np.empty(size, np.int64)
    cosines = np.empty(size, np.float32)
    position = 0

    progress = progress or NullProgress()
    progress.start("choosing samples", size, "samples")
    for number in range(size):
        chosen[number] = position
        cosines[number] = nearest_N[position]

        # A chosen vector is as near as can be, so it is not chosen again.
        nearest_N = np.maximum(nearest_N, vectors_NP @ vectors_NP[position])
        nearest_N[position] = np.inf
        position = int(nearest_N.argmin())
        progress.advance(1)
    progress.finish()
    return chosen, cosines


def rare_first(
    pool: Pool, *, concepts: Concepts, budget: int | None = None, per_concept: Count | None = None
) -> Selection:
    """Curate as "Harnessing Frozen Unimodal Encoders for Flexible Multimodal Alignment" (CVPR 2025).

    Select about n samples per concept, each sample once. As in the paper, a concept's candidates are the 25 n samples
    that match it best, and concepts choose one after another, the rarest first. Unlike in the paper's code, a concept's
    rarity is its score at rank n and not the score of its last candidate, whose rank depends on memory. Cosines are
    float32, not in steps of .0027. Memory: 8 bytes for each of C x 25 n candidates, and 25 n vectors.
    """
    check_one(budget=budget, per_concept=per_concept)
    num_concepts = len(concepts.names)
    quotas_C = np.full(num_concepts, per_concept) if budget is None else even_quotas(budget, num_concepts)
    largest_quota = int(quotas_C.max())
    k = min(len(pool.samples), _CANDIDATES_PER_SAMPLE * largest_quota)
    best = best_samples(pool.blocks("comparing with concepts"), concepts.vectors, k)

    # Quotas follow the order, so that the rarest concepts get one more if there is a remainder.
    order_C = rarest_first(best.scores, largest_quota)
    concept_M, rank_M = assign(best.numbers, order_C, quotas_C[np.argsort(order_C)])

    rows_M = best.numbers[concept_M, rank_M].astype(np.int64)
    by_row = np.argsort(rows_M)
    columns = {
        "concept": pa.array(concepts.names, pa.string()).take(pa.array(concept_M[by_row])),
        "cosine": best.scores[concept_M, rank_M][by_row],
        "rank": rank_M[by_row] + 1,
    }
    return Selection(rows=rows_M[by_row], columns=columns)


def even_quotas(budget: int, num_concepts: int) -> Ints:
    """Divide a budget equally, one more for the first concepts if there is a remainder: (C,) int64."""
    return budget // num_concepts + (np.arange(num_concepts) < budget % num_concepts).astype(np.int64)


def best_samples(items: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> KBest:
    """Find the `k` best samples of each concept, by cosine. A sample counts once, by its best item.

    The result is exact for any division of the items into blocks. A block is the sample of each item (B,), ascending
    over all blocks, and its vector (B, P). Memory: 8 bytes for each of C x K candidates, and K vectors with their
    products with 32 concepts. It does not grow with the number of items.
    """
    best = KBest(len(concepts_CP), k)
    for samples_B, vectors_BP in whole_samples(items, k):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        for block in blocks(len(concepts_CP), _CONCEPTS_PER_BLOCK):
            cosines_CB = compute_cosines(concepts_CP[block], vectors_BP)
            scores_CS = np.maximum.reduceat(cosines_CB, starts_S, axis=1)
            best.add_block(np.arange(block.start, block.stop), samples_S, scores_CS)
    return best


def rarest_first(scores_CK: Floats, quota: int) -> Ints:
    """Sort concepts by their score at rank `quota`, or at their last rank, lowest first: (C,) int64."""
    return np.argsort(scores_CK[:, min(quota, scores_CK.shape[1]) - 1], kind="stable")


def assign(samples_CK: Ints, order_C: Ints, quota_C: Ints) -> tuple[Ints, Ints]:
    """Assign to each concept, in order, at most `quota_C` of its best candidates that no other concept has.

    Returns two (M,) arrays: the concept that chose, and the rank of its candidate, from 0.
    """
    is_assigned: Bools = np.zeros(int(samples_CK.max()) + 1, bool)
    concepts = []
    ranks = []
    for concept in order_C.tolist():
        ranks_M = np.flatnonzero(~is_assigned[samples_CK[concept]])[: quota_C[concept]]
        is_assigned[samples_CK[concept, ranks_M]] = True
        concepts.append(np.full(len(ranks_M), concept))
        ranks.append(ranks_M)
    return np.concatenate(concepts), np.concatenate(ranks)


def metaclip(
    pool: Pool,
    *,
    concepts: Concepts,
    budget: int | None = None,
    head: Annotated[float, Field(ge=1)] | None = None,
    threshold: Cosine | None = None,
    seed: int = 0,
) -> Selection:
    """Balance as "Demystifying CLIP Data" (ICLR 2024), Algorithm 1.

    Samples match concepts by the words of their captions or, with `threshold`, by cosine. Each match of a concept with
    n matches is kept with probability min(1, t / n). A sample is kept if any of its matches is kept. t is `head`, or
    the value that keeps `budget` samples. A sample that matches no concept is never kept. Memory: some 50 bytes per
    match.
    """
    check_one(budget=budget, head=head)
    names = concepts.names
    if threshold is None:
        matches = match_words(pool.texts(), names)
        step = "match by cosine with the parameter threshold"
    else:
        matches = match_near(pool.blocks("comparing with concepts"), concepts.vectors, threshold)
        step = "lower the threshold"
    if not len(matches.samples_M):
        raise DataError(
            f"expected samples that match one of {len(names):,} concepts, such as {names[0]!r}, got none of "
            f"{len(pool.samples):,}; {step}, or give other concepts"
        )

    first_matches_S, heads_S = lowest_heads(matches, seed=seed)
    if budget is None:
        matches_S = first_matches_S[heads_S < head]
    elif budget > len(first_matches_S):
        raise DataError(
            f"budget: expected at most the {len(first_matches_S):,} of {len(pool.samples):,} samples that match one of "
            f"{len(names):,} concepts, got {budget:,}; lower it, or {step}"
        )
    else:
        matches_S = first_matches_S[np.argsort(heads_S, kind="stable")[:budget]]

    matches_S = np.sort(matches_S)  # matches are sorted by sample
    concepts_S = matches.concepts_M[matches_S]
    columns = {
        "concept": pa.array(names, pa.string()).take(pa.array(concepts_S)),
        "num_matches": np.bincount(matches.concepts_M)[concepts_S],
    }
    return Selection(rows=matches.samples_M[matches_S], columns=columns)


class Matches(NamedTuple):
    """M unique matches, sorted by sample and then concept: two (M,) int64 arrays."""

    samples_M: Ints
    concepts_M: Ints


def match_words(captions: Iterable[tuple[Ints, Sequence[str]]], names: Sequence[str]) -> Matches:
    """Match captions that contain a concept's name as whole words, ignoring case and punctuation.

    Like the substring match of "Demystifying CLIP Data" (ICLR 2024), it matches neither plurals nor languages without
    spaces. Names of the same words match the same captions, and a name without words matches none. Memory: the captions
    of a block, the names, and 16 bytes per match.

    Args:
        captions: the sample of each caption (B,), and the captions, per block.
        names: names of the concepts.
    """
    # Each beginning of a name leads to the concepts that end there, so that a search can stop early.
    concepts_of: dict[tuple[str, ...], list[int]] = {}
    for concept, name in enumerate(names):
        words = _words(name)
        for length in range(1, len(words)):
            concepts_of.setdefault(words[:length], [])
        if words:
            concepts_of.setdefault(words, []).append(concept)

    codes = [np.empty(0, np.int64)]
    for samples_B, texts in captions:
        concepts: list[int] = []
        counts = []
        for text in texts:
            caption_concepts = _find_names(_words(text), concepts_of)
            concepts += caption_concepts
            counts.append(len(caption_concepts))
        codes.append(distinct(np.repeat(samples_B, counts) * len(names) + np.array(concepts, np.int64)))
    return Matches(*np.divmod(distinct(np.concatenate(codes)), max(1, len(names))))


def _find_names(words: tuple[str, ...], concepts_of: Mapping[tuple[str, ...], Sequence[int]]) -> list[int]:
    """Return the concepts whose names occur in the words, once per occurrence."""
    matches: list[int] = []
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            concepts = concepts_of.get(words[start:stop])
            if concepts is None:
                break
            matches += concepts
    return matches


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def match_near(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, threshold: float) -> Matches:
    """Match items whose cosine with a concept is at least a threshold.

    Memory: the products of a block, and 16 bytes per match.

    Args:
        blocks: samples (B,) and vectors (B, P) of the items.
        concepts_CP: vectors of the concepts.
        threshold: smallest cosine of a match.
    """
    matches = [np.empty((0, 2), np.int64)]
    for samples_B, vectors_BP in blocks:
        item, concept = np.nonzero(compute_cosines(vectors_BP, concepts_CP) >= threshold)
        matches.append(np.stack([samples_B[item], concept], axis=1))
    return Matches(*np.unique(np.concatenate(matches), axis=0).T)


def lowest_heads(matches: Matches, *, seed: int) -> tuple[Ints, Array]:
    """Find the smallest t that keeps each sample, and the match that keeps it.

    A match of a concept with n matches is kept if its draw u, uniform in [0, 1), is below t / n, that is if t > u n. So
    one draw gives nested selections for all t, and any budget is met exactly. Returns two arrays by sample: the
    position in the matches of the first match that is kept, (S,), and its t, (S,) float64.
    """
    counts_C = np.bincount(matches.concepts_M)
    heads_M = np.random.default_rng(seed).random(len(matches.samples_M)) * counts_C[matches.concepts_M]
    order_M = np.lexsort((heads_M, matches.samples_M))
    _, starts_S = np.unique(matches.samples_M[order_M], return_index=True)
    first_matches_S: Ints = order_M[starts_S]
    return first_matches_S, heads_M[first_matches_S]


def compute_cosines(left_QP: Floats, right_CP: Floats) -> Floats:
    """Compute cosines of rows of length 1: (Q, C) float32, summed in float64.

    Sums in float32 depend on the other rows of a block; in float64, equal vectors get equal cosines.
    """
    return (left_QP.astype(np.float64) @ right_CP.astype(np.float64).T).astype(np.float32)


def whole_samples(blocks: Iterable[tuple[Ints, Floats]], size: int = 1) -> Iterator[tuple[Ints, Floats]]:
    """Divide blocks of items anew, so that all items of a sample are in one block.

    A block has at least `size` items, except the last one. Memory: `size` items, or a block.
    """
    pending: list[tuple[Ints, Floats]] = []
    for samples, vectors in blocks:
        pending.append((samples, vectors))
        if sum(len(part) for part, _ in pending) <= size or not len(samples):
            continue

        # The last sample may go on in the next block, so its items wait.
        samples_B, vectors_BP = map(np.concatenate, zip(*pending, strict=True))
        last = int(np.searchsorted(samples_B, samples_B[-1]))
        if last:
            yield samples_B[:last], vectors_BP[:last]
        pending = [(samples_B[last:], vectors_BP[last:])]
    if pending:
        samples_B, vectors_BP = map(np.concatenate, zip(*pending, strict=True))
        yield samples_B, vectors_BP
