"""The training item closest to each test item, and the reverse: all pairs, or pairs within clusters of the test items.

Clusters are those of `embedcache.dataset.clusters`: a test item is compared with the training items of its own cluster
and of those whose border is nearest to it. What that misses is measured: the pairs of a random sample of test items
with all training items."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Bools, Floats, Ints, Products, blocks
from embedcache.curate.near_duplicates import Recall
from embedcache.curate.settings import LeakSettings
from embedcache.dataset.clusters import READ_ROWS, Plan, cluster_items, make_plan
from embedcache.dataset.inputs import InputFeature, to_unit_vectors
from embedcache.dataset.similar_pairs import cosine_limit
from embedcache.devices import products_on
from embedcache.metrics.neighbors import Closest, find_closest
from embedcache.modalities import noun
from embedcache.progress import Progress

ALL_PAIRS_LIMIT = 4e12
"""Up to this many multiplications, test items × training items × width, all pairs are compared: about a minute."""

_TEST_BYTES = 2**29
_BATCH_BYTES = 2**28  # of training vectors, so that a cluster is compared with many of them at once
_NUM_PROBES = 1000
_TILE = 2048


@dataclass(frozen=True, kw_only=True)
class ClosestItems:
    """The closest pairs of Q test items and C training items."""

    closest: Closest  # of what was compared; rows are positions among the training items
    num_clusters: int  # 1 if all pairs were compared
    complete: float  # fraction of test items whose near borders were all crossed; 1 means that no pair is missing
    recall: Recall | None  # of the pairs above the limit; None if all pairs were compared


@dataclass(frozen=True, kw_only=True)
class ItemSets:
    """Valid items of a feature in two caches: some of the test cache, all of the training cache."""

    train: InputFeature
    test: InputFeature
    num_train: int
    test_rows: Ints  # (Q,)
    is_copy: Bools  # (Q,) copies are found by hash, and not drawn to measure recall


def find_closest_items(sets: ItemSets, cosine: float, settings: LeakSettings, progress: Progress) -> ClosestItems:
    """Compare test items with training items.

    All pairs: Q C products. Clusters: about 11 C √Q, with 2 √Q clusters, and 1,000 C for the recall. Memory: at most
    512 MiB of test vectors, for which the training cache is read once; a chunk of that, or with clusters twice 256 MiB;
    200 bytes per test item and 4 per training item. Deterministic.

    Args:
        sets: the items.
        cosine: pairs of at least this cosine are to be found.
        settings: whether all pairs are compared; the seed of clusters and of items drawn to measure recall.
        progress: progress in pairs, or with clusters in training items.
    """
    width, count = sets.test.width, len(sets.test_rows)
    is_exact = count * sets.num_train * width <= ALL_PAIRS_LIMIT if settings.all_pairs is None else settings.all_pairs
    drawn = np.random.default_rng(settings.seed).permutation(np.flatnonzero(~sets.is_copy))[:_NUM_PROBES]
    is_probe = np.isin(np.arange(count), drawn)
    products, parts = products_on(settings.device), []
    for block in blocks(count, _TEST_BYTES // (4 * width)):
        vectors_QP = _read(sets.test, sets.test_rows[block])
        if is_exact:
            parts.append(_compare_all(sets, vectors_QP, products, progress))
        else:
            clusters = _Clusters(
                vectors_QP, is_probe[block], cosine=cosine, seed=settings.seed, products=products, progress=progress
            )
            parts.append(_compare_clusters(sets, clusters, progress))
    return _join(parts)


def _read(feature: InputFeature, rows: Ints) -> Floats:
    """Read unit vectors a few rows at a time, so that nothing else of their size is in memory."""
    vectors_QP = np.empty((len(rows), feature.width), np.float32)
    for block in blocks(len(rows), READ_ROWS):
        vectors_QP[block] = to_unit_vectors(feature.read(rows[block]))
    return vectors_QP


def _join(parts: list[ClosestItems]) -> ClosestItems:
    """Join the results of consecutive test items."""
    sizes = [len(part.closest.rows) for part in parts]
    recalls = [part.recall for part in parts if part.recall]
    recall = Recall(
        num_items=sum(part.num_items for part in recalls),
        num_pairs=sum(part.num_pairs for part in recalls),
        num_found=sum(part.num_found for part in recalls),
    )
    return ClosestItems(
        closest=Closest(
            np.concatenate([part.closest.rows for part in parts]),
            np.concatenate([part.closest.sims for part in parts]),
            np.maximum.reduce([part.closest.candidate_sims for part in parts]),
        ),
        num_clusters=sum(part.num_clusters for part in parts) if recalls else parts[0].num_clusters,
        complete=float(np.average([part.complete for part in parts], weights=sizes)),
        recall=recall if recalls else None,
    )


def _compare_all(sets: ItemSets, vectors_QP: Floats, products: Products, progress: Progress) -> ClosestItems:
    what, num_pairs = f"comparing {noun(sets.test.modality)}", len(vectors_QP) * sets.num_train

    progress.start(what, num_pairs, "pairs")

    def train_blocks() -> Iterator[Floats]:
        for rows, inputs in sets.train.blocks():
            yield to_unit_vectors(inputs)
            progress.advance(len(vectors_QP) * len(rows))

    closest = find_closest(vectors_QP, train_blocks(), products=products)
    progress.finish()
    return ClosestItems(closest=closest, num_clusters=1, complete=1.0, recall=None)


def _compare_clusters(sets: ItemSets, clusters: "_Clusters", progress: Progress) -> ClosestItems:
    what = f"comparing {noun(sets.test.modality)} within {len(clusters.centroids_KP):,} clusters"
    size = _BATCH_BYTES // (4 * sets.train.width)
    progress.start(what, sets.num_train, noun(sets.test.modality))
    sims_C = np.full(sets.num_train, -np.inf, np.float32)
    num_before = 0
    for batch_BP in _batches(sets.train, size):
        sims_C[num_before : num_before + len(batch_BP)] = clusters.compare(batch_BP, num_before)
        num_before += len(batch_BP)
        progress.advance(len(batch_BP))
    progress.finish()
    return ClosestItems(
        closest=Closest(clusters.rows_Q, clusters.sims_Q, sims_C),
        num_clusters=len(clusters.centroids_KP),
        complete=clusters.complete,
        recall=clusters.recall,
    )


def _batches(feature: InputFeature, size: int) -> Iterator[Floats]:
    """Iterate over all vectors, at least `size` at a time."""
    parts: list[Floats] = []
    for _, inputs in feature.blocks():
        parts.append(to_unit_vectors(inputs))
        if sum(map(len, parts)) >= size:
            yield np.concatenate(parts)
            parts = []
    if parts:
        yield np.concatenate(parts)


class _Clusters:
    """Test items in clusters, the closest training item of each so far, and the recall of the pairs so far."""

    def __init__(
        self,
        vectors_QP: Floats,
        is_probe_Q: Bools,
        *,
        cosine: float,
        seed: int,
        products: Products,
        progress: Progress,
    ) -> None:
        count = len(vectors_QP)
        self.centroids_KP, assignment = cluster_items(
            lambda numbers: vectors_QP[numbers], count, cosine, seed=seed, what="test items", progress=progress
        )
        self.complete = float(assignment.is_complete.mean())
        self.rows_Q, self.sims_Q = np.full(count, -1, np.int64), np.full(count, -np.inf, np.float32)
        self._num_pairs = self._num_found = 0
        self._plan: Plan = make_plan(assignment, count)
        self._vectors_QP, self.products, self._limit = vectors_QP, products, cosine_limit(cosine)
        self._probes_QP = vectors_QP[is_probe_Q]
        num_columns = len(self.centroids_KP) + 1  # the last is no cluster
        self._is_visited_QK = np.zeros((len(self._probes_QP), num_columns), bool)
        visits_QV = np.column_stack([assignment.clusters[is_probe_Q], assignment.visits[is_probe_Q]])
        np.put_along_axis(self._is_visited_QK, visits_QV.astype(np.int64), values=True, axis=1)

    @property
    def recall(self) -> Recall:
        """Recall of the pairs of probes so far."""
        return Recall(num_items=len(self._probes_QP), num_pairs=self._num_pairs, num_found=self._num_found)

    def compare(self, train_BP: Floats, num_before: int) -> Floats:
        """Compare the next training items: the largest cosine of each to a test item, -inf if there was none."""
        clusters_B = np.concatenate([self._assign(train_BP[tile]) for tile in blocks(len(train_BP), _TILE)])
        order_B, plan = np.argsort(clusters_B, kind="stable"), self._plan
        starts = np.searchsorted(clusters_B[order_B], np.arange(len(plan.starts)))
        sims_B = np.full(len(train_BP), -np.inf, np.float32)
        for cluster in range(len(plan.starts) - 1):
            train = order_B[starts[cluster] : starts[cluster + 1]]
            if not len(train):
                continue
            visitors = plan.visitors[plan.visitor_starts[cluster] : plan.visitor_starts[cluster + 1]]
            test = plan.items[np.r_[plan.starts[cluster] : plan.starts[cluster + 1], visitors]]
            found = find_closest(self._vectors_QP[test], [train_BP[train]], products=self.products)
            is_closer = found.sims > self.sims_Q[test]
            self.sims_Q[test[is_closer]] = found.sims[is_closer]
            self.rows_Q[test[is_closer]] = train[found.rows[is_closer]] + num_before
            sims_B[train] = found.candidate_sims
        return sims_B

    def _assign(self, train_TP: Floats) -> Ints:
        """Return the nearest centroid of some training items, and count the pairs with probes that are compared."""
        clusters_T: Ints = self.products(train_TP, self.centroids_KP).argmax(axis=1)
        probe, item = np.nonzero(self.products(self._probes_QP, train_TP) >= self._limit)
        self._num_pairs += len(item)
        self._num_found += int(self._is_visited_QK[probe, clusters_T[item]].sum())
        return clusters_T
