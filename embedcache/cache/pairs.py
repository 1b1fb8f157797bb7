"""Which items of two modalities belong together: by the row numbers of the spine, and by equal content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from embedcache.arrays import Bools, Ints
from embedcache.cache.cache import Cache
from embedcache.cache.feature import Feature
from embedcache.errors import DataError, UnknownNameError
from embedcache.registry import unknown_name


@dataclass(frozen=True, kw_only=True)
class Items:
    """The usable items of one modality, in row order. All arrays are (M,) int64.

    Args:
        rows: rows of the feature.
        samples: the sample of each item.
        contents: equal numbers mean equal bytes or text.
    """

    rows: Ints
    samples: Ints
    contents: Ints

    def of(self, samples: Ints) -> "Items":
        """Keep the items of some samples."""
        return self.where(np.isin(self.samples, samples))

    def where(self, mask: Bools) -> "Items":
        """Keep the items where the (M,) mask is true."""
        return Items(rows=self.rows[mask], samples=self.samples[mask], contents=self.contents[mask])


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Images and texts of samples that have at least one of each."""

    image: Items
    text: Items

    @property
    def samples(self) -> Ints:
        """The samples with both, ascending."""
        return np.unique(self.image.samples)

    def joined(self) -> tuple[Ints, Ints]:
        """Give every image with every text of its sample: two (M,) arrays of positions in `image` and `text`."""
        return _where(_members(self.image.samples, self._size) @ _members(self.text.samples, self._size).T)

    def relation(self) -> csr_array:
        """Say which contents belong together: (image contents, text contents) bool.

        An image and a caption belong together where any sample holds both contents: so equal captions of different
        images, several captions of one image, and copies of an image are positives.
        """
        image, text = self.joined()
        shape = tuple(int(side.contents.max(initial=0)) + 1 for side in (self.image, self.text))
        contents = (self.image.contents[image], self.text.contents[text])
        return csr_array((np.ones(len(image), bool), contents), shape=shape)

    def positives(self) -> tuple[Ints, Ints]:
        """Give all positive pairs by `relation`: two (M,) arrays of positions in `image` and `text`."""
        return _where(self.relation()[self.image.contents][:, self.text.contents])

    @property
    def _size(self) -> int:
        return int(self.image.samples.max(initial=0)) + 1

    def of(self, samples: Ints) -> "Pairs":
        """Keep the items of some samples."""
        return Pairs(image=self.image.of(samples), text=self.text.of(samples))


def pair_items(cache: Cache, image: Feature, text: Feature, *, language: str | None = None) -> Pairs:
    """Pair the items of a cache that have both features.

    Args:
        cache: the cache.
        image: a finished image feature.
        text: a finished text feature.
        language: keep only captions of this language; None keeps all.

    Raises:
        UnfinishedError: a feature has uncommitted chunks.
        UnknownNameError: no caption is of that language.
        DataError: no sample has both.
    """
    image.require_complete()
    text.require_complete()
    images, texts = _items(cache, image), _items(cache, text)
    if language is not None:
        texts = texts.where(_is_language(cache, language)[texts.rows])
    both = np.intersect1d(images.samples, texts.samples)
    if not len(both):
        raise DataError(f"no sample of {cache.path} has both an image with {image.name} and a caption with {text.name}")
    return Pairs(image=images.of(both), text=texts.of(both))


def _members(samples: Ints, size: int) -> csr_array:
    return csr_array(
        (np.ones(len(samples), np.int32), (np.arange(len(samples)), samples)),
        shape=(len(samples), size),
    )


def _where(matrix: csr_array) -> tuple[Ints, Ints]:
    rows, columns = matrix.nonzero()
    order = np.lexsort((columns, rows))
    return rows[order].astype(np.int64), columns[order].astype(np.int64)


def _items(cache: Cache, feature: Feature) -> Items:
    samples = cache.items(feature.modality)["sample"].to_numpy()
    if len(samples) != feature.num_items:
        raise DataError(f"feature {feature.name} has {feature.num_items} rows, its items table has {len(samples)}")
    rows = np.flatnonzero(feature.valid)
    return Items(rows=rows, samples=samples[rows], contents=number_equal(feature.hashes)[rows])


def number_equal(values: Sequence[Any]) -> Ints:
    """Give equal values equal numbers, in order of first appearance: (M,) int64."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _is_language(cache: Cache, language: str) -> Bools:
    languages = np.array(cache.items("text")["language"].to_pylist(), object)
    mask: Bools = languages == language
    if not mask.any():
        known = {str(name) for name in set(languages) if name is not None}
        if not known:
            raise UnknownNameError(f"the captions of {cache.path} name no language; leave --language out")
        raise unknown_name(f"caption language in {cache.path}", language, known)
    return mask
