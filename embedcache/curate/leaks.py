"""Find leaks: test samples that are in a training cache, as exact copies by hash or as near-duplicates by cosine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pyarrow as pa

from embedcache.arrays import Bools, Floats, Ints, distinct
from embedcache.curate.settings import LeakSettings
from embedcache.dataset.inputs import InputFeature, NamedFeatures, features_by_modality, open_input
from embedcache.dataset.matches import ItemSet, NearItems, find_equal, find_near
from embedcache.dataset.pairs import Items, read_items
from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import DataError, SettingError, summary
from embedcache.files import AnyPath
from embedcache.modalities import IMPORTED_SOURCE, MODALITIES, noun, order_pair
from embedcache.neighbors.pairs import cosine_limit
from embedcache.progress import AnyProgress, Progress, to_progress
from embedcache.provenance import check_table_output, name_differences
from embedcache.settings import merge_settings
from embedcache.sources.open import IMPORT_TOGETHER
from embedcache.store.cache import Cache

if TYPE_CHECKING:
    from embedcache.options import LeakOptions

_OTHER_HASHES = (
    "the hashes of imported vectors are not those of files; extract the files of both, or import the vectors of both"
)


@dataclass(frozen=True, kw_only=True)
class ModalityLeaks:
    """Q test items of one modality, and their copies and near-duplicates in a training cache of C items."""

    modality: str
    feature: str | None  # compared feature; None if only copies were searched
    reason: str | None  # why only copies were searched
    cosine: float  # limit of near-duplicates
    test: Items
    train: Items
    train_rows: Ints  # (Q,) row of the training item closest to each test item; -1 if unknown
    cosines: Floats  # (Q,) cosine of the two; 1 for a copy, -inf if unknown
    is_copy: Bools  # (Q,)
    train_cosines: Floats  # (C,) largest cosine of each training item to a test item that it was compared with
    train_is_copy: Bools  # (C,)
    near: NearItems | None  # how completely near-duplicates were searched; None if only copies were searched

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
        return is_copy | (cosines >= cosine_limit(self.cosine))

    @property
    def highest(self) -> float | None:
        """Largest cosine of two items that are not equal, None if there is none."""
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
            "num_samples_copied": len(self.copied_samples),
            "num_samples_leaked": len(self.leaked_samples),
            "num_train_samples": len(self.train_samples),
            "highest_cosine": self.highest,
            "num_clusters": self.near.num_clusters if self.near else None,
            "complete": self.near.complete if self.near else None,
            "recall": self.near.recall.to_json() if self.near and self.near.recall else None,
        }


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """Overlap of a test cache with a training cache.

    Args:
        train: the training cache.
        test: the test cache.
        leaks: leaks of each modality that both caches have features of.

    Example:
        >>> features = {"image": "open_toy/cls", "text": "open_toy/mean"}
        >>> report = embedcache.find_leaks("train-cache", "test-cache", feature=features)
        >>> [leak.modality for leak in report.leaks], len(report.leaked_samples)
        (['image', 'text'], 40)
    """

    train: Cache
    test: Cache
    leaks: Sequence[ModalityLeaks]

    @property
    def num_train_samples(self) -> int:
        """Number of training samples, without samples that were removed from their cache."""
        return len(self.train) - len(self.train.removed)

    @property
    def num_test_samples(self) -> int:
        """Number of test samples, without samples that were removed from their cache."""
        return len(self.test) - len(self.test.removed)

    @property
    def leaked_samples(self) -> Ints:
        """Test samples with an item that is in training, ascending."""
        return distinct(np.concatenate([leak.leaked_samples for leak in self.leaks]))

    __repr__ = summary

    def line(self) -> str:
        """Return how many test samples leaked, in one line."""
        count = len(self.leaked_samples)
        num_samples = self.num_test_samples
        is_or_are = "is" if count == 1 else "are"
        leaked = f"{count:,} of {num_samples:,} samples of {self.test.path} ({count / max(1, num_samples):.1%})"
        return f"{leaked} {is_or_are} in {self.train.path}"

    def clean_selection(self) -> Selection:
        """Select the training samples without an item in test, with the largest cosine of each to a test item."""
        excluded = np.concatenate([self.train.removed, *(leak.train_samples for leak in self.leaks)])
        rows = np.setdiff1d(np.arange(len(self.train)), distinct(excluded), assume_unique=True)

        columns = {}
        for leak in self.leaks:
            if leak.feature:
                # A sample may have several items; the closest one counts.
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
    **options: Unpack["LeakOptions"],
) -> LeakReport:
    """Find the items of a test cache that are in a training cache.

    Copies are found by the hashes of bytes and captions, whatever the encoders. Near-duplicates need the same feature
    of the same encoder in both caches. The default limits are also used by strict splits and by the overlap check of
    evaluations.

    Each test item is compared with each training item up to 4 × 10¹² multiplications, such as 5,000 × 1,000,000 items
    of width 768. This lasts about a minute on two cores. Beyond that, or with `all_pairs=False`, items are compared
    only within clusters, and the recall is measured. Time, memory and scratch space are as in `find_near`.

    Args:
        train: the training cache.
        test: the test cache.
        settings: limits of near-duplicates, the features to compare, whose tokens are averaged, and whether all pairs
            are compared.
        feature: features of both caches, such as `audio=tiny.en/mean`, or a mapping from modality to feature.
        progress: progress in pairs.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        SettingError: one cache is given twice, both have several features in common, or a named feature has a modality
            that one of them lacks.
        DataError: the caches have no modality in common that can be compared, or a feature has no encoded item.
        UnknownNameError: there is no such feature.
        UnfinishedError: chunks of a feature are missing.

    Example:
        >>> features = {"image": "open_toy/cls", "text": "open_toy/mean"}
        >>> report = embedcache.find_leaks("train-cache", "test-cache", feature=features)
        >>> report.num_train_samples, report.num_test_samples
        (80, 40)
    """
    settings = merge_settings(LeakSettings, settings, options)
    progress = to_progress(progress)
    train = Cache(train)
    test = Cache(test)
    if train.info.has_rows_of(test.info.index_digest):
        raise SettingError(f"expected two caches, got {train.path} and {test.path}, which hold the same samples")

    common = []
    for name in order_pair(MODALITIES):
        if not (train.features(name) and test.features(name)):
            continue
        if _are_vectors_hashed(train, name) == _are_vectors_hashed(test, name):
            common.append(name)
        else:
            progress.note(f"{noun(name)} are not compared: {_OTHER_HASHES}")
    if not common:
        raise DataError(f"{train.path} and {test.path}: expected items of one modality to compare, got none in common")
    requested = features_by_modality(train, feature)
    for modality in requested:
        if modality not in common:
            raise SettingError(f"feature: expected a modality of both caches, {' or '.join(common)}, got {modality}")

    # All features are chosen first, so that a wrong one is rejected before the work on another.
    chosen = [_choose_features(train, test, name, requested.get(name)) for name in common]
    leaks = []
    for train_feature, test_feature, reason in chosen:
        train_set = _open_items(train, train_feature)
        test_set = _open_items(test, test_feature)
        leaks.append(_find_leaks(train_set, test_set, reason, settings, progress))
    return LeakReport(train=train, test=test, leaks=leaks)


def write_clean_selection(path: Path, report: LeakReport) -> int:
    """Write a selection of the training samples without an item in test, and return their number.

    Raises:
        DataError: every sample leaks.
        PathError: the path does not end in `.parquet`; or the errors of `check_output`.
    """
    check_table_output("selection", path)
    clean = report.clean_selection()
    if not len(clean.rows):
        raise DataError(f"every sample of {report.train.path} has an item in {report.test.path}; raise --cosine")
    write_selection(path, report.train, clean, {"method": "leaks", **report.to_json()})
    return len(clean.rows)


def _find_leaks(
    train_set: ItemSet, test_set: ItemSet, reason: str | None, settings: LeakSettings, progress: Progress
) -> ModalityLeaks:
    """Compare the items of two features. With a reason from `_choose_features`, compare only their hashes."""
    modality = test_set.feature.modality
    cosine = settings.cosines[modality]
    copies, train_is_copy = find_equal(test_set, train_set)
    is_copy: Bools = copies >= 0
    train_rows = copies
    cosines: Floats = np.full(len(is_copy), -np.inf, np.float32)
    train_cosines: Floats = np.full(len(train_is_copy), -np.inf, np.float32)

    # Copies are settled by their hashes; only the other test items are compared by cosine.
    near = None
    if reason is None:
        near = find_near(
            test_set,
            train_set,
            cosine,
            is_probe=~is_copy,
            all_pairs=settings.all_pairs,
            seed=settings.seed,
            scratch=settings.scratch,
            device=settings.device,
            progress=progress,
        )
        train_rows = np.where(is_copy, copies, np.append(train_set.items.rows, -1)[near.closest])  # -1 stays -1
        cosines = near.sims
        train_cosines = near.other_sims

    return ModalityLeaks(
        modality=modality,
        feature=None if reason else test_set.feature.name,
        reason=reason,
        cosine=cosine,
        test=test_set.items,
        train=train_set.items,
        train_rows=train_rows,
        cosines=np.where(is_copy, np.float32(1), cosines),
        is_copy=is_copy,
        train_cosines=np.where(train_is_copy, np.float32(1), train_cosines),
        train_is_copy=train_is_copy,
        near=near,
    )


def _choose_features(
    train: Cache, test: Cache, modality: str, names: Sequence[str] | None
) -> tuple[InputFeature, InputFeature, str | None]:
    """Open a feature of both caches. If their encoders differ, also return why only hashes are compared."""
    if not names:
        names = _common_features(train, test, modality)
    if names and len(names) > 1:
        raise SettingError(f"feature: expected one of {modality}, got {' and '.join(names)}; name it with --feature")

    name = names[0] if names else None
    train_feature = open_input(train, modality, name or train.features(modality)[0].name)
    test_feature = open_input(test, modality, name or test.features(modality)[0].name)

    reason = None
    differences = name_differences(train_feature.fingerprint, test_feature.fingerprint)
    if name is None:
        train_names = _feature_names(train, modality)
        test_names = _feature_names(test, modality)
        reason = f"no encoder made {modality} features of both: {train_names} in training, {test_names} in test"
    elif differences or train_feature.name != test_feature.name:
        reason = (
            f"{train_feature.name} of {train_feature.spec} in training and {test_feature.name} of {test_feature.spec} "
            f"in test are of different encoders ({'; '.join(differences[:2]) or 'the features differ'})"
        )
    if reason is not None and _is_imported(train) and _is_imported(test):
        reason += f"; {IMPORT_TOGETHER}"
    return train_feature, test_feature, reason


def _feature_names(cache: Cache, modality: str) -> str:
    return ", ".join(feature.name for feature in cache.features(modality))


def _is_imported(cache: Cache) -> bool:
    return bool(cache.info.source.get("type") == IMPORTED_SOURCE)


def _are_vectors_hashed(cache: Cache, modality: str) -> bool:
    """Return whether the hashes of a modality were computed from imported vectors, also for derived features."""
    if modality == "text":
        return False
    return _is_imported(cache) or any(group.is_imported for group in cache.encoders(modality))


def _common_features(train: Cache, test: Cache, modality: str) -> list[str]:
    """Return the names of the features that both have from the same encoder, without derived features."""
    fingerprints = {feature.name: feature.fingerprint for feature in train.default_features(modality)}
    return [
        feature.name
        for feature in test.default_features(modality)
        if feature.name in fingerprints and not name_differences(fingerprints[feature.name], feature.fingerprint)
    ]


def _open_items(cache: Cache, feature: InputFeature) -> ItemSet:
    items = read_items([cache], [feature], is_numbered=False)
    if not len(items.rows):
        raise DataError(f"feature {feature.name} of {cache.path}: expected encoded items, got none")
    return ItemSet(feature, items)
