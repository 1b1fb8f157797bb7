"""The input of a training run: an image and a text feature of one or several caches, and their pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from embedcache.arrays import Array, Inputs, Ints
from embedcache.dataset.inputs import InputFeature, Reader, open_input
from embedcache.dataset.pairs import Pairs, pair_items
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Split, make_split
from embedcache.errors import DataError
from embedcache.projectors.saved import TowerInput
from embedcache.provenance import check_same
from embedcache.store.cache import Cache

Paths: TypeAlias = Path | str | Sequence[Path | str]


def open_data(paths: Paths, *, image_feature: str | None, text_feature: str | None, memory_bytes: int) -> "TrainData":
    """Open the same image and text feature of one or several caches.

    Features that fit into `memory_bytes` are loaded once.

    Raises:
        UnknownNameError: there is no feature of that name.
        FingerprintError: different encoders made the feature of two caches.
        DataError: widths differ, or two caches hold the same samples.
    """
    caches = [Cache(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    for cache, other in combinations(caches, 2):
        if cache.info.has_rows_of(other.info.index_digest) or other.info.has_rows_of(cache.info.index_digest):
            raise DataError(
                f"expected caches of different samples, got the same in {other.path} and {cache.path}; name one"
            )
    images = [open_input(cache, "image", image_feature) for cache in caches]
    texts = [open_input(cache, "text", text_feature) for cache in caches]
    for features in (images, texts):
        for cache, feature in zip(caches[1:], features[1:], strict=True):
            _check_same_feature(caches[0], features[0], cache, feature)
    return TrainData(caches=caches, images=images, texts=texts, memory_bytes=memory_bytes)


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """An image and a text feature of some caches. Rows and samples are numbered across the caches, in their order.

    Features that fit the memory are loaded once, so that many runs can share this object; a feature larger than half
    of `memory_bytes` is memory-mapped.
    """

    caches: Sequence[Cache]
    images: Sequence[InputFeature]
    texts: Sequence[InputFeature]
    memory_bytes: float

    @property
    def image(self) -> TowerInput:
        return _tower_input(self.images[0])

    @property
    def text(self) -> TowerInput:
        return _tower_input(self.texts[0])

    @property
    def index_digest(self) -> str:
        """Digest of the sample and item tables of the cache, joined by `+` for several caches."""
        return "+".join(cache.info.index_digest for cache in self.caches)

    @cached_property
    def keys(self) -> list[str]:
        return [key for cache in self.caches for key in cache.samples["key"].to_pylist()]

    def split(self, pairs: Pairs, settings: SplitSettings) -> Split:
        """Split the samples; features are loaded for a strict split only."""
        readers = {"read_image": lambda rows: self.read_image(rows), "read_text": lambda rows: self.read_text(rows)}
        return make_split(self.caches, pairs, settings, **readers)

    @cached_property
    def read_image(self) -> Reader:
        """Reads rows of the image feature."""
        return _reader(self.images, self.memory_bytes / 2)

    @cached_property
    def read_text(self) -> Reader:
        """Reads rows of the text feature."""
        return _reader(self.texts, self.memory_bytes / 2)

    @property
    def is_mapped(self) -> bool:
        """Whether a feature is too large to be loaded."""
        return any(not _fits(features, self.memory_bytes / 2) for features in (self.images, self.texts))

    def pairs(self, language: str | None) -> Pairs:
        """Pair the items; arguments and errors are those of `pair_items`."""
        return pair_items(self.caches, self.images, self.texts, language=language)


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


def _reader(features: Sequence[InputFeature], memory_bytes: float) -> Reader:
    fits = _fits(features, memory_bytes)
    readers = [feature.load() if fits else feature.read for feature in features]
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
    shape = np.max([inputs.values.shape[1:] for _, inputs in parts], axis=0)
    values: Array = np.zeros((len(rows), *shape), dtype)
    lengths = None if parts[0][1].lengths is None else np.zeros(len(rows), np.int64)
    for positions, inputs in parts:
        values[positions, : inputs.values.shape[1]] = inputs.values
        if lengths is not None and inputs.lengths is not None:
            lengths[positions] = inputs.lengths
    return Inputs(values, lengths)
