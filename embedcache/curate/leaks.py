"""Leaks: test samples that are in a training cache, as exact copies by hash or as near-duplicates by cosine."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools, Floats, Ints, Products, blocks, distinct
from embedcache.curate.near_duplicates import Recall
from embedcache.curate.settings import LeakSettings
from embedcache.dataset.clusters import READ_ROWS, Plan, cluster_items, make_plan
from embedcache.dataset.inputs import InputFeature, NamedFeatures, features_by_modality, open_input, to_unit_vectors
from embedcache.dataset.pairs import Items, read_items
from embedcache.dataset.selections import Selection, write_selection
from embedcache.dataset.similar_pairs import cosine_limit
from embedcache.devices import products_on
from embedcache.errors import DataError, SettingError, UnfinishedError, quoted
from embedcache.files import AnyPath
from embedcache.metrics.neighbors import Closest, find_closest
from embedcache.modalities import MODALITIES, noun, order_pair
from embedcache.outputs import check_table_output
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import name_differences
from embedcache.samples import IMPORTED_SOURCE
from embedcache.settings import merge_settings
from embedcache.sources.open import IMPORT_TOGETHER
from embedcache.store.cache import Cache

_NO_LIMIT = "their near-duplicates are found with --cosine; curate dedup shows which cosine suits the encoder"
_OTHER_HASHES = (
    "the hashes of imported vectors are not those of files; extract the files of both, or import the vectors of both"
)


@dataclass(frozen=True, kw_only=True)
class ModalityLeaks:
    """Q test items of one modality, and their copies and near-duplicates in a training cache of C items."""

    modality: str
    feature: str | None  # that near-duplicates were searched with; None if only copies were
    reason: str | None  # why only copies were searched
    cosine: float | None  # limit of near-duplicates; None: only copies are leaks
    test: Items
    train: Items
    train_rows: Ints  # (Q,) row of the training item closest to each test item; -1 if unknown
    cosines: Floats  # (Q,) of the two; 1 for a copy, -inf if unknown
    is_copy: Bools  # (Q,)
    train_cosines: Floats  # (C,) largest cosine of each training item to a test item that it was compared with
    train_is_copy: Bools  # (C,)
    num_clusters: int | None  # 1 if all pairs were compared; None if only copies were searched
    complete: float | None  # fraction of test items whose near borders were all crossed
    recall: Recall | None  # of the near-duplicates of drawn test items; None if all pairs or only copies were compared

    @property
    def is_compared(self) -> bool:
        """Whether copies were searched: the hashes of imported vectors are not those of files."""
        return self.reason != _OTHER_HASHES

    @property
    def is_leaked(self) -> Bools:
        """Whether each test item has a copy or a near-duplicate in training: (Q,)."""
        return self._leaked(self.is_copy, self.cosines)

    @property
    def copied_samples(self) -> Ints:
        """Test samples with a copy in training, ascending."""
        return distinct(self.test.samples[self.is_copy])

    @property
    def leaked_samples(self) -> Ints:
        """Test samples with a copy or a near-duplicate in training, ascending."""
        return distinct(self.test.samples[self.is_leaked])

    @property
    def train_samples(self) -> Ints:
        """Training samples with a copy or a near-duplicate in test, ascending."""
        return distinct(self.train.samples[self._leaked(self.train_is_copy, self.train_cosines)])

    def _leaked(self, is_copy: Bools, cosines: Floats) -> Bools:
        return is_copy if self.cosine is None else is_copy | (cosines >= cosine_limit(self.cosine))

    @property
    def highest(self) -> float | None:
        """Largest cosine of two items that are not equal; None if there is none."""
        near = self.cosines[~self.is_copy & np.isfinite(self.cosines)]
        return float(min(1, near.max())) if len(near) else None

    def to_json(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
        return {
            "feature": self.feature,
            "only_copies_because": self.reason,
            "cosine": self.cosine,
            "num_test_items": len(self.test.rows),
            "num_train_items": len(self.train.rows),
            "num_samples_copied": len(self.copied_samples) if self.is_compared else None,
            "num_samples_leaked": len(self.leaked_samples) if self.is_compared else None,
            "num_train_samples": len(self.train_samples) if self.is_compared else None,
            "highest_cosine": self.highest,
            "num_clusters": self.num_clusters,
            "complete": self.complete,
            "recall": None if self.recall is None else self.recall.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """Overlap of a test cache with a training cache.

    Args:
        train: the training cache.
        test: the test cache.
        leaks: leaks of each modality that both caches have features of.
    """

    train: Cache
    test: Cache
    leaks: Sequence[ModalityLeaks]

    @property
    def num_train_samples(self) -> int:
        """Number of training samples that were not removed from their cache."""
        return len(self.train) - len(self.train.removed)

    @property
    def num_test_samples(self) -> int:
        """Number of test samples that were not removed from their cache."""
        return len(self.test) - len(self.test.removed)

    @property
    def leaked_samples(self) -> Ints:
        """Test samples of which an item is in training, ascending."""
        return distinct(np.concatenate([leak.leaked_samples for leak in self.leaks]))

    def clean_selection(self) -> Selection:
        """Select the training samples of which nothing is in test, with the largest cosine of each to a test item."""
        left_out = np.concatenate([self.train.removed, *(leak.train_samples for leak in self.leaks)])
        rows = np.setdiff1d(np.arange(len(self.train)), distinct(left_out), assume_unique=True)
        columns = {}
        for leak in self.leaks:
            if leak.feature:
                closest_S = np.full(len(self.train), -np.inf, np.float32)
                np.maximum.at(closest_S, leak.train.samples, leak.train_cosines)
                is_unknown = ~np.isfinite(closest_S[rows])
                columns[f"closest_{leak.modality}"] = pa.array(closest_S[rows], mask=is_unknown)
        return Selection(rows=rows, columns=columns)

    def to_json(self) -> dict[str, Any]:
        """Return all counts as JSON values."""
        return {
            "train": str(self.train.path),
            "test": str(self.test.path),
            "num_samples": self.num_test_samples,
            "num_leaked": len(self.leaked_samples),
            "by": {leak.modality: leak.to_json() for leak in self.leaks},
        }


def find_leaks(
    train: AnyPath,
    test: AnyPath,
    settings: LeakSettings | None = None,
    *,
    feature: NamedFeatures = None,
    progress: AnyProgress = None,
    **options: Any,
) -> LeakReport:
    """Find the items of a test cache that are in a training cache.

    Copies are found by the hashes of bytes and texts, for any encoders. Near-duplicates need one feature of one encoder
    in both caches and, of recordings, videos and point clouds, `cosine`. Up to 4 × 10¹² multiplications, such as
    those of 5,000 × 1,000,000 items of width 768, each test item is compared with each training item, in about a minute
    on two cores; beyond that, or with `all_pairs=False`, only within clusters, and the recall is measured. Time and
    memory as in `embedcache.curate.leaks`.

    Args:
        train: the training cache.
        test: the test cache.
        settings: limits of near-duplicates, the features to compare, whose tokens are averaged, and whether all pairs
            are compared.
        feature: features of both caches, such as `audio=tiny.en/mean`; or modality -> feature.
        progress: progress in pairs.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        SettingError: one cache is given twice, both have several features in common, or a feature is named of a
            modality that one of them lacks.
        DataError: the caches have no modality in common that can be compared, or a feature has no encoded item.
        UnknownNameError: there is no such feature.
        UnfinishedError: chunks of a feature are missing.
    """
    settings, progress = merge_settings(LeakSettings, settings, options), to_progress(progress)
    train, test = Cache(train), Cache(test)
    if train.info.has_rows_of(test.info.index_digest):
        raise SettingError(
            f"expected a training cache and another test cache, got {train.path} and {test.path}, which hold "
            "the same samples"
        )
    common = [name for name in order_pair(MODALITIES) if train.features(name) and test.features(name)]
    if not common:
        train_has, test_has = (
            " and ".join(noun(name) for name in MODALITIES if cache.features(name)) or "nothing"
            for cache in (train, test)
        )
        raise DataError(
            f"expected caches with a modality in common, got features of {train_has} in {train.path} and of "
            f"{test_has} in {test.path}"
        )
    named = _named_features(train, feature, common)
    chosen = [_choose_features(train, test, name, named.get(name), settings) for name in common]  # all before the work
    if all(reason == _OTHER_HASHES for _, _, reason in chosen):
        raise DataError(f"{train.path} and {test.path} have no items to compare: {_OTHER_HASHES}")
    leaks = [_find_leaks(train, test, features, settings, progress) for features in chosen]
    return LeakReport(train=train, test=test, leaks=leaks)


def write_clean_selection(path: Path, report: LeakReport) -> int:
    """Write a selection of the training samples of which nothing is in test, and return their number.

    Raises:
        DataError: every sample leaks.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """
    check_table_output("selection", path)
    clean = report.clean_selection()
    if not len(clean.rows):
        raise DataError(
            f"every sample of {report.train.path} has an item that is in {report.test.path}, so {path} is not written; "
            "raise --cosine"
        )
    write_selection(path, report.train, clean, {"method": "leaks", **report.to_json()})
    return len(clean.rows)


def _named_features(train: Cache, feature: NamedFeatures, common: Sequence[str]) -> dict[str, str]:
    """Return modality -> the feature that is named for it; SettingError for another modality, or two names."""
    named = features_by_modality(train, feature)
    for modality, names in named.items():
        if modality not in common:
            raise SettingError(f"feature: expected a modality of both caches, {' or '.join(common)}, got {modality}")
        if len(names) > 1:
            raise SettingError(f"feature: expected one {modality} feature, got {' and '.join(names)}; omit one")
    return {modality: names[0] for modality, names in named.items() if names}


def _find_leaks(
    train: Cache,
    test: Cache,
    features: tuple[InputFeature, InputFeature, str | None],
    settings: LeakSettings,
    progress: Progress,
) -> ModalityLeaks:
    """Compare the items of two features; with a reason, as of `_choose_features`, only their hashes."""
    train_feature, test_feature, reason = features
    modality = test_feature.modality
    train_items, test_items = _items(train, train_feature), _items(test, test_feature)
    copies, train_is_copy = _find_copies(train_feature, train_items, test_feature, test_items)
    is_copy: Bools = copies >= 0
    sets = ItemSets(
        train=train_feature,
        test=test_feature,
        num_train=len(train_items.rows),
        test_rows=test_items.rows,
        is_copy=is_copy,
    )
    cosine = settings.cosines.get(modality)
    found = find_closest_items(sets, cosine, settings, progress) if reason is None and cosine is not None else None
    match = found.closest if found else _unknown(len(test_items.rows), len(train_items.rows))
    rows = np.append(train_items.rows, -1)[match.rows]  # -1 stays -1
    return ModalityLeaks(
        modality=modality,
        feature=None if reason else test_feature.name,
        reason=reason,
        cosine=cosine,
        test=test_items,
        train=train_items,
        train_rows=np.where(is_copy, copies, rows),
        cosines=np.where(is_copy, np.float32(1), match.sims),
        is_copy=is_copy,
        train_cosines=np.where(train_is_copy, np.float32(1), match.candidate_sims),
        train_is_copy=train_is_copy,
        num_clusters=found.num_clusters if found else None,
        complete=found.complete if found else None,
        recall=found.recall if found else None,
    )


def _unknown(num_test: int, num_train: int) -> Closest:
    sims = [np.full(count, np.float32(-np.inf)) for count in (num_test, num_train)]
    return Closest(np.full(num_test, -1), *sims)


def _find_copies(
    train_feature: InputFeature, train_items: Items, test_feature: InputFeature, test_items: Items
) -> tuple[Ints, Bools]:
    """Return the first training row with the bytes of each test item, -1 if there is none, and which are copied."""
    train_hashes, test_hashes = train_feature.hashes_of(train_items.rows), test_feature.hashes_of(test_items.rows)
    contents = pc.unique(test_hashes)
    numbers_C = pc.fill_null(pc.index_in(train_hashes, value_set=contents, skip_nulls=True), -1).to_numpy()
    is_copy_C: Bools = numbers_C >= 0
    first_F = np.full(len(contents) + 1, -1, np.int64)  # the last is that of a test item without a hash
    first_F[numbers_C[is_copy_C][::-1]] = train_items.rows[is_copy_C][::-1]
    numbers_Q = pc.fill_null(pc.index_in(test_hashes, value_set=contents, skip_nulls=True), -1).to_numpy()
    return first_F[numbers_Q], is_copy_C


def _choose_features(
    train: Cache, test: Cache, modality: str, name: str | None, settings: LeakSettings
) -> tuple[InputFeature, InputFeature, str | None]:
    """Open a feature of both caches; without a limit or of different encoders, return why only hashes are compared."""
    are_vectors = [_are_vectors_hashed(cache, modality) for cache in (train, test)]
    if modality not in settings.cosines or any(are_vectors) != all(are_vectors):
        opened = [open_input(each, modality, name) if name else _any_feature(each, modality) for each in (train, test)]
        return opened[0], opened[1], _NO_LIMIT if any(are_vectors) == all(are_vectors) else _OTHER_HASHES
    are_imported = all(cache.info.source.get("type") == IMPORTED_SOURCE for cache in (train, test))
    step = f"; {IMPORT_TOGETHER}" if are_imported else ""
    name = name or _common_feature(train, test, modality)
    if name is None:
        names = [", ".join(feature.name for feature in cache.features(modality)) for cache in (train, test)]
        reason = f"no encoder made {modality} features of both: {names[0]} in training, {names[1]} in test"
        return _any_feature(train, modality), _any_feature(test, modality), reason + step
    train_feature, test_feature = open_input(train, modality, name), open_input(test, modality, name)
    differences = name_differences(train_feature.fingerprint, test_feature.fingerprint)
    if not differences and train_feature.name == test_feature.name:
        return train_feature, test_feature, None
    names = [f"{feature.name} of {feature.spec}" for feature in (train_feature, test_feature)]
    differ = "; ".join(differences[:2]) or "the features differ"
    reason = f"{names[0]} in training and {names[1]} in test are of different encoders ({differ})"
    return train_feature, test_feature, reason + step


def _are_vectors_hashed(cache: Cache, modality: str) -> bool:
    """Return whether the hashes of a modality are those of imported vectors, also of features derived from these."""
    is_imported = cache.info.source.get("type") == IMPORTED_SOURCE
    return modality != "text" and (is_imported or any(group.is_imported for group in cache.encoders(modality)))


def _common_feature(train: Cache, test: Cache, modality: str) -> str | None:
    """Return the only feature that both have by one encoder, derived ones aside; None if there is none."""
    others = {feature.name: feature for feature in train.default_features(modality)}
    both = [
        feature.name
        for feature in test.default_features(modality)
        if feature.name in others and not name_differences(others[feature.name].fingerprint, feature.fingerprint)
    ]
    if len(both) > 1:
        raise SettingError(
            f"feature: expected one of the several {modality} features of both caches, got none; choose one with "
            f"--feature {modality}=NAME: {', '.join(both)}"
        )
    return both[0] if both else None


def _any_feature(cache: Cache, modality: str) -> InputFeature:
    """Open a complete feature, for its hashes."""
    *others, last = cache.features(modality)
    for feature in others:
        with suppress(UnfinishedError):
            feature.require_complete()
            return InputFeature([feature])
    last.require_complete()
    return InputFeature([last])


def _items(cache: Cache, feature: InputFeature) -> Items:
    items = read_items([cache], [feature], is_numbered=False)
    if not len(items.rows):
        raise DataError(
            f"feature {feature.name}: expected encoded items, got none; see: embedcache inspect {quoted(cache.path)}"
        )
    return items


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
