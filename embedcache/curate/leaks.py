"""What of one cache is in another: copies by hash, and near-duplicates by cosine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.dedup import check_cosine
from embedcache.curate.links import cosine_limit
from embedcache.dataset.inputs import InputFeature, open_input, unit_vectors
from embedcache.dataset.pairs import Items, read_items
from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import DataError, SettingError, UnfinishedError
from embedcache.metrics.neighbors import Closest, closest
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import name_differences
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature

MODALITIES = ("image", "text")
COSINE = 0.95
_MOST_QUERIES = 65_536


@dataclass(frozen=True, kw_only=True)
class ModalityLeaks:
    """What of the test items of one modality is in training.

    Args:
        modality: `image` or `text`.
        feature: that near-duplicates were looked for with; None where only copies were.
        reason: why only copies were.
        cosine: limit of near-duplicates.
        test: the items of the test cache.
        train: those of the training cache.
        train_rows: (Q,) int64, for each test item the row of the closest training item; -1 where none is known.
        cosines: (Q,) float32 of the two; -inf where none is known; 1 for a copy.
        is_copy: (Q,) bool.
        train_cosines: (C,) float32, how close each training item comes to a test item; 1 for a copy.
        train_is_copy: (C,) bool.
    """

    modality: str
    feature: str | None
    reason: str | None
    cosine: float
    test: Items
    train: Items
    train_rows: Ints
    cosines: Floats
    is_copy: Bools
    train_cosines: Floats
    train_is_copy: Bools

    @property
    def is_leaked(self) -> Bools:
        """(Q,) whether a test item has a copy or a near-duplicate in training."""
        return self.is_copy | (self.cosines >= cosine_limit(self.cosine))

    @property
    def copied_samples(self) -> Ints:
        """Test samples with a copy in training, ascending."""
        return np.unique(self.test.samples[self.is_copy])

    @property
    def leaked_samples(self) -> Ints:
        """Test samples with a copy or a near-duplicate in training, ascending."""
        return np.unique(self.test.samples[self.is_leaked])

    @property
    def train_samples(self) -> Ints:
        """Training samples with a copy or a near-duplicate in test, ascending."""
        is_leaked = self.train_is_copy | (self.train_cosines >= cosine_limit(self.cosine))
        return np.unique(self.train.samples[is_leaked])

    @property
    def highest(self) -> float | None:
        """The largest cosine of two items that are not equal; None where there is none."""
        near = self.cosines[~self.is_copy & np.isfinite(self.cosines)]
        return float(min(1, near.max())) if len(near) else None


@dataclass(frozen=True, kw_only=True)
class LeakReport:
    """What of a test cache is in a training cache.

    Args:
        train: the training cache.
        test: the test cache.
        leaks: of images, of texts, or of both.
    """

    train: Cache
    test: Cache
    leaks: Sequence[ModalityLeaks]

    @property
    def leaked_samples(self) -> Ints:
        """Test samples of which an image or a text is in training, ascending."""
        return np.unique(np.concatenate([leak.leaked_samples for leak in self.leaks]))

    def clean(self) -> Selection:
        """Select the training samples of which nothing is in test, each with how close it comes."""
        leaked = np.concatenate([leak.train_samples for leak in self.leaks])
        rows = np.setdiff1d(np.arange(self.train.info.num_samples), leaked)
        closest_S = [(leak.modality, _by_sample(leak, self.train)) for leak in self.leaks if leak.feature]
        reasons = [
            ", ".join(f"closest {name} {cosines[row]:.3f}" for name, cosines in closest_S if cosines[row] > -1)
            for row in rows.tolist()
        ]
        return Selection(
            rows=rows, reasons=[f"not in test; {reason}" if reason else "not in test" for reason in reasons]
        )

    def to_json(self) -> dict[str, Any]:
        """Give all counts as JSON values."""
        return {
            "train": str(self.train.path),
            "test": str(self.test.path),
            "num_samples": self.test.info.num_samples,
            "num_leaked": len(self.leaked_samples),
            "by": {leak.modality: _to_json(leak) for leak in self.leaks},
        }


def find_leaks(
    train_path: Path | str,
    test_path: Path | str,
    *,
    cosines: Mapping[str, float] | None = None,
    features: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> LeakReport:
    """Find what of a test cache is in a training cache.

    Copies are found by the hashes of bytes and texts, whatever the encoders. Near-duplicates need one feature, by one
    encoder, in both; each test item is compared with each training item, Q C products of P numbers: 5,000 × 1,000,000
    × 768 take a minute on two cores. Memory: at most 65,536 test vectors, and a chunk of the other cache, which is
    read once for each so many.

    Args:
        train_path: the training cache.
        test_path: the test cache.
        cosines: `image`, `text` -> limit of near-duplicates; 0.95 where it is not given.
        features: `image`, `text` -> `encoder/feature`; None is the only one that both have. Tokens are averaged.
        progress: told about pairs.

    Raises:
        SettingError: a cosine out of its range, one cache given twice, or several features that both have.
        DataError: the caches have no modality in common, or a feature has no valid item.
        UnknownNameError: no such feature.
        UnfinishedError: a feature has missing chunks.
    """
    cosines = {**dict.fromkeys(MODALITIES, COSINE), **(cosines or {})}
    for modality, cosine in cosines.items():
        check_cosine(cosine, f"--{modality}-cosine")
    train, test = Cache(train_path), Cache(test_path)
    if train.info.has_rows_of(test.info.index_digest):
        raise SettingError(f"{train_path} and {test_path} hold the same samples; give a cache to train on and another")
    common = [name for name in MODALITIES if train.features(name) and test.features(name)]
    if not common:
        raise DataError(
            f"{train_path} has features of {_modalities(train)} and {test_path} of {_modalities(test)}: nothing can be "
            "compared"
        )
    asked = features or {}
    leaks = [_find(train, test, name, cosines[name], asked.get(name), progress or NullProgress()) for name in common]
    return LeakReport(train=train, test=test, leaks=leaks)


def write_clean_selection(path: Path, leaks: LeakReport) -> None:
    """Write a selection of the training samples of which nothing is in test.

    Raises:
        SettingError: the file is not to be Parquet.
        DataError: everything leaks.
    """
    if path.suffix != ".parquet":
        raise SettingError(f"{path} is to be a selection: give it a name that ends with .parquet")
    write_selection(path, leaks.train, leaks.clean(), {"method": "leaks", **leaks.to_json()})


def _find(
    train: Cache, test: Cache, modality: str, cosine: float, name: str | None, progress: Progress
) -> ModalityLeaks:
    train_side, test_side, reason = _choose(train, test, modality, name)
    train_items, test_items = _items(train, train_side), _items(test, test_side)
    train_hashes, test_hashes = train_side.hashes_of(train_items.rows), test_side.hashes_of(test_items.rows)
    first = dict(zip(reversed(train_hashes), reversed(train_items.rows.tolist()), strict=True))
    copies = np.array([first.get(value, -1) for value in test_hashes], np.int64)
    seen = set(test_hashes)
    train_is_copy = np.array([value in seen for value in train_hashes], bool)
    found = _none(len(test_items.rows), len(train_items.rows))
    if reason is None:
        found = _closest(train_side, train_items, test_side, test_items, progress)
    rows = np.where(found.rows >= 0, train_items.rows[found.rows], -1)
    return ModalityLeaks(
        modality=modality,
        feature=None if reason else test_side.name,
        reason=reason,
        cosine=cosine,
        test=test_items,
        train=train_items,
        train_rows=np.where(copies >= 0, copies, rows),
        cosines=np.where(copies >= 0, np.float32(1), found.sims),
        is_copy=copies >= 0,
        train_cosines=np.where(train_is_copy, np.float32(1), found.candidate_sims),
        train_is_copy=train_is_copy,
    )


def _choose(
    train: Cache, test: Cache, modality: str, name: str | None
) -> tuple[InputFeature, InputFeature, str | None]:
    """Open a feature of both caches; where it is not of one encoder, say so: then hashes are all that is compared."""
    if name is None:
        name = _only_common(train, test, modality)
    if name is None:
        sides = _any(train, modality), _any(test, modality)
        names = [", ".join(feature.name for feature in cache.features(modality)) for cache in (train, test)]
        return *sides, f"no encoder made {modality} features of both: {names[0]} there, {names[1]} here"
    train_side, test_side = open_input(train, modality, name), open_input(test, modality, name)
    differences = name_differences(train_side.fingerprint, test_side.fingerprint)
    if not differences and train_side.name == test_side.name:
        return train_side, test_side, None
    names = [f"{side.name} of {side.spec}" for side in (train_side, test_side)]
    differ = "; ".join(differences[:2]) or "its features differ"
    return train_side, test_side, f"{names[0]} there and {names[1]} here are of other encoders ({differ})"


def _only_common(train: Cache, test: Cache, modality: str) -> str | None:
    """Name the feature that both have by one encoder; None where there is none, and leave the error to `open_input`."""
    others = {feature.name: feature for feature in train.features(modality)}
    both = [
        feature.name
        for feature in test.features(modality)
        if feature.name in others and _is_same(others[feature.name], feature)
    ]
    if len(both) > 1:
        raise SettingError(
            f"both caches have several {modality} features; choose one with --{modality}-feature: {', '.join(both)}"
        )
    return both[0] if both else None


def _is_same(one: Feature, other: Feature) -> bool:
    return not name_differences(one.fingerprint, other.fingerprint)


def _any(cache: Cache, modality: str) -> InputFeature:
    """Open a finished feature, for its hashes."""
    problem: UnfinishedError | None = None
    for feature in cache.features(modality):
        try:
            feature.require_complete()
        except UnfinishedError as error:
            problem = error
            continue
        return InputFeature([feature])
    assert problem is not None
    raise problem


def _items(cache: Cache, side: InputFeature) -> Items:
    items = read_items([cache], [side])
    if not len(items.rows):
        raise DataError(f"feature {side.name} of {cache.path} has no valid item")
    return items


def _none(num_queries: int, num_candidates: int) -> Closest:
    none = np.float32(-np.inf)
    return Closest(np.full(num_queries, -1), np.full(num_queries, none), np.full(num_candidates, none))


def _closest(
    train_side: InputFeature, train_items: Items, test_side: InputFeature, test_items: Items, progress: Progress
) -> Closest:
    """Compare all with all; rows are places in the training items."""
    num_pairs = len(test_items.rows) * len(train_items.rows)
    progress.start(f"comparing {test_side.modality}s", num_pairs, "pairs")
    parts = []
    for block in blocks(len(test_items.rows), _MOST_QUERIES):
        queries_QP = unit_vectors(test_side.read(test_items.rows[block]))
        parts.append(closest(queries_QP, _told(train_side, len(queries_QP), progress)))
    progress.finish()
    return Closest(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.sims for part in parts]),
        np.maximum.reduce([part.candidate_sims for part in parts]),
    )


def _told(side: InputFeature, num_queries: int, progress: Progress) -> Iterator[Floats]:
    for rows, inputs in side.blocks():
        yield unit_vectors(inputs)
        progress.advance(num_queries * len(rows))


def _by_sample(leak: ModalityLeaks, cache: Cache) -> Array:
    """Give how close each sample of the training cache comes to a test item."""
    cosines_S = np.full(cache.info.num_samples, -np.inf, np.float32)
    np.maximum.at(cosines_S, leak.train.samples, leak.train_cosines)
    return cosines_S


def _modalities(cache: Cache) -> str:
    return " and ".join(f"{name}s" for name in MODALITIES if cache.features(name)) or "nothing"


def _to_json(leak: ModalityLeaks) -> dict[str, Any]:
    return {
        "feature": leak.feature,
        "only_copies_because": leak.reason,
        "cosine": leak.cosine,
        "num_test_items": len(leak.test.rows),
        "num_train_items": len(leak.train.rows),
        "num_samples_copied": len(leak.copied_samples),
        "num_samples_leaked": len(leak.leaked_samples),
        "num_train_samples": len(leak.train_samples),
        "highest_cosine": leak.highest,
    }
