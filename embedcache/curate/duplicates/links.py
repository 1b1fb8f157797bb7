"""Pairs of items that lie close together, collected from tiles of cosines."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Floats, Ints

_NEVER = np.float32(-2)  # below every cosine
_ONE = 1 - 1e-5  # what equal vectors reach in spite of rounding


def limit_of(cosine: float) -> np.float32:
    """Give the number that a float32 cosine is compared with: 1 leaves room for the rounding of equal vectors."""
    return np.float32(cosine if np.isinf(cosine) else min(cosine, _ONE))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The cosines of some items with others.

    Args:
        left: (B,) int64, numbers of items, each once.
        right: (R,) int64, alike.
        cosines: (B, R) float32; the collector may change it.
        is_diagonal: whether both are the same items; else they have none in common.
    """

    left: Ints
    right: Ints
    cosines: Floats
    is_diagonal: bool = False


@dataclass(frozen=True, kw_only=True)
class Links:
    """Pairs of items whose cosine is at least a limit: each once, the smaller number first, in that order.

    Args:
        left: (L,) int64.
        right: (L,) int64.
        cosines: (L,) float32.
    """

    left: Ints
    right: Ints
    cosines: Floats

    def between(self, low: float, high: float = np.inf) -> "Links":
        """Keep those of at least one cosine and below another."""
        mask = (self.cosines >= limit_of(low)) & (self.cosines < limit_of(high))
        return Links(left=self.left[mask], right=self.right[mask], cosines=self.cosines[mask])


class Collector:
    """Takes tiles, and keeps the pairs above a limit and each item's largest cosine.

    Memory: 12 bytes a pair, 4 an item, and as much again for a moment. Where there are more pairs than allowed, the
    limit rises to the next level.

    Args:
        num_items: N.
        levels: cosines, ascending; the first is the limit, the others are what it may rise to.
        most: pairs that may be kept.
    """

    def __init__(self, num_items: int, levels: Sequence[float], most: int) -> None:
        self.best: Floats = np.full(num_items, _NEVER, np.float32)
        self._levels = [*levels, np.inf]
        self._most = most
        self._keys: list[Ints] = []
        self._cosines: list[Floats] = []

    @property
    def limit(self) -> float:
        """The cosine that all pairs have been kept from; infinite where even the last level has too many."""
        return self._levels[0]

    def take(self, tile: Tile) -> None:
        """Look at the cosines of a tile; those of an item with itself do not count."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, _NEVER)
        best_B = tile.cosines.max(axis=1, initial=_NEVER)
        self._raise_best(tile.left, best_B)
        if not tile.is_diagonal:
            self._raise_best(tile.right, tile.cosines.max(axis=0, initial=_NEVER))
        rows = np.flatnonzero(best_B >= limit_of(self.limit))
        if len(rows):
            self._keep(tile, rows)

    def links(self) -> Links:
        """Give all pairs, each once."""
        keys, first = np.unique(np.concatenate([np.empty(0, np.int64), *self._keys]), return_index=True)
        cosines = np.concatenate([np.empty(0, np.float32), *self._cosines])[first]
        left, right = np.divmod(keys, max(1, len(self.best)))
        return Links(left=left, right=right, cosines=cosines)

    def _raise_best(self, items: Ints, cosines: Floats) -> None:
        self.best[items] = np.maximum(self.best[items], cosines)

    def _keep(self, tile: Tile, rows: Ints) -> None:
        row, column = np.nonzero(tile.cosines[rows] >= limit_of(self.limit))
        row = rows[row]
        if tile.is_diagonal:
            is_above = row < column
            row, column = row[is_above], column[is_above]
        left, right = tile.left[row], tile.right[column]
        self._keys.append(np.minimum(left, right) * len(self.best) + np.maximum(left, right))
        self._cosines.append(tile.cosines[row, column])
        while sum(map(len, self._keys)) > self._most:
            self._rise()

    def _rise(self) -> None:
        self._levels = self._levels[1:]
        kept = [cosines >= limit_of(self.limit) for cosines in self._cosines]
        self._keys = [keys[mask] for keys, mask in zip(self._keys, kept, strict=True)]
        self._cosines = [cosines[mask] for cosines, mask in zip(self._cosines, kept, strict=True)]
