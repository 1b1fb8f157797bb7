"""Near-duplicates and nearest neighbors among the items of a cache, and how many of them were found."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints
from embedcache.curate.keep import NO_DISTANCE, SimilarPairs
from embedcache.curate.settings import DedupSettings, OutlierSettings
from embedcache.dataset.vectors import Vectors
from embedcache.devices import products_on
from embedcache.neighbors.clusters import Arranged, CosineTile, arrange, find_clusters
from embedcache.neighbors.pairs import (
    NeighborCollector,
    PairCollector,
    Recall,
    measure_neighbor_recall,
    measure_recall,
    pair_keys,
)
from embedcache.progress import NullProgress, Progress
from embedcache.search.faiss_index import spherical_kmeans

ALL_PAIRS_LIMIT = 50_000  # up to this many items all pairs are compared: some ten seconds on two cores
MAX_PAIRS = 20_000_000
CANDIDATE_COSINES = (0.7, 0.8)  # images of closer pairs are read again; from the second on if there are too many
_ANY_COSINE = 0.0  # neighbors may be this far away, so that the nearest borders are crossed wherever they are


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Near-duplicates among N items."""

    pairs: SimilarPairs  # of item numbers, from `limit` on
    limit: float  # above the requested cosine if there were too many pairs, infinite if there still are
    highest: Floats  # (N,) each item's largest cosine to another item; -2 if it was compared with none
    num_clusters: int  # 1 if all pairs were compared
    complete: float  # fraction of items whose near borders were all crossed; 1 means that no pair is missing
    recall: Recall | None  # None if all pairs were compared


def find_near_duplicates(
    vectors: Vectors, rows_N: Ints, levels: Sequence[float], settings: DedupSettings, progress: Progress | None = None
) -> NearDuplicates:
    """Find the pairs of items whose cosine is at least `levels[0]`, which may rise to the next if there are too many.

    For `settings.pixels`, pairs of images are returned from the first of `CANDIDATE_COSINES` on, of those that are
    compared for `levels[0]`; the recall is that from `levels[0]` on.

    All pairs: every pair, N² / 2 products. Clusters: nearly every pair (measured), about 10 N √N products with 2 √N
    clusters. Scratch space as of `arrange`. Memory: pages of the scratch file, which the system may drop, about 200
    bytes per item, and the pairs (at most 20 million, 0.5 GB). Deterministic for any number of workers.

    Raises:
        DataError: a vector is of length zero or not finite.
        DiskFullError: the scratch file does not fit.
        MissingExtraError: faiss is needed for clusters, or Ray for its engine, and is not installed.
    """
    progress = progress or NullProgress()
    candidates = CANDIDATE_COSINES if settings.pixels and vectors.modality == "image" else ()
    collector = PairCollector(len(rows_N), sorted({*candidates, *levels}), MAX_PAIRS)
    with _compared(vectors, rows_N, levels[0], settings, collector.add, progress) as arranged:
        left, right, cosines = collector.pairs()
        keys = pair_keys(left, right, len(rows_N))

        def is_found(one: Ints, other: Ints) -> Bools:
            wanted = pair_keys(one, other, len(rows_N))
            places = np.searchsorted(keys, wanted)
            is_pair: Bools = np.append(keys, -1)[places] == wanted
            return is_pair

        limit = max(collector.limit, levels[0])
        recall = measure_recall(arranged, limit, is_found, seed=settings.seed, progress=progress)
    return NearDuplicates(
        pairs=SimilarPairs(
            left=left, right=right, cosines=cosines, distances=np.full(len(left), NO_DISTANCE, np.int16)
        ),
        limit=collector.limit,
        highest=collector.highest,
        num_clusters=arranged.num_clusters,
        complete=arranged.clusters.complete,
        recall=recall,
    )


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The K other items that are most similar to each of N items, best first."""

    items: Array  # (N, K) int32 item numbers; -1 where fewer were compared
    cosines: Floats  # (N, K); -inf where there is none
    num_clusters: int  # 1 if all pairs were compared
    recall: Recall | None  # of the K nearest of drawn items; None if all pairs were compared


def find_neighbors(
    vectors: Vectors, rows_N: Ints, k: int, settings: OutlierSettings, progress: Progress | None = None
) -> Neighbors:
    """Find the K nearest neighbors of each item: of all others, or of those in its cluster and near its borders.

    Time, scratch space and errors as in `find_near_duplicates`; memory 8 K bytes per item in place of the pairs.
    """
    progress = progress or NullProgress()
    collector = NeighborCollector(len(rows_N), k)
    with _compared(vectors, rows_N, _ANY_COSINE, settings, collector.add, progress) as arranged:
        recall = measure_neighbor_recall(arranged, collector.best, seed=settings.seed, progress=progress)
    return Neighbors(
        items=collector.best.numbers,
        cosines=collector.best.scores,
        num_clusters=arranged.num_clusters,
        recall=recall,
    )


@contextmanager
def _compared(
    vectors: Vectors,
    rows_N: Ints,
    cosine: float,
    settings: DedupSettings | OutlierSettings,
    add: Callable[[CosineTile], None],
    progress: Progress,
) -> Iterator[Arranged]:
    """Compare items, all pairs or within clusters, and then give access to the vectors in the scratch file."""
    is_exact = len(rows_N) <= ALL_PAIRS_LIMIT if settings.all_pairs is None else settings.all_pairs
    selected = vectors.select(rows_N)
    clusters = find_clusters(
        selected,
        cosine,
        all_pairs=is_exact,
        fit=partial(spherical_kmeans, iterations=10, max_per_cluster=40, device=vectors.device),
        seed=settings.seed,
        engine=settings.engine,
        address=settings.address,
        progress=progress,
    )
    with arrange(selected, clusters, scratch=settings.scratch, progress=progress) as arranged:
        for tile in arranged.tiles(progress, products=products_on(vectors.device)):
            add(tile)
        yield arranged
