"""Near-duplicates by cosine: all pairs of items, or those within clusters and across near borders.

After "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", Abbas et al. 2023: k-means, then
all pairs within each cluster. A pair that a border cuts in two is missed there. Here an item is compared with the
members of further clusters too, those whose border it is nearest to, and the pairs found are measured against comparing
drawn items with all."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.links import (
    ClusterAssigner,
    ClusterAssignment,
    CosineTile,
    PairCollector,
    SimilarPairs,
    choose_num_clusters,
    cosine_limit,
    fit_centroids,
    join,
    num_training,
    scratch_matrix,
)
from embedcache.errors import DataError
from embedcache.progress import NullProgress, Progress
from embedcache.search.vectors import Engine, Vectors, run_pass

ALL_PAIRS_LIMIT = 50_000
"""Up to this many items all pairs are compared: some ten seconds on two cores."""

MOST_LINKS = 20_000_000
_MOST_VISITS = 16
_NUM_PROBES = 1000
_BLOCK = 2048
_ROUNDING = 1e-6  # two ways of summing one cosine in float32


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What of the pairs above the limit was found, of those that hold a drawn item.

    Args:
        num_items: drawn, and compared with all.
        num_pairs: above the limit that they are in.
        num_found: of these.
    """

    num_items: int
    num_pairs: int
    num_found: int

    @property
    def value(self) -> float | None:
        """Share that was found, 0 to 1; None where there was no pair."""
        return self.num_found / self.num_pairs if self.num_pairs else None

    def to_json(self) -> dict[str, float | None]:
        """Give all of it as JSON."""
        return {**asdict(self), "value": self.value}


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """The near-duplicates of N items.

    Args:
        links: pairs of numbers of items, from `limit` on.
        limit: cosine; above the one asked for where there were too many pairs, infinite where there still are.
        best: (N,) float32, each item's largest cosine to another that was found; -2 for an only item.
        num_clusters: 1 where all pairs were compared.
        complete: share of items whose borders within reach were all crossed: 1 means that no pair is missing.
        recall: measured, where not all pairs were compared.
        centroid_cosines: (N,) float32, to the item's own centroid; None where all pairs were compared.
    """

    links: SimilarPairs
    limit: float
    best: Floats
    num_clusters: int
    complete: float
    recall: Recall | None
    centroid_cosines: Floats | None


def find_near_duplicates(
    vectors: Vectors,
    rows_N: Ints,
    levels: Sequence[float],
    *,
    all_pairs: bool | None = None,
    scratch: Path,
    seed: int = 0,
    engine: Engine = "local",
    address: str | None = None,
    progress: Progress | None = None,
) -> NearDuplicates:
    """Find the pairs of items whose cosine is at least a limit.

    All pairs: every one, N² / 2 products, `4 N P` bytes of scratch. Else 2 √N clusters: nearly every one (measured),
    about 10 N √N products, `2 N P` bytes of scratch in float16, whose rounding moves a cosine by 1e-5. Memory:
    the scratch file's pages, which the system may drop, about 200 bytes an item, and the pairs (at most 20 million,
    0.5 GB). Deterministic for any number of workers.

    Args:
        vectors: of a feature.
        rows_N: (N,) the rows to compare, ascending.
        levels: cosines, ascending: the limit, and what it may rise to where there are too many pairs.
        all_pairs: compare all pairs; None is up to 50,000 items.
        scratch: folder for the scratch file.
        seed: of k-means and of the items that the recall is measured on.
        engine: of the pass that assigns items to clusters.
        address: of a Ray cluster.
        progress: told about items.

    Raises:
        DataError: a vector is of length zero or not a number.
        DiskFullError, PathError: as of `scratch_matrix`.
        MissingExtraError: clusters without faiss, or Ray without ray.
    """
    progress = progress or NullProgress()
    if all_pairs is None:
        all_pairs = len(rows_N) <= ALL_PAIRS_LIMIT
    assigned = None
    if not all_pairs:
        assigned = assign(vectors, rows_N, levels[0], seed=seed, engine=engine, address=address, progress=progress)
    plan = _Plan.of(assigned, len(rows_N))
    dtype = np.float32 if all_pairs else np.float16
    with scratch_matrix(scratch, (len(rows_N), vectors.width), dtype) as matrix_NP:
        _fill(matrix_NP, vectors, rows_N, plan, progress)
        collector = _search(matrix_NP, plan, levels, progress)
        links = collector.links()
        recall = None if all_pairs else _measure(matrix_NP, plan, links, collector.limit, seed)
    return NearDuplicates(
        links=links,
        limit=collector.limit,
        best=collector.best,
        num_clusters=len(plan.starts) - 1,
        complete=1.0 if assigned is None else float(assigned.is_complete.mean()),
        recall=recall,
        centroid_cosines=None if assigned is None else assigned.cosines,
    )


def assign(
    vectors: Vectors,
    rows_N: Ints,
    cosine: float,
    *,
    seed: int = 0,
    engine: Engine = "local",
    address: str | None = None,
    progress: Progress | None = None,
) -> ClusterAssignment:
    """Cut items into clusters; arguments and errors as of `find_near_duplicates`."""
    rng = np.random.default_rng(seed)
    num_clusters = choose_num_clusters(len(rows_N))
    drawn = np.sort(rng.permutation(rows_N)[: num_training(num_clusters)])
    training = copy.copy(vectors).read(drawn)  # a copy opens anew, and its maps of the whole feature go with it
    _check(training, vectors)
    centroids_KP = fit_centroids(training, num_clusters, seed=seed)
    work = ClusterAssigner(centroids_KP, cosine, _MOST_VISITS, _mask(rows_N, vectors))
    what = f"assigning to {len(centroids_KP):,} clusters"
    return join(run_pass(vectors, work, engine=engine, address=address, title=what, progress=progress))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which items are compared. Places are those of the scratch matrix: cluster by cluster, in row order within each.

    Args:
        items: (N,) the item at each place.
        starts: (K + 1,) the place where each cluster begins.
        visitors: (V,) places, cluster by cluster that they visit.
        visitor_starts: (K + 1,) where in `visitors` each cluster's begin.
    """

    items: Ints
    starts: Ints
    visitors: Array
    visitor_starts: Ints

    @staticmethod
    def of(assigned: ClusterAssignment | None, num_items: int) -> "_Plan":
        if assigned is None:
            return _Plan(
                items=np.arange(num_items),
                starts=np.array([0, num_items]),
                visitors=np.empty(0, np.int32),
                visitor_starts=np.zeros(2, np.int64),
            )
        num_clusters = int(max(assigned.clusters.max(), assigned.visits.max(initial=0))) + 1
        items = np.argsort(assigned.clusters, kind="stable")
        visits = assigned.visits[items]
        place, _ = np.nonzero(visits >= 0)
        visited = visits[visits >= 0]
        order = np.argsort(visited, kind="stable")
        return _Plan(
            items=items,
            starts=_starts(assigned.clusters, num_clusters),
            visitors=place.astype(np.int32)[order],
            visitor_starts=_starts(visited, num_clusters),
        )


def _starts(numbers: Array, count: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=count))])


def _fill(matrix_NP: Array, vectors: Vectors, rows_N: Ints, plan: _Plan, progress: Progress) -> None:
    """Write each vector to its place."""
    is_taken, place_N = _mask(rows_N, vectors), np.empty(len(rows_N), np.int64)
    place_N[plan.items] = np.arange(len(rows_N))
    done = 0
    progress.start("sorting", len(vectors.rows), f"{vectors.modality}s")
    for rows, vectors_BP in vectors.blocks():
        taken_BP = vectors_BP[is_taken[rows]]
        _check(taken_BP, vectors)
        matrix_NP[place_N[done : done + len(taken_BP)]] = taken_BP
        done += len(taken_BP)
        progress.advance(len(rows))
    progress.finish()


def _mask(rows_N: Ints, vectors: Vectors) -> Bools:
    is_taken = np.zeros(vectors.feature.num_items, bool)
    is_taken[rows_N] = True
    return is_taken


def _check(vectors_BP: Floats, vectors: Vectors) -> None:
    lengths = np.einsum("bp,bp->b", vectors_BP, vectors_BP)
    if not (lengths > 0.5).all():
        count = int((~(lengths > 0.5)).sum())
        raise DataError(
            f"feature {vectors.feature.name} has {count:,} vectors of length zero or NaN in one chunk, expected finite "
            "vectors that have a cosine; extract it again"
        )


def _search(matrix_NP: Array, plan: _Plan, levels: Sequence[float], progress: Progress) -> PairCollector:
    collector = PairCollector(len(matrix_NP), levels, MOST_LINKS)
    progress.start("comparing", len(matrix_NP), "items")
    for cluster in range(len(plan.starts) - 1):
        members = np.arange(plan.starts[cluster], plan.starts[cluster + 1])
        visitors = plan.visitors[plan.visitor_starts[cluster] : plan.visitor_starts[cluster + 1]]
        for tile in _within(matrix_NP, plan.items, members, progress):
            collector.take(tile)
        for tile in _across(matrix_NP, plan.items, visitors, members):
            collector.take(tile)
    progress.finish()
    return collector


def _within(matrix_NP: Array, items_N: Ints, members: Ints, progress: Progress) -> Iterator[CosineTile]:
    """Compare each pair of members once."""
    for one in blocks(len(members), _BLOCK):
        left, left_BP = items_N[members[one]], _float32(matrix_NP[members[one][0] : members[one][-1] + 1])
        yield CosineTile(left=left, right=left, cosines=left_BP @ left_BP.T, is_diagonal=True)
        for two in blocks(len(members) - one.stop, _BLOCK):
            right = members[one.stop :][two]
            right_BP = _float32(matrix_NP[right[0] : right[-1] + 1])
            yield CosineTile(left=left, right=items_N[right], cosines=left_BP @ right_BP.T)
        progress.advance(len(left))


def _across(matrix_NP: Array, items_N: Ints, visitors: Array, members: Ints) -> Iterator[CosineTile]:
    """Compare each visitor with each member."""
    for two in blocks(len(members) if len(visitors) else 0, _BLOCK):
        right = members[two]
        right_BP = _float32(matrix_NP[right[0] : right[-1] + 1])
        for one in blocks(len(visitors), _BLOCK):
            left = visitors[one]
            yield CosineTile(left=items_N[left], right=items_N[right], cosines=_float32(matrix_NP[left]) @ right_BP.T)


def _float32(values: Array) -> Floats:
    return np.asarray(values, np.float32)


def _measure(matrix_NP: Array, plan: _Plan, links: SimilarPairs, limit: float, seed: int) -> Recall:
    """Compare drawn items with all, and see which of their pairs were found."""
    num_items = len(matrix_NP)
    places = np.sort(np.random.default_rng(seed).permutation(num_items)[:_NUM_PROBES])
    probes_QP = _float32(matrix_NP[places])
    true_keys = []
    for block in blocks(num_items, 8 * _BLOCK):
        cosines = probes_QP @ _float32(matrix_NP[block]).T
        query, other = np.nonzero(cosines >= cosine_limit(limit) + _ROUNDING)
        left, right = plan.items[places[query]], plan.items[other + block.start]
        is_pair = left != right
        true_keys.append((np.minimum(left, right) * num_items + np.maximum(left, right))[is_pair])
    true = np.unique(np.concatenate(true_keys))
    found = np.isin(true, links.left * num_items + links.right)
    return Recall(num_items=len(places), num_pairs=len(true), num_found=int(found.sum()))
