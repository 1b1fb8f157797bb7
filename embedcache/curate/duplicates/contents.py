"""Exact duplicates: items with equal bytes or text, by the BLAKE2b hashes that the commits hold."""

from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Ints
from embedcache.cache.cache import Cache
from embedcache.cache.pairs import items_of
from embedcache.cache.side import SideFeature


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The items of one feature, and which of them are copies of each other.

    Args:
        item_rows: (M,) int64, the row of each usable item, ascending.
        samples: (M,) int64, its sample, ascending.
        contents: (M,) int64, from 0 to C - 1 in order of first appearance; equal numbers mean equal bytes or text.
        rows: (C,) int64, ascending, the row of the first item of each content.
    """

    item_rows: Ints
    samples: Ints
    contents: Ints
    rows: Ints

    @property
    def num_copies(self) -> int:
        """Items that are copies of an earlier one."""
        return len(self.contents) - len(self.rows)


def find_contents(cache: Cache, side: SideFeature) -> Contents:
    """Find the copies among the usable items of a feature.

    Raises:
        UnfinishedError: the feature has uncommitted chunks.
    """
    items = items_of([cache], [side])
    _, first, contents = np.unique(items.contents, return_index=True, return_inverse=True)
    order = np.argsort(first)  # the first item of a content may have failed where a copy of it did not
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return Contents(
        item_rows=items.rows, samples=items.samples, contents=number[contents], rows=items.rows[first[order]]
    )
