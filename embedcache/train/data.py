"""The input of a training run: two features of one or several caches, and their pairs, divided by the run's split."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

import numpy as np

from embedcache.arrays import Floats, Inputs, Ints, distinct
from embedcache.dataset.inputs import (
    PLAIN,
    InputFeature,
    NamedFeatures,
    Reader,
    check_same_view,
    choose_pair,
    gather,
    join_readers,
    open_input,
    view_feature,
)
from embedcache.dataset.pairs import Pairs, pair_items, shared_samples
from embedcache.dataset.selections import read_selection
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import PARTS, Split, make_split, read_split, write_split
from embedcache.dataset.where import samples_within
from embedcache.errors import DataError, SettingError, pluralize
from embedcache.files import AnyPath, one_or_many, read_file, write_atomic
from embedcache.modalities import MODALITIES, order_pair
from embedcache.progress import NullProgress, Progress
from embedcache.provenance import check_same, digest, digest_file
from embedcache.runs import SPLIT, RunInput
from embedcache.settings import to_flat
from embedcache.store.cache import Cache, Keys
from embedcache.train.distributed import run_on_first
from embedcache.train.settings import TrainSettings


def parse_views(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return modality -> view -> probability for words such as `image=plain:2,flip:1` or `audio=plain,noise`.

    Raises:
        SettingError: a word has another form, a modality or a view is named twice, or a weight is not positive.
    """
    views: dict[str, dict[str, float]] = {}
    for word in words:
        modality, _, parts = word.partition("=")
        is_valid = modality in MODALITIES and modality not in views

        weights: dict[str, float] = {}
        for part in parts.split(","):
            name, _, number = part.partition(":")
            try:
                weight = float(number or 1)
            except ValueError:
                weight = math.nan  # fails the comparison below
            is_valid = is_valid and name != "" and name not in weights and 0 < weight < math.inf
            weights[name] = weight

        if not is_valid:
            raise SettingError(
                f"views: expected one word per modality of {', '.join(MODALITIES)}, of different views with weights "
                f"above 0, as in image=plain:0.5,flip:0.5, got {word!r}"
            )

        total = sum(weights.values())
        views[modality] = {name: weight / total for name, weight in weights.items()}
    return views


@dataclass(frozen=True, kw_only=True)
class DrawnViews:
    """Reads each row from a view that is drawn for it from the seed and the epoch, for any number of processes.

    Args:
        readers: view -> reader of its rows.
        probabilities: view -> probability, in the order of `readers`.
        num_rows: rows of the feature.
        seed: random seed.
        side: 0 or 1, so that the views of both sides of a pair are drawn independently.
    """

    readers: Mapping[str, Reader]
    probabilities: Mapping[str, float]
    num_rows: int
    seed: int
    side: int

    def draw(self, epoch: int) -> Ints:
        """Return the number of the view of each row in an epoch: (N,) int64."""
        rng = np.random.default_rng([self.seed, epoch, 1 + self.side])
        bounds: Floats = np.cumsum(list(self.probabilities.values()))[:-1]
        numbers: Ints = np.searchsorted(bounds, rng.random(self.num_rows), side="right")
        return numbers

    def read(self, rows: Ints, views: Ints) -> Inputs:
        """Read each row from the view of a number."""
        return gather(self.readers.values(), rows, views)


Paths: TypeAlias = AnyPath | Sequence[AnyPath]
_MAPPED_BLOCK_ROWS = 64


def open_data(
    paths: Paths, feature: NamedFeatures, *, memory_bytes: int, progress: Progress | None = None
) -> "TrainData":
    """Open the same features of two modalities of one or several caches.

    The features of a modality that fit into half of `memory_bytes` are loaded once.

    Args:
        paths: one cache, or several.
        feature: features of two modalities, see `choose_pair`; several of one encoder are joined by `+`.
        memory_bytes: for both features.
        progress: progress of loading them, when they are first read.

    Raises:
        SettingError: not two modalities, or no cache.
        UnknownNameError: there is no feature of that name.
        FingerprintError: different encoders made the feature of two caches.
        DataError: widths differ, or two caches contain the same samples.
    """
    caches = list(map(Cache, one_or_many(paths)))
    if not caches:
        raise SettingError("expected at least one cache, got none")

    # Either cache of two may contain the samples of the other.
    for first, second in combinations(caches, 2):
        if first.info.has_rows_of(second.info.index_digest) or second.info.has_rows_of(first.info.index_digest):
            raise DataError(
                f"expected caches of different samples, got the same in {second.path} and {first.path}; name one"
            )

    name_by_modality = choose_pair(caches[0], feature)
    sides: dict[str, list[InputFeature]] = {}
    for modality in order_pair(name_by_modality):
        sides[modality] = [open_input(cache, modality, name_by_modality[modality]) for cache in caches]

    for features in sides.values():
        for cache, cache_feature in zip(caches[1:], features[1:], strict=True):
            _check_same_feature(caches[0], features[0], cache, cache_feature)
    return TrainData(caches=caches, sides=sides, memory_bytes=memory_bytes, progress=progress or NullProgress())


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Features of two modalities of some caches, in the order of `order_pair`.

    Rows and samples are numbered across the caches, in their order.

    Features that fit the memory are loaded once, so that many runs can share this object. A feature larger than half
    of `memory_bytes` is memory-mapped.
    """

    caches: Sequence[Cache]
    sides: Mapping[str, Sequence[InputFeature]]
    memory_bytes: float
    progress: Progress = field(default_factory=NullProgress)

    @property
    def features(self) -> dict[str, InputFeature]:
        """Modality -> feature of the first cache."""
        return {modality: features[0] for modality, features in self.sides.items()}

    @property
    def index_digest(self) -> str:
        """Digest of the sample and item tables of the cache, joined by `+` for several caches."""
        digests = [cache.info.index_digest for cache in self.caches]
        return "+".join(digests)

    @property
    def keys(self) -> Sequence[str]:
        return Keys(self.caches)

    def split(self, pairs: Pairs, settings: SplitSettings, *, progress: Progress | None = None) -> Split:
        """Split the samples. Features are loaded only for a strict split."""
        readers = self.readers if settings.kind == "strict" else {}
        split = make_split(self.caches, pairs, settings, readers, progress=progress)

        # A split that the user names may be older than the cache.
        if settings.path is not None and progress is not None:
            num_all = split.parts.count("")
            num_missing = sum(map(len, self.caches)) - len(distinct(pairs.samples))
            if num_other := num_all - num_missing:
                progress.note(
                    f"left out {pluralize(num_all, 'sample')}: {num_missing:,} without both features, {num_other:,} "
                    f"in no part of {settings.path}, such as those that were appended since it was written"
                )
        return split

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """Modality -> reader of its rows."""
        readers: dict[str, Reader] = {}
        for modality, features in self.sides.items():
            readers[modality] = _reader(features, self.memory_bytes / 2, self.progress)
        return readers

    @property
    def is_mapped(self) -> bool:
        """Whether a feature is too large to be loaded."""
        return not all(_fits(features, self.memory_bytes / 2) for features in self.sides.values())

    @property
    def block_rows(self) -> int:
        """Default size of shuffled blocks in rows, more than one if a feature is read from disk."""
        return _MAPPED_BLOCK_ROWS if self.is_mapped else 1

    def pairs(self, language: str | None, *, where: str | None = None, progress: Progress | None = None) -> Pairs:
        """Pair the items of the samples that meet a condition; see `pair_items` and `rows_where`."""
        # Reading the hashes takes long, so a wrong condition is found before.
        samples = samples_within(self.caches, None, where)
        first, second = self.sides.values()
        pairs = pair_items(self.caches, first, second, language=language, progress=progress)
        if samples is None:
            return pairs

        pairs = pairs.select(samples)
        if not len(pairs.samples):
            raise DataError(f"where: expected samples with both features and {where}, got none; loosen the condition")
        return pairs

    def open_views(self, modality: str, views: Iterable[str]) -> dict[str, list[InputFeature]]:
        """Open views of a side's feature in every cache: view -> features.

        Raises:
            UnknownNameError: a cache has no such view. The message lists its features.
            FingerprintError: the features differ in more than their view.
            UnfinishedError: a view has missing chunks.
        """
        features_by_view: dict[str, list[InputFeature]] = {}
        for view in views:
            features_by_view[view] = []
            for cache, plain in zip(self.caches, self.sides[modality], strict=True):
                feature = open_input(cache, modality, view_feature(plain.name, view))
                feature.require_complete()

                next_step = f"{feature.name} is no view of it"
                check_same_view(plain.name, plain.fingerprint, feature.fingerprint, view, next_step=next_step)
                features_by_view[view].append(feature)
        return features_by_view

    def draw_views(self, modality: str, views: Mapping[str, float], seed: int) -> DrawnViews:
        """Return a reader of a side that draws views, given view -> probability."""
        # The views share the memory of a side; the plain one has its reader already.
        memory_bytes = self.memory_bytes / 2 / len(views)
        readers: dict[str, Reader] = {}
        for view, features in self.open_views(modality, views).items():
            is_plain = view == PLAIN
            readers[view] = self.readers[modality] if is_plain else _reader(features, memory_bytes, self.progress)

        return DrawnViews(
            readers=readers,
            probabilities=views,
            num_rows=sum(feature.num_items for feature in self.sides[modality]),
            seed=seed,
            side=list(self.sides).index(modality),
        )

    def with_views(self, pairs: Pairs, views: Mapping[str, Iterable[str]]) -> Pairs:
        """Return the pairs whose items have all of the views of their side."""
        sides = []
        for (modality, _), items in zip(self.sides.items(), (pairs.first, pairs.second), strict=True):
            for features in self.open_views(modality, views.get(modality, ())).values():
                is_valid_by_cache = [feature.valid for feature in features]
                items = items.where(np.concatenate(is_valid_by_cache)[items.rows])
            sides.append(items)

        # A sample whose items of one side are all left out has no pair.
        samples = shared_samples(sides[0], sides[1])
        return Pairs(first=sides[0].select(samples), second=sides[1].select(samples))


def _check_same_feature(first_cache: Cache, first: InputFeature, cache: Cache, feature: InputFeature) -> None:
    if first.name != feature.name or first.width != feature.width:
        raise DataError(
            f"{cache.path}: expected {first.name} of width {first.width}, as in {first_cache.path}, got {feature.name} "
            f"of width {feature.width}; use caches that have the same feature"
        )

    check_same(
        f"{first.name} of {first_cache.path}",
        first.fingerprint,
        feature.fingerprint,
        next_step=f"the second value is that of {cache.path}: use caches made by one encoder",
    )


def describe_input(feature: InputFeature) -> RunInput:
    """Return the entry of a feature among the inputs of a run."""
    return RunInput(
        modality=feature.modality,
        feature=feature.name,
        spec=feature.spec,
        fingerprint=feature.fingerprint,
        width=feature.width,
    )


def _fits(features: Sequence[InputFeature], memory_bytes: float) -> bool:
    num_bytes = 0.0
    for feature in features:
        num_bytes += feature.num_bytes
    return num_bytes <= memory_bytes


def _reader(features: Sequence[InputFeature], memory_bytes: float, progress: Progress) -> Reader:
    is_loaded = _fits(features, memory_bytes)
    readers: list[Reader] = []
    nums_items: list[int] = []
    for feature in features:
        readers.append(feature.load(progress=progress) if is_loaded else feature.read)
        nums_items.append(feature.num_items)
    return join_readers(readers, nums_items)


@dataclass(frozen=True, kw_only=True)
class DividedPairs:
    """The pairs of the training and of the validation part.

    Args:
        num_samples: part -> number of samples with both features. In training, only the used samples count.
        num_held_out: number of selected samples in the validation or test part. None without a selection.
    """

    training: Pairs
    validation: Pairs
    num_samples: dict[str, int]
    num_held_out: int | None


def divide_pairs(data: TrainData, run_path: Path, settings: TrainSettings, progress: Progress) -> DividedPairs:
    """Pair the items of both features and divide them by the split of the run, which is made unless it exists.

    Memory: 24 bytes per item of the parts, and for a moment about 150 per sample. The split and the other pairs are not
    kept.

    Raises:
        DataError: the training or the validation part has no pairs.
    """
    # A strict split may take hours, so a wrong key in the selection is found before.
    selected = None
    if settings.selection_path is not None:
        selected = read_selection(settings.selection_path, data.caches)

    # The first process writes the split, which the others then read; so does a run that was interrupted.
    pairs = data.pairs(settings.language, where=settings.where, progress=progress)
    new_split = run_on_first(lambda: write_run_split(data, pairs, run_path, settings, progress))
    split = new_split or read_split(run_path / SPLIT, data.caches)

    training = _shuffle_pairs(_training_pairs(data, pairs, split, selected, settings), settings)
    validation = _shuffle_pairs(pairs.select(split.rows("val")), settings)
    if not len(validation.samples):
        raise DataError(
            f"validation part of {run_path / SPLIT}: expected samples with both features, got none; check --language"
        )

    counts: dict[str, int] = dict(zip(PARTS, map(split.parts.count, PARTS), strict=True))
    if num_left_out := split.parts.count(""):
        counts["left out"] = num_left_out

    return DividedPairs(
        training=training,
        validation=validation,
        num_samples={**counts, "train": len(training.samples)},
        num_held_out=None if selected is None else int((split.mask("val") | split.mask("test"))[selected].sum()),
    )


def write_run_split(
    data: TrainData, pairs: Pairs, run_path: Path, settings: TrainSettings, progress: Progress
) -> Split | None:
    """Write the split of a run and a copy of its selection, and return the split. None if it exists already."""
    path = run_path / SPLIT
    if path.is_file():
        return None

    if settings.selection_path is not None:
        suffix = settings.selection_path.suffix or ".txt"
        write_atomic(run_path / f"selection{suffix}", read_file(settings.selection_path))

    # Only a user who did not name a split may have expected that the column is followed.
    is_default = settings.split.kind == "strict" and "split" not in to_flat(settings)
    if is_default and any("split" in cache.columns for cache in data.caches):
        progress.note("--split strict ignores the column 'split' of the samples; --split column follows it")

    # The split is written last: if it exists, so does the copy of the selection.
    split = data.split(pairs, settings.split, progress=progress)
    write_split(path, data.caches, split)
    return split


def _training_pairs(
    data: TrainData, pairs: Pairs, split: Split, selected: Ints | None, settings: TrainSettings
) -> Pairs:
    """Return the pairs of the training part that are in the selection, if there is one, with the views of both sides.

    Raises:
        DataError: there are none.
    """
    rows: Ints = split.rows("train")
    if selected is not None:
        rows = np.intersect1d(rows, selected, assume_unique=True)

    views = parse_views(settings.views)
    training = data.with_views(pairs.select(rows), views) if views else pairs.select(rows)
    if not len(training.samples):
        if selected is None:
            raise DataError("training part: expected samples with both features, got none; check --language")
        num_held_out = int((split.mask("val") | split.mask("test"))[selected].sum())
        raise DataError(
            f"training part in selection {settings.selection_path}: expected samples with both features, got none: "
            f"{num_held_out:,} of {len(selected):,} selected samples are of other parts; check them, and --language"
        )
    return training


def _shuffle_pairs(pairs: Pairs, settings: TrainSettings) -> Pairs:
    """Assign each sample's second items, to another sample if `shuffle_pairs` is set, so that only chance remains."""
    if not settings.shuffle_pairs:
        return pairs

    # Whole samples are permuted, so that the second items of one stay together.
    samples = pairs.samples
    shuffled = np.random.default_rng(settings.seed).permutation(samples)
    second = replace(pairs.second, samples=shuffled[np.searchsorted(samples, pairs.second.samples)])
    return Pairs(first=pairs.first, second=second)


def digest_inputs(data: TrainData, settings: TrainSettings) -> dict[str, str]:
    """Return SHA-256 digests that identify the inputs of a run in addition to its settings and features.

    They are of the files that settings name and of the fingerprints of the views that are drawn. `failed_digests` are
    among them.
    """
    views = parse_views(settings.views)
    for modality in views:
        if modality not in data.sides:
            raise SettingError(f"views: expected views of {' or '.join(data.sides)}, got {modality}")

    files = {"split": settings.split.path, "selection": settings.selection_path}
    for number, path in enumerate(settings.negatives_paths):
        files[f"negatives {number}"] = path

    # A file that does not exist is refused by its reader, with an error that says what is expected.
    digests: dict[str, str] = {}
    for name, file in files.items():
        if file is not None and file.is_file():
            digests[name] = digest_file(file)

    # The settings name the views; their fingerprints tell how they were made.
    for modality, weights in views.items():
        for view, features in data.open_views(modality, weights).items():
            digests[f"view {modality}@{view}"] = digest(features[0].fingerprint)
    return {**digests, **failed_digests(data, settings.views)}


def failed_digests(data: TrainData, views: Sequence[str] = ()) -> dict[str, str]:
    """Return the SHA-256 of the rows that lack a feature, by names such as `failed image` and `failed image@flip`.

    Sides and views that all items have are left out. Only commits are read.

    Args:
        data: the features.
        views: views, as the setting of training names them.

    Raises:
        UnfinishedError: a feature has missing chunks.
    """
    sides = dict(data.sides)
    for modality, weights in parse_views(views).items():
        for view, view_features in data.open_views(modality, weights).items():
            # The plain view is the side itself.
            if view != PLAIN:
                sides[f"{modality}@{view}"] = view_features

    digests: dict[str, str] = {}
    for name, features in sides.items():
        num_failed = 0
        hashes: list[str] = []
        for feature in features:
            feature.require_complete()
            failed_rows = feature.failed_rows
            num_failed += len(failed_rows)
            hashes.append(hashlib.sha256(failed_rows.tobytes()).hexdigest())

        if num_failed:
            digests[f"failed {name}"] = digest(hashes)
    return digests
