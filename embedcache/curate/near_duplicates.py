"""Near-duplicates by cosine similarity: all pairs of items, or pairs within clusters and across near borders.

After "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", Abbas et al. 2023: k-means, then
all pairs within each cluster, which misses the pairs that a border between clusters separates. Here an item is also
compared with the members of the clusters whose border is nearest to it, and the recall of the pairs is measured by
comparing a random sample of items with all."""

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.settings import DedupSettings
from embedcache.curate.similar_pairs import CosineTile, PairCollector, SimilarPairs, cosine_limit
from embedcache.errors import DataError, DiskFullError, PathError
from embedcache.files import disk_errors
from embedcache.modalities import noun
from embedcache.progress import NullProgress, Progress
from embedcache.search.faiss_index import spherical_kmeans
from embedcache.search.vectors import Vectors, run_pass

ALL_PAIRS_LIMIT = 50_000  # up to this many items all pairs are compared: some ten seconds on two cores
MAX_PAIRS = 20_000_000
_MAX_VISITS = 16
_NUM_PROBES = 1000
_BLOCK = 2048
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
    highest: Floats  # (N,) each item's largest cosine to another item it was compared with; -2 for a single item
    num_clusters: int  # 1 if all pairs were compared
    complete: float  # fraction of items whose near borders were all crossed; 1 means that no pair is missing
    recall: Recall | None  # None if all pairs were compared
    centroid_cosines: Floats | None  # (N,) to the item's own centroid; None if all pairs were compared


def find_near_duplicates(
    vectors: Vectors, rows_N: Ints, levels: Sequence[float], settings: DedupSettings, progress: Progress | None = None
) -> NearDuplicates:
    """Find the pairs of items whose cosine is at least `levels[0]`, which may rise to the next if there are too many.

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
    use_all_pairs = len(rows_N) <= ALL_PAIRS_LIMIT if settings.all_pairs is None else settings.all_pairs
    assignment = None if use_all_pairs else assign_clusters(vectors, rows_N, levels[0], settings, progress)
    plan = _make_plan(assignment, len(rows_N))
    dtype = np.float32 if use_all_pairs else np.float16
    folder = Path(settings.scratch or tempfile.gettempdir())
    with scratch_matrix(folder, (len(rows_N), vectors.width), dtype) as matrix_NP:
        _fill(matrix_NP, vectors, rows_N, plan, progress)
        collector = _compare(matrix_NP, plan, levels, progress)
        pairs = collector.pairs()
        recall = None if use_all_pairs else _measure_recall(matrix_NP, plan, pairs, collector.limit, settings.seed)
    return NearDuplicates(
        pairs=pairs,
        limit=collector.limit,
        highest=collector.highest,
        num_clusters=len(plan.starts) - 1,
        complete=1.0 if assignment is None else float(assignment.is_complete.mean()),
        recall=recall,
        centroid_cosines=None if assignment is None else assignment.cosines,
    )


_KMEANS_ITERATIONS = 10
_BORDER_ROUNDING = 1e-4
_MIN_SQUARED_DISTANCE = 1e-6  # nearer centroids count as this far apart, so that their border is crossed
_TRAINING_PER_CLUSTER = 40  # FAISS asks for 39 at least


@dataclass(frozen=True, kw_only=True)
class ClusterAssignment:
    """Clusters of B items."""

    clusters: Array  # (B,) int32, the nearest centroid of each
    cosines: Floats  # (B,) to that centroid
    visits: Array  # (B, V) int32, other clusters that may hold a near-duplicate, the nearest border first; -1: no more
    is_complete: Bools  # (B,) whether no further cluster can hold one


def assign_clusters(
    vectors: Vectors, rows_N: Ints, cosine: float, settings: DedupSettings, progress: Progress | None = None
) -> ClusterAssignment:
    """Assign items to 2 √N clusters; errors as in `find_near_duplicates`."""
    rng = np.random.default_rng(settings.seed)
    num_clusters = max(1, round(2 * math.sqrt(len(rows_N))))
    training_rows = np.sort(rng.permutation(rows_N)[: _TRAINING_PER_CLUSTER * num_clusters])
    training = copy.copy(vectors).read(training_rows)  # a copy opens anew, and its maps of the whole feature are freed
    _check_lengths(training, vectors)
    centroids_KP = fit_centroids(training, num_clusters, seed=settings.seed)
    work = ClusterAssigner(centroids_KP, cosine, _MAX_VISITS, _mask(rows_N, vectors))
    title = f"assigning to {len(centroids_KP):,} clusters"
    parts = run_pass(vectors, work, engine=settings.engine, address=settings.address, title=title, progress=progress)
    return concatenate_assignments(parts)


def fit_centroids(training_SP: Floats, num_clusters: int, *, seed: int) -> Floats:
    """Fit spherical k-means: (K, P) float32 rows of length 1, K at most the number of vectors."""
    count = min(num_clusters, len(training_SP))
    return spherical_kmeans(
        training_SP, count, seed=seed, iterations=_KMEANS_ITERATIONS, max_per_cluster=_TRAINING_PER_CLUSTER
    )


class ClusterAssigner:
    """A pass (see `run_pass`) that assigns the items of a mask to clusters.

    Two items of clusters a and b are on both sides of the plane where the cosines to both centroids are equal. If their
    angle is at most θ (of `cosine`), neither is further than sin θ from that plane: for an item x of a, only clusters b
    with x · (a - b) <= sin θ |a - b| can hold such a neighbor. In many dimensions that bound is wide; only the nearest
    `max_visits` borders are crossed, and what that misses must be measured.
    """

    def __init__(self, centroids_KP: Floats, cosine: float, max_visits: int, mask_N: Bools) -> None:
        self._centroids = centroids_KP
        self._reach = float(np.sqrt(1 - cosine**2)) + _BORDER_ROUNDING
        self._max_visits = min(max_visits, len(centroids_KP) - 1)
        self._mask_N = mask_N
        squared_K = np.einsum("kp,kp->k", centroids_KP, centroids_KP, dtype=np.float64)
        squared_KK = squared_K[:, None] + squared_K - 2 * centroids_KP.astype(np.float64) @ centroids_KP.T
        # 1 / |a - b| of all pairs of centroids
        self._inverse_KK = (1 / np.sqrt(np.maximum(squared_KK, _MIN_SQUARED_DISTANCE))).astype(np.float32)

    def process(self, rows_B: Ints, vectors_BP: Floats) -> list[ClusterAssignment]:
        """Assign the items of a chunk."""
        vectors_BP = vectors_BP[self._mask_N[rows_B]]
        cosines_BK = vectors_BP @ self._centroids.T
        clusters = cosines_BK.argmax(axis=1)
        own = np.take_along_axis(cosines_BK, clusters[:, None], axis=1)
        borders_BK = np.subtract(own, cosines_BK, out=cosines_BK)
        borders_BK *= self._inverse_KK[clusters]
        borders_BK[np.arange(len(clusters)), clusters] = np.inf
        count = self._max_visits
        nearest = np.argpartition(borders_BK, count, axis=1)[:, : count + 1]
        borders = np.take_along_axis(borders_BK, nearest, axis=1)
        order = np.argsort(borders, axis=1, kind="stable")
        nearest, borders = np.take_along_axis(nearest, order, axis=1), np.take_along_axis(borders, order, axis=1)
        visits = np.where(borders[:, :count] <= self._reach, nearest[:, :count], -1).astype(np.int32)
        is_complete = borders[:, count] > self._reach
        clusters = clusters.astype(np.int32)
        return [ClusterAssignment(clusters=clusters, cosines=own[:, 0], visits=visits, is_complete=is_complete)]

    def merge(self, before: list[ClusterAssignment], after: list[ClusterAssignment]) -> list[ClusterAssignment]:
        """Append those of later chunks."""
        before.extend(after)
        return before


def concatenate_assignments(parts: Sequence[ClusterAssignment]) -> ClusterAssignment:
    """Concatenate the results of a pass."""
    names = [field.name for field in fields(ClusterAssignment)]
    return ClusterAssignment(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The compared items. Places are rows of the scratch matrix: cluster by cluster, in row order within each."""

    items: Ints  # (N,) the item at each position
    starts: Ints  # (K + 1,) the position where each cluster begins
    visitors: Array  # (V,) positions, by the cluster that they visit
    visitor_starts: Ints  # (K + 1,) where in `visitors` each cluster's begin


def _make_plan(assignment: ClusterAssignment | None, num_items: int) -> _Plan:
    clusters = np.zeros(num_items, np.int32) if assignment is None else assignment.clusters
    visits = np.empty((num_items, 0), np.int32) if assignment is None else assignment.visits
    num_clusters = int(max(clusters.max(), visits.max(initial=0))) + 1
    items = np.argsort(clusters, kind="stable")
    visits = visits[items]
    position, _ = np.nonzero(visits >= 0)
    visited = visits[visits >= 0]
    order = np.argsort(visited, kind="stable")
    return _Plan(
        items=items,
        starts=_starts(clusters, num_clusters),
        visitors=position.astype(np.int32)[order],
        visitor_starts=_starts(visited, num_clusters),
    )


def _starts(numbers: Array, count: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=count))])


@contextmanager
def scratch_matrix(folder: Path, shape: tuple[int, int], dtype: npt.DTypeLike) -> Iterator[Array]:
    """Create a matrix in an unnamed file, which vanishes even if the process is killed; its space is allocated at once.

    Raises `PathError` if the folder does not exist, and `DiskFullError` if the matrix does not fit.
    """
    if not folder.is_dir():
        raise PathError(
            f"scratch: expected an existing folder, got {folder}; create it, or give another with --scratch"
        )
    needed, free = shape[0] * shape[1] * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"comparing {shape[0]:,} vectors needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free; free some, or give another folder with --scratch"
        )
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, needed))  # a hole that cannot be filled later would be a SIGBUS
        yield np.memmap(file, dtype, "r+", shape=shape)


def _fill(matrix_NP: Array, vectors: Vectors, rows_N: Ints, plan: _Plan, progress: Progress) -> None:
    """Write each vector to its position."""
    mask_N, position_N = _mask(rows_N, vectors), np.empty(len(rows_N), np.int64)
    position_N[plan.items] = np.arange(len(rows_N))
    num_written = 0
    progress.start("sorting", len(vectors.rows), noun(vectors.modality))
    for rows, vectors_BP in vectors.blocks():
        kept_BP = vectors_BP[mask_N[rows]]
        _check_lengths(kept_BP, vectors)
        matrix_NP[position_N[num_written : num_written + len(kept_BP)]] = kept_BP
        num_written += len(kept_BP)
        progress.advance(len(rows))
    progress.finish()


def _mask(rows_N: Ints, vectors: Vectors) -> Bools:
    mask_N = np.zeros(vectors.feature.num_items, bool)
    mask_N[rows_N] = True
    return mask_N


def _check_lengths(vectors_BP: Floats, vectors: Vectors) -> None:
    lengths = np.einsum("bp,bp->b", vectors_BP, vectors_BP)
    if not (lengths > 0.5).all():
        count = int((~(lengths > 0.5)).sum())
        raise DataError(
            f"feature {vectors.feature.name}: expected vectors that have a cosine, got {count:,} of length zero or NaN "
            "in one chunk; extract it again"
        )


def _compare(matrix_NP: Array, plan: _Plan, levels: Sequence[float], progress: Progress) -> PairCollector:
    collector = PairCollector(len(matrix_NP), levels, MAX_PAIRS)
    progress.start("comparing", len(matrix_NP), "items")
    for cluster in range(len(plan.starts) - 1):
        members = np.arange(plan.starts[cluster], plan.starts[cluster + 1])
        visitors = plan.visitors[plan.visitor_starts[cluster] : plan.visitor_starts[cluster + 1]]
        for tile in _tiles_within(matrix_NP, plan.items, members, progress):
            collector.add(tile)
        for tile in _tiles_across(matrix_NP, plan.items, visitors, members):
            collector.add(tile)
    progress.finish()
    return collector


def _tiles_within(matrix_NP: Array, items_N: Ints, members: Ints, progress: Progress) -> Iterator[CosineTile]:
    """Compare each pair of members once."""
    for block in blocks(len(members), _BLOCK):
        left, left_BP = items_N[members[block]], _float32(matrix_NP[members[block][0] : members[block][-1] + 1])
        yield CosineTile(left=left, right=left, cosines=left_BP @ left_BP.T, is_diagonal=True)
        for other in blocks(len(members) - block.stop, _BLOCK):
            right = members[block.stop :][other]
            right_BP = _float32(matrix_NP[right[0] : right[-1] + 1])
            yield CosineTile(left=left, right=items_N[right], cosines=left_BP @ right_BP.T)
        progress.advance(len(left))


def _tiles_across(matrix_NP: Array, items_N: Ints, visitors: Array, members: Ints) -> Iterator[CosineTile]:
    """Compare each visitor with each member."""
    for other in blocks(len(members) if len(visitors) else 0, _BLOCK):
        right = members[other]
        right_BP = _float32(matrix_NP[right[0] : right[-1] + 1])
        for block in blocks(len(visitors), _BLOCK):
            left = visitors[block]
            yield CosineTile(left=items_N[left], right=items_N[right], cosines=_float32(matrix_NP[left]) @ right_BP.T)


def _float32(values: Array) -> Floats:
    return np.asarray(values, np.float32)


def _measure_recall(matrix_NP: Array, plan: _Plan, pairs: SimilarPairs, limit: float, seed: int) -> Recall:
    """Compare random items with all, and count how many of their pairs were found."""
    num_items = len(matrix_NP)
    probe_positions = np.sort(np.random.default_rng(seed).permutation(num_items)[:_NUM_PROBES])
    probes_QP = _float32(matrix_NP[probe_positions])
    true_keys = []
    for block in blocks(num_items, 8 * _BLOCK):
        cosines = probes_QP @ _float32(matrix_NP[block]).T
        query, other = np.nonzero(cosines >= cosine_limit(limit) + _ROUNDING)
        left, right = plan.items[probe_positions[query]], plan.items[other + block.start]
        is_pair = left != right
        true_keys.append((np.minimum(left, right) * num_items + np.maximum(left, right))[is_pair])
    true = np.unique(np.concatenate(true_keys))
    is_found = np.isin(true, pairs.left * num_items + pairs.right)
    return Recall(num_items=len(probe_positions), num_pairs=len(true), num_found=int(is_found.sum()))
