"""The input of a training run: features of two modalities of one or several caches, and their pairs."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from embedcache.arrays import Inputs, Ints, distinct
from embedcache.dataset.inputs import (
    PLAIN,
    InputFeature,
    Reader,
    check_same_view,
    default_pair,
    open_input,
    view_feature,
)
from embedcache.dataset.pairs import Pairs, pair_items, shared_samples
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Split
from embedcache.dataset.splitting import make_split
from embedcache.errors import DataError, FingerprintError, SettingError, pluralize
from embedcache.files import AnyPath, one_or_many
from embedcache.modalities import noun, order_pair
from embedcache.progress import NullProgress, Progress
from embedcache.projectors.saved import TowerInput
from embedcache.provenance import check_same, digest
from embedcache.store.cache import Cache
from embedcache.store.keys import key_column
from embedcache.train.settings import TrainSettings
from embedcache.train.views import DrawnViews, merge_inputs, parse_views

Paths: TypeAlias = AnyPath | Sequence[AnyPath]
Names: TypeAlias = str | Sequence[str] | None
"""A feature, or several of one encoder; None: the only one."""

_MAPPED_BLOCK_ROWS = 64


def open_data(
    paths: Paths, features: Mapping[str, str | None], *, memory_bytes: int, progress: Progress | None = None
) -> "TrainData":
    """Open the same features of two modalities of one or several caches.

    The features of a modality that fit into half of `memory_bytes` are loaded once.

    Args:
        paths: one cache, or several.
        features: modality -> `encoder/feature`, or several of one encoder joined by `+`; None: the only one. Images
            and texts, both without a name, stand for the modalities of `default_pair`.
        memory_bytes: for both features.
        progress: progress of loading them, when they are first read.

    Raises:
        SettingError: not two modalities, or no cache.
        UnknownNameError: there is no feature of that name.
        FingerprintError: different encoders made the feature of two caches.
        DataError: widths differ, or two caches hold the same samples.
    """
    if len(features) != 2:
        raise SettingError(f"feature: expected features of two modalities, got {', '.join(features) or 'none'}")
    caches = [Cache(path) for path in one_or_many(paths)]
    if not caches:
        raise SettingError("expected at least one cache, got none")
    for cache, other in combinations(caches, 2):
        if cache.info.has_rows_of(other.info.index_digest) or other.info.has_rows_of(cache.info.index_digest):
            raise DataError(
                f"expected caches of different samples, got the same in {other.path} and {cache.path}; name one"
            )
    if features == {"image": None, "text": None}:
        features = dict.fromkeys(default_pair(caches[0]))
    sides = {
        modality: [open_input(cache, modality, features[modality]) for cache in caches]
        for modality in order_pair(features)
    }
    for opened in sides.values():
        for cache, feature in zip(caches[1:], opened[1:], strict=True):
            _check_same_feature(caches[0], opened[0], cache, feature)
    return TrainData(caches=caches, sides=sides, memory_bytes=memory_bytes, progress=progress or NullProgress())


def name_features(image: Names, text: Names, features: Mapping[str, Names] | None) -> dict[str, str | None]:
    """Return modality -> feature, given either an image and a text feature or features by modality.

    Several features of one encoder are joined by `+`.
    """
    if features is not None and (image is not None or text is not None):
        raise SettingError(
            f"feature: expected either features by modality or an image and a text feature, got {', '.join(features)} "
            f"and {image or text}"
        )
    named = {"image": image, "text": text} if features is None else features
    if not isinstance(named, Mapping):
        raise SettingError(
            f"feature: expected features by modality, such as {{'audio': 'tiny.en/mean'}}, got {named!r}"
        )
    return {
        name: value if value is None or isinstance(value, str) else "+".join(value) for name, value in named.items()
    }


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Features of two modalities of some caches, in the order of `order_pair`.

    Rows and samples are numbered across the caches, in their order.

    Features that fit the memory are loaded once, so that many runs can share this object; a feature larger than half
    of `memory_bytes` is memory-mapped.
    """

    caches: Sequence[Cache]
    sides: Mapping[str, Sequence[InputFeature]]
    memory_bytes: float
    progress: Progress = field(default_factory=NullProgress)

    @property
    def features(self) -> dict[str, InputFeature]:
        """Modality -> feature of the first cache."""
        return {modality: opened[0] for modality, opened in self.sides.items()}

    @property
    def tower_inputs(self) -> dict[str, TowerInput]:
        """Modality -> entry of its feature in a run's config."""
        return {modality: _tower_input(feature) for modality, feature in self.features.items()}

    @property
    def index_digest(self) -> str:
        """Digest of the sample and item tables of the cache, joined by `+` for several caches."""
        return "+".join(cache.info.index_digest for cache in self.caches)

    @property
    def keys(self) -> Sequence[str]:
        return key_column(self.caches)

    def split(self, pairs: Pairs, settings: SplitSettings, *, progress: Progress | None = None) -> Split:
        """Split the samples; features are loaded for a strict split only."""
        readers = self.readers if settings.kind == "strict" else {}
        split = make_split(self.caches, pairs, settings, readers, progress=progress)
        if settings.path is not None and progress is not None:
            num_all, num_missing = split.parts.count(""), sum(map(len, self.caches)) - len(distinct(pairs.samples))
            if num_other := num_all - num_missing:
                progress.note(
                    f"left out {pluralize(num_all, 'sample')}: {num_missing:,} without both features, {num_other:,} "
                    f"in no part of {settings.path}, such as those that were appended since it was written"
                )
        return split

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """Modality -> reader of its rows."""
        return {
            modality: _reader(opened, self.memory_bytes / 2, self.progress) for modality, opened in self.sides.items()
        }

    @property
    def is_mapped(self) -> bool:
        """Whether a feature is too large to be loaded."""
        return any(not _fits(features, self.memory_bytes / 2) for features in self.sides.values())

    @property
    def block_rows(self) -> int:
        """Default size of shuffled blocks in rows: of more than one if a feature is read from disk."""
        return _MAPPED_BLOCK_ROWS if self.is_mapped else 1

    def pairs(self, language: str | None, *, progress: Progress | None = None) -> Pairs:
        """Pair the items; arguments and errors are those of `pair_items`."""
        first, second = self.sides.values()
        return pair_items(self.caches, first, second, language=language, progress=progress)

    def open_views(self, modality: str, views: Iterable[str]) -> dict[str, list[InputFeature]]:
        """Open views of a side's feature in every cache: view -> features.

        Raises:
            UnknownNameError: a cache has no such view; the message lists its features.
            FingerprintError: the features differ in more than their view.
            UnfinishedError: a view has missing chunks.
        """
        opened: dict[str, list[InputFeature]] = {}
        for view in views:
            opened[view] = []
            for cache, plain in zip(self.caches, self.sides[modality], strict=True):
                feature = open_input(cache, modality, view_feature(plain.name, view))
                feature.require_complete()
                next_step = f"{feature.name} is no view of it"
                check_same_view(plain.name, plain.fingerprint, feature.fingerprint, view, next_step=next_step)
                opened[view].append(feature)
        return opened

    def draw_views(self, modality: str, views: Mapping[str, float], seed: int) -> DrawnViews:
        """Return a reader of a side that draws views, given view -> probability."""
        opened = self.open_views(modality, views)
        return DrawnViews(
            readers={
                view: self.readers[modality]
                if view == PLAIN
                else _reader(features, self.memory_bytes / 2 / len(views), self.progress)
                for view, features in opened.items()
            },
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
                items = items.where(np.concatenate([feature.valid for feature in features])[items.rows])
            sides.append(items)
        both = shared_samples(sides[0], sides[1])
        return Pairs(first=sides[0].select(both), second=sides[1].select(both))


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


def _tower_input(feature: InputFeature) -> TowerInput:
    return TowerInput(feature=feature.name, spec=feature.spec, fingerprint=feature.fingerprint, width=feature.width)


def _fits(features: Sequence[InputFeature], memory_bytes: float) -> bool:
    return sum(feature.num_bytes for feature in features) <= memory_bytes


def _reader(features: Sequence[InputFeature], memory_bytes: float, progress: Progress) -> Reader:
    fits = _fits(features, memory_bytes)
    readers = [feature.load(progress=progress) if fits else feature.read for feature in features]
    if len(readers) == 1:
        return readers[0]
    stops = np.cumsum([feature.num_items for feature in features])
    dtype = np.result_type(*(feature.dtype for feature in features))
    return lambda rows: _gather(readers, stops, rows, dtype)


def _gather(readers: Sequence[Reader], stops: Ints, rows: Ints, dtype: np.dtype[Any]) -> Inputs:
    """Read rows that are numbered across the readers."""
    which = np.searchsorted(stops, rows, side="right")
    parts: list[tuple[Ints, Inputs]] = []
    for number, read in enumerate(readers):
        positions = np.flatnonzero(which == number)
        if len(positions):
            parts.append((positions, read(rows[positions] - (stops[number - 1] if number else 0))))
    return merge_inputs(parts, len(rows), dtype)


def view_digests(data: TrainData, settings: TrainSettings) -> dict[str, str]:
    """Return the SHA-256 of the fingerprint of each view that is drawn."""
    views = parse_views(settings.views)
    for modality in views:
        if modality not in data.sides:
            raise SettingError(f"views: expected views of {' or '.join(data.sides)}, got {modality}")
    return {
        f"view {modality}@{view}": digest(features[0].fingerprint)
        for modality, weights in views.items()
        for view, features in data.open_views(modality, weights).items()
    }


FAILED = "failed "
"""Start of the names of `failed_digests` in the config of a run."""


def failed_digests(data: TrainData, views: Sequence[str] = ()) -> dict[str, str]:
    """Return the SHA-256 of the rows that lack a feature, by names such as `failed image` and `failed image@flip`.

    Sides and views that all items have are left out. Reads commits only.

    Args:
        views: as the setting of training has them.

    Raises:
        UnfinishedError: a feature has missing chunks.
    """
    found = dict(data.sides)
    for modality, weights in parse_views(views).items():
        opened = data.open_views(modality, weights)
        found |= {f"{modality}@{view}": features for view, features in opened.items() if view != PLAIN}
    digests = {}
    for name, features in found.items():
        for feature in features:
            feature.require_complete()
        rows = [feature.failed_rows for feature in features]
        if any(map(len, rows)):
            digests[f"{FAILED}{name}"] = digest([hashlib.sha256(own.tobytes()).hexdigest() for own in rows])
    return digests


def check_failed(what: str, stored: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that the items that lack features are those that did when something was trained, by `failed_digests`.

    The first runs and studies have not recorded it, which is no difference.

    Raises:
        FingerprintError: items were retried since.
    """
    for name, value in stored.items():
        if name.startswith(FAILED) and now.get(name) != value:
            modality, _, view = name.removeprefix(FAILED).partition("@")
            raise FingerprintError(
                f"{what} was made when other {noun(modality)}{view and ' of the view ' + view} had no features, which "
                "were retried since; give the path of a new folder to train with them"
            )
