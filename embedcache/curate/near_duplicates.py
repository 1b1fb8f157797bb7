"""Near-duplicates by cosine similarity: all pairs of items, or pairs within clusters and across near borders.

After "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", Abbas et al. 2023: k-means, then
all pairs within each cluster, which misses the pairs that a border between clusters separates. Here an item is also
compared with the members of the clusters whose border is nearest to it, and the recall of the pairs is measured by
comparing a random sample of items with all."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks, distinct
from embedcache.curate.settings import DedupSettings, OutlierSettings
from embedcache.dataset.clusters import (
    BLOCK,
    MAX_VISITS,
    ClusterAssigner,
    ClusterAssignment,
    Plan,
    concatenate_assignments,
    iterate_tiles,
    make_plan,
    scratch_matrix,
    to_float32,
)
from embedcache.dataset.similar_pairs import NeighborCollector, PairCollector, SimilarPairs, cosine_limit
from embedcache.devices import AUTO, products_on
from embedcache.errors import DataError
from embedcache.progress import NullProgress, Progress, watch
from embedcache.search.faiss_index import spherical_kmeans
from embedcache.search.vectors import Vectors, run_pass
from embedcache.store.rows import RowReader

ALL_PAIRS_LIMIT = 50_000  # up to this many items all pairs are compared: some ten seconds on two cores
MAX_PAIRS = 20_000_000
CANDIDATE_COSINES = (0.7, 0.8)  # images of closer pairs are read again; from the second on if there are too many
_NUM_PROBES = 1000
_ANY_COSINE = 0.0  # neighbors may be this far away, so that the nearest borders are crossed wherever they are
_ROUNDING = 1e-6  # two ways of summing one cosine in float32


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Pairs that were found, among all pairs above the limit that hold a drawn item."""

    num_items: int  # drawn and compared with all
    num_pairs: int  # true pairs above the limit
    num_found: int

    @property
    def value(self) -> float | None:
        """Fraction of the pairs that was found; None if there was none."""
        return self.num_found / self.num_pairs if self.num_pairs else None

    def to_json(self) -> dict[str, float | None]:
        """Return all values as JSON."""
        return {**asdict(self), "value": self.value}


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Near-duplicates among N items."""

    pairs: SimilarPairs  # of item numbers, from `limit` on
    limit: float  # above the requested cosine if there were too many pairs, infinite if there still are
    highest: Floats  # (N,) each item's largest cosine to another item; -2 if it was compared with none
    num_clusters: int  # 1 if all pairs were compared
    complete: float  # fraction of items whose near borders were all crossed; 1 means that no pair is missing
    recall: Recall | None  # None if all pairs were compared
    centroid_cosines: Floats | None  # (N,) to the item's own centroid; None if all pairs were compared


def find_near_duplicates(
    vectors: Vectors, rows_N: Ints, levels: Sequence[float], settings: DedupSettings, progress: Progress | None = None
) -> NearDuplicates:
    """Find the pairs of items whose cosine is at least `levels[0]`, which may rise to the next if there are too many.

    For `settings.pixels`, pairs of images are returned from the first of `CANDIDATE_COSINES` on, of those that are
    compared for `levels[0]`; the recall is that from `levels[0]` on.

    All pairs: every pair, N² / 2 products, `4 N P` bytes of scratch space. Clusters: nearly every pair (measured),
    about 10 N √N products with 2 √N clusters, `2 N P` bytes of scratch space in float16, whose rounding changes a
    cosine by 1e-5. Memory: pages of the scratch file, which the system may drop, about 200 bytes per item, and the
    pairs (at most 20 million, 0.5 GB). Deterministic for any number of workers.

    Raises:
        DataError: a vector is of length zero or not finite.
        DiskFullError: the scratch file does not fit.
        MissingExtraError: faiss is needed for clusters, or Ray for its engine, and is not installed.
    """
    progress = progress or NullProgress()
    candidates = CANDIDATE_COSINES if settings.pixels and vectors.modality == "image" else ()
    with _arrange(vectors, rows_N, levels[0], settings, progress) as arranged:
        collector = PairCollector(len(rows_N), sorted({*candidates, *levels}), MAX_PAIRS)
        _compare(arranged, collector, vectors.device, progress)
        pairs = collector.pairs()
        limit = max(collector.limit, levels[0])
        recall = None if arranged.is_exact else _measure_recall(arranged, pairs, limit, settings, progress)
    return NearDuplicates(
        pairs=pairs,
        limit=collector.limit,
        highest=collector.highest,
        num_clusters=arranged.num_clusters,
        complete=arranged.complete,
        recall=recall,
        centroid_cosines=arranged.centroid_cosines,
    )


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The K other items that are most similar to each of N items, best first."""

    items: Array  # (N, K) int32 item numbers; -1 where fewer were compared
    cosines: Floats  # (N, K); -2 where there is none
    num_clusters: int  # 1 if all pairs were compared
    recall: Recall | None  # of the K nearest of drawn items; None if all pairs were compared


def find_neighbors(
    vectors: Vectors,
    rows_N: Ints,
    k: int,
    settings: DedupSettings | OutlierSettings,
    progress: Progress | None = None,
) -> Neighbors:
    """Find the K nearest neighbors of each item: of all others, or of those in its cluster and near its borders.

    Time, scratch space and errors as in `find_near_duplicates`; memory 8 K bytes per item in place of the pairs.
    """
    progress = progress or NullProgress()
    with _arrange(vectors, rows_N, _ANY_COSINE, settings, progress) as arranged:
        collector = NeighborCollector(len(rows_N), k)
        _compare(arranged, collector, vectors.device, progress)
        recall = None if arranged.is_exact else _measure_neighbor_recall(arranged, collector, settings, progress)
    return Neighbors(
        items=collector.items, cosines=collector.cosines, num_clusters=arranged.num_clusters, recall=recall
    )


@dataclass(frozen=True, kw_only=True)
class _Arranged:
    """Vectors in a scratch file, cluster by cluster."""

    matrix_NP: Array
    plan: Plan
    is_exact: bool
    complete: float
    centroid_cosines: Floats | None

    @property
    def num_clusters(self) -> int:
        return len(self.plan.starts) - 1


@contextmanager
def _arrange(
    vectors: Vectors, rows_N: Ints, cosine: float, settings: DedupSettings | OutlierSettings, progress: Progress
) -> Iterator[_Arranged]:
    """Write the vectors to a scratch file in the order in which they are compared, for neighbors of such a cosine."""
    is_exact = len(rows_N) <= ALL_PAIRS_LIMIT if settings.all_pairs is None else settings.all_pairs
    assignment = None if is_exact else assign_clusters(vectors, rows_N, cosine, settings, progress)
    plan = make_plan(assignment, len(rows_N))
    complete = 1.0 if assignment is None else float(assignment.is_complete.mean())
    centroid_cosines = None if assignment is None else assignment.cosines
    del assignment  # the clusters that each item visits are in the plan
    dtype = np.float32 if is_exact else np.float16
    with scratch_matrix(settings.scratch, (len(rows_N), vectors.width), dtype) as matrix_NP:
        _fill(matrix_NP, vectors, rows_N, plan, progress)
        yield _Arranged(
            matrix_NP=matrix_NP, plan=plan, is_exact=is_exact, complete=complete, centroid_cosines=centroid_cosines
        )


_KMEANS_ITERATIONS = 10
_TRAINING_PER_CLUSTER = 40  # FAISS asks for 39 at least


def assign_clusters(
    vectors: Vectors,
    rows_N: Ints,
    cosine: float,
    settings: DedupSettings | OutlierSettings,
    progress: Progress | None = None,
) -> ClusterAssignment:
    """Assign items to 2 √N clusters; errors as in `find_near_duplicates`."""
    rng = np.random.default_rng(settings.seed)
    num_clusters = round(2 * math.sqrt(len(rows_N)))
    training_rows = np.sort(rng.permutation(rows_N)[: _TRAINING_PER_CLUSTER * num_clusters])
    progress = progress or NullProgress()
    opened_anew = copy.copy(vectors)  # so that its maps of the whole feature are freed
    training = opened_anew.read(training_rows, progress)
    del opened_anew
    _check_lengths(training, training_rows, vectors)
    centroids_KP = fit_centroids(training, num_clusters, seed=settings.seed, device=vectors.device, progress=progress)
    work = ClusterAssigner(centroids_KP, cosine, MAX_VISITS, _mask(rows_N, vectors))
    title = f"assigning to {len(centroids_KP):,} clusters"
    parts = run_pass(vectors, work, engine=settings.engine, address=settings.address, title=title, progress=progress)
    return concatenate_assignments(parts)


def fit_centroids(
    training_SP: Floats, num_clusters: int, *, seed: int, progress: Progress, device: str = AUTO
) -> Floats:
    """Fit spherical k-means: (K, P) float32 rows of length 1, K at most the number of vectors."""
    count = min(num_clusters, len(training_SP))
    return spherical_kmeans(
        training_SP,
        count,
        seed=seed,
        iterations=_KMEANS_ITERATIONS,
        max_per_cluster=_TRAINING_PER_CLUSTER,
        progress=progress,
        device=device,
    )


def _fill(matrix_NP: Array, vectors: Vectors, rows_N: Ints, plan: Plan, progress: Progress) -> None:
    """Write each vector to its position."""
    mask_N, position_N = _mask(rows_N, vectors), np.empty(len(rows_N), np.int64)
    position_N[plan.items] = np.arange(len(rows_N))
    num_written = 0
    for rows, vectors_BP in vectors.blocks("sorting", progress):
        kept_BP = vectors_BP[mask_N[rows]]
        _check_lengths(kept_BP, rows[mask_N[rows]], vectors)
        matrix_NP[position_N[num_written : num_written + len(kept_BP)]] = kept_BP
        num_written += len(kept_BP)


def _mask(rows_N: Ints, vectors: Vectors) -> Bools:
    mask_N = np.zeros(vectors.feature.num_items, bool)
    mask_N[rows_N] = True
    return mask_N


def _check_lengths(vectors_BP: Floats, rows_B: Ints, vectors: Vectors) -> None:
    squares_B = np.einsum("bp,bp->b", vectors_BP, vectors_BP)
    bad = np.flatnonzero(np.rint(squares_B) != 1)
    if len(bad):
        item = RowReader(vectors.cache, vectors.modality, ["sample"]).take(rows_B[bad[:1]])
        key = vectors.cache.key(item["sample"][0].as_py())
        raise DataError(
            f"feature {vectors.feature.name}: expected vectors that have a cosine, got {len(bad):,} of length zero or "
            f"NaN in one chunk, first that of the sample {key!r}; copy the others with: embedcache cache cut, or "
            "remove these with: embedcache cache remove"
        )


def _compare(
    arranged: _Arranged, collector: PairCollector | NeighborCollector, device: str, progress: Progress
) -> None:
    progress.start("comparing", len(arranged.matrix_NP), "items")
    for tile, num_done in iterate_tiles(arranged.matrix_NP, arranged.plan, products=products_on(device)):
        collector.add(tile)
        progress.advance(num_done)
    progress.finish()


def _draw_probes(matrix_NP: Array, seed: int) -> tuple[Ints, Floats]:
    positions = np.sort(np.random.default_rng(seed).permutation(len(matrix_NP))[:_NUM_PROBES])
    return positions, to_float32(matrix_NP[positions])


def _probed_blocks(matrix_NP: Array, progress: Progress) -> Iterator[slice]:
    return watch(blocks(len(matrix_NP), BLOCK), progress, "measuring the recall", len(matrix_NP), "items")


def _measure_neighbor_recall(
    arranged: _Arranged, collector: NeighborCollector, settings: DedupSettings | OutlierSettings, progress: Progress
) -> Recall:
    """Compare random items with all, and count how many of their nearest neighbors were found."""
    matrix_NP, items_N = arranged.matrix_NP, arranged.plan.items
    positions, probes_QP = _draw_probes(matrix_NP, settings.seed)
    k = collector.items.shape[1]
    true_QK, cosines_QK = np.full((len(positions), k), -1), np.full((len(positions), k), -np.inf, np.float32)
    for block in _probed_blocks(matrix_NP, progress):
        cosines = probes_QP @ to_float32(matrix_NP[block]).T
        own = np.flatnonzero((positions >= block.start) & (positions < block.stop))
        cosines[own, positions[own] - block.start] = -np.inf
        joined = np.concatenate([cosines_QK, cosines], axis=1)
        best = np.argpartition(joined, -k, axis=1)[:, -k:]
        true_QK = np.where(
            best < k, np.take_along_axis(true_QK, best % k, axis=1), items_N[block][np.maximum(best - k, 0)]
        )
        cosines_QK = np.take_along_axis(joined, best, axis=1)
    found = items_N[positions]
    is_found = (collector.items[found][:, None, :] == true_QK[:, :, None]).any(axis=2)
    is_found |= cosines_QK <= collector.cosines[found][:, -1:] + _ROUNDING  # another one of the same cosine
    return Recall(num_items=len(positions), num_pairs=is_found.size, num_found=int(is_found.sum()))


def _measure_recall(
    arranged: _Arranged,
    pairs: SimilarPairs,
    limit: float,
    settings: DedupSettings | OutlierSettings,
    progress: Progress,
) -> Recall:
    """Compare random items with all, and count how many of their pairs were found."""
    matrix_NP, plan = arranged.matrix_NP, arranged.plan
    num_items = len(matrix_NP)
    probe_positions, probes_QP = _draw_probes(matrix_NP, settings.seed)
    true_keys = []
    for block in _probed_blocks(matrix_NP, progress):
        cosines = probes_QP @ to_float32(matrix_NP[block]).T
        query, other = np.nonzero(cosines >= cosine_limit(limit) + _ROUNDING)
        left, right = plan.items[probe_positions[query]], plan.items[other + block.start]
        is_pair = left != right
        true_keys.append((np.minimum(left, right) * num_items + np.maximum(left, right))[is_pair])
    true = distinct(np.concatenate(true_keys))
    is_found = np.isin(true, pairs.left * num_items + pairs.right)
    return Recall(num_items=len(probe_positions), num_pairs=len(true), num_found=int(is_found.sum()))
