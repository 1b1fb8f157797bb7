"""What a training run reads: the two sides of one or several caches, and who belongs together."""

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
from embedcache.errors import DataError
from embedcache.projectors.saved import TowerInput
from embedcache.provenance import check_same
from embedcache.store.cache import Cache

Paths: TypeAlias = Path | str | Sequence[Path | str]


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Two sides of some caches. Rows and samples are counted on from cache to cache.

    Open it once and train as often as you like: features that fit the memory are read once.

    Args:
        caches: the caches.
        images: the image side of each.
        texts: the text side of each.
        memory_bytes: what fits into half of it, a side, is read into memory; larger sides are mapped.
    """

    caches: Sequence[Cache]
    images: Sequence[InputFeature]
    texts: Sequence[InputFeature]
    memory_bytes: float

    @property
    def image(self) -> TowerInput:
        """What the image tower takes."""
        return _side(self.images[0])

    @property
    def text(self) -> TowerInput:
        """What the text tower takes."""
        return _side(self.texts[0])

    @property
    def index_digest(self) -> str:
        """Identity of the rows: that of the cache, or those of all with `+` between."""
        return "+".join(cache.info.index_digest for cache in self.caches)

    @cached_property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return [key for cache in self.caches for key in cache.samples["key"].to_pylist()]

    @cached_property
    def read_image(self) -> Reader:
        """Gathers rows of the image side."""
        return _reader(self.images, self.memory_bytes / 2)

    @cached_property
    def read_text(self) -> Reader:
        """Gathers rows of the text side."""
        return _reader(self.texts, self.memory_bytes / 2)

    @property
    def is_mapped(self) -> bool:
        """Whether a side is too large to be read into memory."""
        return any(not _fits(sides, self.memory_bytes / 2) for sides in (self.images, self.texts))

    def pairs(self, language: str | None) -> Pairs:
        """Pair the items; arguments and errors are those of `pair_items`."""
        return pair_items(self.caches, self.images, self.texts, language=language)


def open_data(paths: Paths, *, image: str | None, text: str | None, memory_gb: float) -> TrainData:
    """Open the same two sides of one or several caches.

    Args:
        paths: of one cache, or of several.
        image: `encoder/feature`, or several of one encoder with `+` between; None where there is only one.
        text: alike.
        memory_gb: features that fit into this many 10^9 bytes are read into memory once.

    Raises:
        UnknownNameError: a feature of that name does not exist.
        FingerprintError: two caches have it from different encoders.
        DataError: a width differs, or a cache is given twice.
    """
    caches = [Cache(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    for cache, other in combinations(caches, 2):
        if cache.info.has_rows_of(other.info.index_digest) or other.info.has_rows_of(cache.info.index_digest):
            raise DataError(f"{other.path} and {cache.path} hold the same samples")
    images = [open_input(cache, "image", image) for cache in caches]
    texts = [open_input(cache, "text", text) for cache in caches]
    for sides in (images, texts):
        for cache, side in zip(caches[1:], sides[1:], strict=True):
            _check_joinable(caches[0], sides[0], cache, side)
    return TrainData(caches=caches, images=images, texts=texts, memory_bytes=memory_gb * 1e9)


def _check_joinable(first_cache: Cache, first: InputFeature, cache: Cache, side: InputFeature) -> None:
    if first.name != side.name or first.width != side.width:
        raise DataError(
            f"{first_cache.path} has {first.name} of width {first.width}, {cache.path} has {side.name} of width "
            f"{side.width}; caches can be joined where both have the same feature"
        )
    check_same(
        f"{first.name} of {first_cache.path}",
        first.fingerprint,
        side.fingerprint,
        next_step=f"the second value is that of {cache.path}: join caches that one encoder made",
    )


def _side(side: InputFeature) -> TowerInput:
    return TowerInput(feature=side.name, spec=side.spec, fingerprint=side.fingerprint, width=side.width)


def _fits(sides: Sequence[InputFeature], memory_bytes: float) -> bool:
    return sum(side.num_bytes for side in sides) <= memory_bytes


def _reader(sides: Sequence[InputFeature], memory_bytes: float) -> Reader:
    readers = [side.load() for side in sides] if _fits(sides, memory_bytes) else [side.read for side in sides]
    if len(readers) == 1:
        return readers[0]
    stops = np.cumsum([side.num_items for side in sides])
    dtype = np.result_type(*(side.dtype for side in sides))
    return lambda rows: _gather(readers, stops, rows, dtype)


def _gather(readers: Sequence[Reader], stops: Ints, rows: Ints, dtype: np.dtype[Any]) -> Inputs:
    """Gather rows that are counted on from reader to reader."""
    which = np.searchsorted(stops, rows, side="right")
    found: list[tuple[Ints, Inputs]] = []
    for number, read in enumerate(readers):
        places = np.flatnonzero(which == number)
        if len(places):
            found.append((places, read(rows[places] - (stops[number - 1] if number else 0))))
    shape = np.max([inputs.values.shape[1:] for _, inputs in found], axis=0)
    values = np.zeros((len(rows), *shape), dtype)
    lengths = None if found[0][1].lengths is None else np.zeros(len(rows), np.int64)
    for places, inputs in found:
        _put(values, places, inputs.values)
        if lengths is not None and inputs.lengths is not None:
            lengths[places] = inputs.lengths
    return Inputs(values, lengths)


def _put(values: Array, places: Ints, part: Array) -> None:
    if values.ndim == 2:
        values[places] = part
    else:
        values[places, : part.shape[1]] = part
