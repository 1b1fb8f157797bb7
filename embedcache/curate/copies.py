"""Number items by content, and compare different contents. Deduplication and outliers share both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.settings import DedupSettings, OutlierSettings
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.pairs import read_items
from embedcache.dataset.vectors import Vectors
from embedcache.files import AnyPath
from embedcache.modalities import MODALITIES, order_pair
from embedcache.neighbors.pairs import Arranged, CosineTile, arrange, find_clusters
from embedcache.processes import products_on
from embedcache.progress import Progress
from embedcache.runs import PAIR, Run
from embedcache.search.faiss_index import spherical_kmeans
from embedcache.store.cache import Cache

ALL_PAIRS_LIMIT = 50_000
"""Up to this many items all pairs are compared: some ten seconds on two cores."""


def choose_modality(cache: Cache, modality: str | None, run: AnyPath | None = None) -> str:
    """Return the modality of the items to compare.

    If None, use the first modality (of the run, if there is one) that the cache has features of.
    """
    if modality is not None:
        return modality

    names = order_pair(MODALITIES if run is None else Run.open(run, kind=PAIR).modalities)
    return next((name for name in names if cache.features(name)), names[0])


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The M usable items of one feature, numbered by content: equal BLAKE2b hashes in the commits."""

    item_rows: Ints  # (M,) ascending
    samples: Ints  # (M,) sample of each item, ascending
    content_ids: Ints  # (M,) from 0 to C - 1 in order of first appearance
    unique_rows: Ints  # (C,) ascending, row of the first item of each content

    @property
    def num_copies(self) -> int:
        """Number of items that are copies of an earlier one."""
        return len(self.content_ids) - len(self.unique_rows)


def find_copies(cache: Cache, feature: InputFeature, samples: Ints | None = None) -> Copies:
    """Number the usable items of a feature, or of some samples, by content.

    Raises `UnfinishedError` if chunks of the feature are missing.
    """
    items = read_items([cache], [feature])
    items = items if samples is None else items.select(samples)
    _, first, contents = np.unique(items.contents, return_index=True, return_inverse=True)

    # Contents are numbered by their first usable item, as an earlier copy may have failed.
    order = np.argsort(first)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return Copies(
        item_rows=items.rows, samples=items.samples, content_ids=number[contents], unique_rows=items.rows[first[order]]
    )


@contextmanager
def compare(
    vectors: Vectors,
    rows_N: Ints,
    cosine: float,
    settings: DedupSettings | OutlierSettings,
    add: Callable[[CosineTile], object],
    progress: Progress,
) -> Iterator[Arranged]:
    """Compare items, all pairs or within clusters, and then give access to the vectors in the scratch file.

    All pairs: N² / 2 products. Clusters: about 10 N √N products with 2 √N clusters. Scratch space as of `arrange`.
    Memory: pages of the scratch file, which the system may drop, about 200 bytes per item, and the values that `add`
    collects. The result is the same for any number of workers.

    Args:
        vectors: vectors of the items.
        rows_N: rows of the items.
        cosine: with clusters, the smallest cosine of the pairs to find.
        settings: whether all pairs are compared, and on which device.
        add: collector of the tiles.
        progress: progress in items.

    Raises:
        DataError: a vector is of length zero or not finite.
        DiskFullError: the scratch file does not fit.
        MissingExtraError: faiss is needed for clusters, or Ray for its engine, and is not installed.
    """
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

    # The scratch file stays open in the caller's block, which measures the recall with its vectors.
    with arrange(selected, clusters, scratch=settings.scratch, progress=progress) as arranged:
        for tile in arranged.tiles(progress, products=products_on(vectors.device)):
            add(tile)
        yield arranged
