"""Which items of two modalities belong together: by the sample numbers of the item tables, and by equal content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from embedcache.arrays import Bools, Ints
from embedcache.dataset.inputs import InputFeature
from embedcache.errors import DataError, UnknownNameError
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache


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


def pair_items(
    caches: Sequence[Cache],
    images: Sequence[InputFeature],
    texts: Sequence[InputFeature],
    *,
    language: str | None = None,
) -> Pairs:
    """Pair the items of caches that have both features. Rows and samples are counted on from cache to cache.

    Args:
        caches: the caches.
        images: a finished image side of each.
        texts: a finished text side of each.
        language: keep only captions of this language; None keeps all.

    Raises:
        UnfinishedError: a feature has uncommitted chunks.
        UnknownNameError: no caption is of that language.
        DataError: no sample has both.
    """
    image_items, text_items = items_of(caches, images), items_of(caches, texts)
    if language is not None:
        text_items = text_items.where(_is_language(caches, language)[text_items.rows])
    both = np.intersect1d(image_items.samples, text_items.samples)
    if not len(both):
        raise DataError(
            f"no sample of {name_caches(caches)} has both an image with {images[0].name} and a caption with "
            f"{texts[0].name}"
        )
    return Pairs(image=image_items.of(both), text=text_items.of(both))


def name_caches(caches: Sequence[Cache]) -> str:
    """Name caches in a message."""
    return " and ".join(str(cache.path) for cache in caches)


def _members(samples: Ints, size: int) -> csr_array:
    return csr_array(
        (np.ones(len(samples), np.int32), (np.arange(len(samples)), samples)),
        shape=(len(samples), size),
    )


def _where(matrix: csr_array) -> tuple[Ints, Ints]:
    rows, columns = matrix.nonzero()
    order = np.lexsort((columns, rows))
    return rows[order].astype(np.int64), columns[order].astype(np.int64)


def items_of(caches: Sequence[Cache], sides: Sequence[InputFeature]) -> Items:
    """Get the usable items of one modality of caches. Rows and samples are counted on from cache to cache.

    Args:
        caches: the caches.
        sides: a finished side of each.

    Raises:
        UnfinishedError: a feature has uncommitted chunks.
    """
    for side in sides:
        side.require_complete()
    samples, num_before = [], 0
    for cache, side in zip(caches, sides, strict=True):
        found = cache.items(side.modality)["sample"].to_numpy()
        if len(found) != side.num_items:
            raise DataError(f"feature {side.name} has {side.num_items} rows, its items table has {len(found)}")
        samples.append(found + num_before)
        num_before += cache.info.num_samples
    rows = np.flatnonzero(np.concatenate([side.valid for side in sides]))
    contents = number_equal([value for side in sides for value in side.hashes])
    return Items(rows=rows, samples=np.concatenate(samples)[rows], contents=contents[rows])


def number_equal(values: Sequence[Any]) -> Ints:
    """Give equal values equal numbers, in order of first appearance: (M,) int64."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _is_language(caches: Sequence[Cache], language: str) -> Bools:
    languages = np.array([name for cache in caches for name in cache.items("text")["language"].to_pylist()], object)
    mask: Bools = languages == language
    if not mask.any():
        known = {str(name) for name in set(languages) if name is not None}
        if not known:
            raise UnknownNameError(f"the captions of {name_caches(caches)} name no language; leave --language out")
        raise unknown_name(f"caption language in {name_caches(caches)}", language, known)
    return mask
