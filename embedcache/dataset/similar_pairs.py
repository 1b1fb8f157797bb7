"""Similar items, collected from tiles of cosines: pairs above a limit, and the nearest neighbors of each item."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, from_sort_keys, to_sort_keys

_BELOW_ALL = np.float32(-2)
_ALMOST_ONE = 1 - 1e-5  # equal vectors reach this in spite of rounding
NOT_COMPARED = 256  # in place of a hash distance, of which 255 is the largest
SAME_PICTURE = 24  # largest hash distance of an image to its copies, docs/about/results.md
_FEW = 4  # candidates per neighbor, up to which sorting them is faster than finding the best by partition


def cosine_limit(cosine: float) -> np.float32:
    """Return the number that float32 cosines are compared with; for 1 it leaves room for rounding."""
    return np.float32(cosine if np.isinf(cosine) else min(cosine, _ALMOST_ONE))


@dataclass(frozen=True, kw_only=True)
class CosineTile:
    """Cosine similarities of some items to others, both unique."""

    left: Ints  # (B,) numbers of items
    right: Ints  # (R,) numbers of items
    cosines: Floats  # (B, R); the collector may change it
    is_diagonal: bool = False  # whether both are the same items; otherwise they have none in common


@dataclass(frozen=True, kw_only=True)
class SimilarPairs:
    """Unique pairs of items whose cosine is at least a limit, the smaller number first, sorted by both numbers."""

    left: Ints  # (L,)
    right: Ints  # (L,)
    cosines: Floats  # (L,)
    distances: Array  # (L,) int16 hash distances of images, see `embedcache.curate.dedup`, or NOT_COMPARED

    def select(self, mask: Bools) -> "SimilarPairs":
        """Return the pairs of a mask."""
        return SimilarPairs(**{name: values[mask] for name, values in vars(self).items()})

    def between(self, low: float, high: float = np.inf) -> "SimilarPairs":
        """Return the pairs of at least one cosine and below another."""
        return self.select((self.cosines >= cosine_limit(low)) & (self.cosines < cosine_limit(high)))


class PairCollector:
    """Collector of the pairs above a limit and of each item's largest cosine, from tiles.

    If there are more than `max_pairs`, the limit rises to the next of the ascending `levels`. Memory: 12 bytes per
    pair, 4 per item, and as much again for a moment.
    """

    def __init__(self, num_items: int, levels: Sequence[float], max_pairs: int) -> None:
        self.highest: Floats = np.full(num_items, _BELOW_ALL, np.float32)
        self._levels = [*levels, np.inf]
        self._max_pairs = max_pairs
        self._keys: list[Ints] = []
        self._cosines: list[Floats] = []

    @property
    def limit(self) -> float:
        """Cosine from which all pairs were kept; infinite if even the last level has too many."""
        return self._levels[0]

    def add(self, tile: CosineTile) -> None:
        """Add the pairs of a tile; an item's cosine to itself does not count."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, _BELOW_ALL)
        highest_B = tile.cosines.max(axis=1, initial=_BELOW_ALL)
        self._raise_highest(tile.left, highest_B)
        if not tile.is_diagonal:
            self._raise_highest(tile.right, tile.cosines.max(axis=0, initial=_BELOW_ALL))
        rows = np.flatnonzero(highest_B >= cosine_limit(self.limit))
        if len(rows):
            self._add_pairs(tile, rows)

    def pairs(self) -> SimilarPairs:
        """Return all pairs."""
        keys, first = np.unique(np.concatenate([np.empty(0, np.int64), *self._keys]), return_index=True)
        cosines = np.concatenate([np.empty(0, np.float32), *self._cosines])[first]
        left, right = np.divmod(keys, len(self.highest))
        distances = np.full(len(left), NOT_COMPARED, np.int16)
        return SimilarPairs(left=left, right=right, cosines=cosines, distances=distances)

    def _raise_highest(self, items: Ints, cosines: Floats) -> None:
        self.highest[items] = np.maximum(self.highest[items], cosines)

    def _add_pairs(self, tile: CosineTile, rows: Ints) -> None:
        row, column = np.nonzero(tile.cosines[rows] >= cosine_limit(self.limit))
        row = rows[row]
        if tile.is_diagonal:
            is_above = row < column
            row, column = row[is_above], column[is_above]
        left, right = tile.left[row], tile.right[column]
        self._keys.append(np.minimum(left, right) * len(self.highest) + np.maximum(left, right))
        self._cosines.append(tile.cosines[row, column])
        while sum(map(len, self._keys)) > self._max_pairs:
            self._levels = self._levels[1:]
            masks = [cosines >= cosine_limit(self.limit) for cosines in self._cosines]
            self._keys = [keys[mask] for keys, mask in zip(self._keys, masks, strict=True)]
            self._cosines = [cosines[mask] for cosines, mask in zip(self._cosines, masks, strict=True)]


class NeighborCollector:
    """Collector of each item's K most similar other items, from tiles that may hold a pair more than once.

    Of equal cosines the lower item comes first. Memory: 8 K + 8 bytes per item, and a few copies of a tile.

    Attributes:
        items: (N, K) int32, best first; -1 where fewer items were compared.
        cosines: (N, K) float32, of each; -2 where there is none.
    """

    def __init__(self, num_items: int, k: int) -> None:
        self.items: Array = np.full((num_items, k), -1, np.int32)
        self.cosines: Floats = np.full((num_items, k), _BELOW_ALL, np.float32)
        self._lowest: Floats = np.full(num_items, _BELOW_ALL, np.float32)  # the last of the K cosines
        self._columns: Array = np.full(num_items + 1, -1, np.int32)  # of items in a tile; the last is that of item -1

    def add(self, tile: CosineTile) -> None:
        """Add the pairs of a tile; an item is not its own neighbor."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, _BELOW_ALL)
        self._update(tile.left, tile.right, tile.cosines)
        if not tile.is_diagonal:
            self._update(tile.right, tile.left, tile.cosines.T)

    def _update(self, items: Ints, others: Ints, cosines_BR: Floats) -> None:
        """Sort the candidates of a tile into the lists that they change.

        The neighbors of an item and its candidates are a row of sort keys, of which the K largest are kept.
        """
        rows = np.flatnonzero(cosines_BR.max(axis=1) > self._lowest[items])
        items, cosines_BR = items[rows], np.ascontiguousarray(cosines_BR[rows])
        self._leave_out_listed(items, others, cosines_BR)
        flat = np.flatnonzero(self._is_candidate(items, cosines_BR))
        if not len(flat):
            return
        row = flat // len(others)
        column = flat - row * len(others)
        counts, k = np.bincount(row, minlength=len(items)), self.items.shape[1]
        place = k + np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        keys = np.full((len(items), k + int(counts.max())), np.iinfo(np.int64).min)
        listed = self.items[items].view(np.uint32)  # item -1 is the highest number
        keys[:, :k] = to_sort_keys(self.cosines[items], listed)
        keys[row, place] = to_sort_keys(cosines_BR.ravel()[flat], others[column])
        keys.sort(axis=1)
        self.cosines[items], self.items[items] = from_sort_keys(keys[:, : -k - 1 : -1])
        self._lowest[items] = self.cosines[items, -1]

    def _leave_out_listed(self, items: Ints, others: Ints, cosines_BR: Floats) -> None:
        """Lower the cosines of pairs that are listed already below all others."""
        self._columns[others] = np.arange(len(others))
        columns_BK = self._columns[self.items[items]]
        self._columns[others] = -1
        row, listed = np.nonzero(columns_BK >= 0)
        cosines_BR[row, columns_BK[row, listed]] = _BELOW_ALL

    def _is_candidate(self, items: Ints, cosines_BR: Floats) -> Bools:
        """Return which pairs may be among the K best: of many in a row, the best K of the row."""
        k = self.items.shape[1]
        is_above_BR = cosines_BR > self._lowest[items][:, None]
        many = np.flatnonzero(np.count_nonzero(is_above_BR, axis=1) > _FEW * k)
        lowest_M = np.partition(cosines_BR[many], -k, axis=1)[:, [-k]] if len(many) else 0
        is_above_BR[many] &= cosines_BR[many] >= lowest_M
        return is_above_BR
