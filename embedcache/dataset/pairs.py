"""Pairs of items of two modalities, such as images and texts: of the same sample, or with equal content."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from embedcache.arrays import Array, Bools, Ints
from embedcache.dataset.inputs import InputFeature
from embedcache.errors import DataError, UnknownNameError
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache

ANY_LANGUAGE = "any"
"""The value of `--language` that keeps all captions."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """The items of one modality that have a feature, in row order. All arrays are (M,) int64.

    Args:
        rows: rows of the feature.
        samples: sample of each item.
        contents: number of each item's content; equal numbers mean equal bytes or text.
    """

    rows: Ints
    samples: Ints
    contents: Ints

    def select(self, samples: Ints) -> "Items":
        """Return the items of some samples."""
        return self.where(np.isin(self.samples, samples))

    def where(self, mask: Bools) -> "Items":
        """Return the items with a true mask: (M,) bool."""
        return Items(rows=self.rows[mask], samples=self.samples[mask], contents=self.contents[mask])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Items of two modalities, of samples that have at least one of each; images and texts, where these are paired."""

    first: Items
    second: Items

    @property
    def samples(self) -> Ints:
        """Samples with an item of each modality, ascending."""
        return np.unique(self.first.samples)

    def all_pairs(self) -> tuple[Ints, Ints]:
        """Return all items of one sample with each other: two (M,) arrays of positions in `first` and `second`."""
        return _where(_members(self.first.samples, self._size) @ _members(self.second.samples, self._size).T)

    def relation(self) -> csr_array:
        """Return which contents belong together: (first contents, second contents) bool.

        Contents belong together if any sample has both: several captions of one image, equal captions of different
        images, and copies of an image are all positives.
        """
        first, second = self.all_pairs()
        shape = tuple(int(side.contents.max(initial=0)) + 1 for side in (self.first, self.second))
        contents = (self.first.contents[first], self.second.contents[second])
        return csr_array((np.ones(len(first), bool), contents), shape=shape)

    def positives(self) -> tuple[Ints, Ints]:
        """Return all positive pairs of `relation`: two (M,) arrays of positions in `first` and `second`."""
        return _where(self.relation()[self.first.contents][:, self.second.contents])

    @property
    def _size(self) -> int:
        return int(self.first.samples.max(initial=0)) + 1

    def select(self, samples: Ints) -> "Pairs":
        """Return the items of some samples."""
        return Pairs(first=self.first.select(samples), second=self.second.select(samples))


def pair_items(
    caches: Sequence[Cache],
    first: Sequence[InputFeature],
    second: Sequence[InputFeature],
    *,
    language: str | None = None,
) -> Pairs:
    """Pair the items of caches that have both features. Rows and samples are counted across caches.

    Args:
        first: feature of one modality of each cache, such as an image feature.
        second: feature of another modality of each cache.
        language: keep only captions in this language; None or `any` keeps all.

    Raises:
        UnfinishedError: a feature has uncommitted chunks.
        UnknownNameError: no caption is in that language.
        DataError: no sample has both features.
    """
    sides = []
    for features in (first, second):
        items = read_items(caches, features)
        if language not in (None, ANY_LANGUAGE) and features[0].modality == "text":
            items = items.where(is_language(caches, str(language))[items.rows])
        sides.append(items)
    both = np.intersect1d(sides[0].samples, sides[1].samples)
    if not len(both):
        raise DataError(
            f"{name_caches(caches)}: expected samples with {first[0].name} and {second[0].name}, got none; "
            "check --language and embedcache inspect"
        )
    return Pairs(first=sides[0].select(both), second=sides[1].select(both))


def caption_languages(caches: Sequence[Cache]) -> Array:
    """Return the language of each caption, or None: (T,) objects, counted across caches."""
    return np.array([name for cache in caches for name in cache.items("text")["language"].to_pylist()], object)


def name_caches(caches: Sequence[Cache]) -> str:
    """Return the paths of caches for an error message."""
    return " and ".join(str(cache.path) for cache in caches)


def _members(samples: Ints, size: int) -> csr_array:
    ones, positions = np.ones(len(samples), np.int32), np.arange(len(samples))
    return csr_array((ones, (positions, samples)), shape=(len(samples), size))


def _where(matrix: csr_array) -> tuple[Ints, Ints]:
    rows, columns = matrix.nonzero()
    order = np.lexsort((columns, rows))
    return rows[order].astype(np.int64), columns[order].astype(np.int64)


def read_items(caches: Sequence[Cache], features: Sequence[InputFeature]) -> Items:
    """Return the items of caches that have a feature, which must be complete; rows are counted across caches."""
    for feature in features:
        feature.require_complete()
    samples, num_before = [], 0
    for cache, feature in zip(caches, features, strict=True):
        samples_N = cache.items(feature.modality)["sample"].to_numpy()
        if len(samples_N) != feature.num_items:
            raise DataError(
                f"feature {feature.name}: expected {len(samples_N)} rows as in its item table, got {feature.num_items}"
            )
        samples.append(samples_N + num_before)
        num_before += cache.info.num_samples
    rows = np.flatnonzero(np.concatenate([feature.valid for feature in features]))
    numbers: dict[bytes | None, int] = {}
    contents = [numbers.setdefault(content, len(numbers)) for feature in features for content in feature.hashes]
    return Items(rows=rows, samples=np.concatenate(samples)[rows], contents=np.array(contents, np.int64)[rows])


def is_language(caches: Sequence[Cache], language: str) -> Bools:
    """Return whether each caption is in a language: (T,); UnknownNameError if none is."""
    languages = caption_languages(caches)
    mask: Bools = languages == language
    if not mask.any():
        known = {str(name) for name in set(languages) if name is not None}
        if not known:
            raise UnknownNameError(
                f"the captions of {name_caches(caches)} have no language, expected {language}; use --language any for "
                "all captions, or extract with --language-column"
            )
        raise unknown_name(f"caption language in {name_caches(caches)}", language, known)
    return mask
