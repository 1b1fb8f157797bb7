"""Pairs of near vectors: collectors of tiles of cosines, and how many of the true pairs they found."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import scipy

from embedcache.arrays import Bools, Floats, Ints, blocks
from embedcache.neighbors.clusters import BLOCK, Arranged, CosineTile
from embedcache.neighbors.knn import KBest, knn
from embedcache.progress import Progress, watch

NOT_COMPARED = np.float32(-2)
"""In place of the largest cosine of an item to another, of an item that was compared with none."""

_ALMOST_ONE = 1 - 1e-5  # equal vectors reach this in spite of rounding
_ROUNDING = 1e-6  # two ways of summing one cosine in float32
_NUM_PROBES = 1000


def cosine_limit(cosine: float) -> np.float32:
    """Return the number that float32 cosines are compared with; for 1 it leaves room for rounding."""
    return np.float32(cosine if np.isinf(cosine) else min(cosine, _ALMOST_ONE))


class PairCollector:
    """Collector of the pairs above a limit and of each item's largest cosine, from tiles.

    If there are more than `max_pairs`, the limit rises to the next of the ascending `levels`. Memory: 12 bytes per
    pair, 4 per item, and as much again for a moment.
    """

    def __init__(self, num_items: int, levels: Sequence[float], max_pairs: int) -> None:
        self.highest: Floats = np.full(num_items, NOT_COMPARED, np.float32)
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
            np.fill_diagonal(tile.cosines, NOT_COMPARED)
        highest_B = tile.cosines.max(axis=1, initial=NOT_COMPARED)
        self.highest[tile.left] = np.maximum(self.highest[tile.left], highest_B)
        if not tile.is_diagonal:
            highest_R = tile.cosines.max(axis=0, initial=NOT_COMPARED)
            self.highest[tile.right] = np.maximum(self.highest[tile.right], highest_R)
        rows = np.flatnonzero(highest_B >= cosine_limit(self.limit))
        if len(rows):
            self._add_pairs(tile, rows)

    def _add_pairs(self, tile: CosineTile, rows: Ints) -> None:
        row, column = np.nonzero(tile.cosines[rows] >= cosine_limit(self.limit))
        row = rows[row]
        if tile.is_diagonal:
            is_above = row < column
            row = row[is_above]
            column = column[is_above]
        self._keys.append(pair_keys(tile.left[row], tile.right[column], len(self.highest)))
        self._cosines.append(tile.cosines[row, column])
        while sum(map(len, self._keys)) > self._max_pairs:
            self._levels = self._levels[1:]
            masks = [cosines >= cosine_limit(self.limit) for cosines in self._cosines]
            self._keys = [keys[mask] for keys, mask in zip(self._keys, masks, strict=True)]
            self._cosines = [cosines[mask] for cosines, mask in zip(self._cosines, masks, strict=True)]

    def pairs(self) -> tuple[Ints, Ints, Floats]:
        """Return all pairs once: items, the lower one first and sorted by both, and cosines, (L,) each."""
        keys, first = np.unique(np.concatenate([np.empty(0, np.int64), *self._keys]), return_index=True)
        cosines = np.concatenate([np.empty(0, np.float32), *self._cosines])[first]
        left, right = np.divmod(keys, len(self.highest))
        return left, right, cosines


def pair_keys(left: Ints, right: Ints, num_items: int) -> Ints:
    """Return a number of each pair of items, which does not depend on their order."""
    return np.minimum(left, right) * num_items + np.maximum(left, right)


class NeighborCollector:
    """Collector of each item's K most similar others, in `best`, from tiles that may hold a pair more than once."""

    def __init__(self, num_items: int, k: int) -> None:
        self.best = KBest(num_items, k, num_candidates=num_items)

    def add(self, tile: CosineTile) -> None:
        """Add the pairs of a tile; an item is not its own neighbor."""
        if tile.is_diagonal:
            np.fill_diagonal(tile.cosines, -np.inf)
        self.best.add_block(tile.left, tile.right, tile.cosines)
        if not tile.is_diagonal:
            self.best.add_block(tile.right, tile.left, tile.cosines.T)


class GroupCollector:
    """Collector of the connected components of all pairs of nodes with items above a cosine, from tiles.

    Memory: about 30 bytes per node.

    Args:
        groups: (S,) group of each node so far, from 0; pairs only merge groups.
        nodes: (N,) node of each item.
        cosine: pairs above it are near.
    """

    def __init__(self, groups: Ints, nodes: Ints, cosine: float) -> None:
        self._groups = groups
        self._nodes = nodes
        self._cosine = cosine
        self._edges: list[tuple[Ints, Ints]] = []
        self._num_edges = 0

    def add(self, tile: CosineTile) -> bool:
        """Add the pairs of a tile, and return whether groups were merged; see `groups`.

        Of the components within a tile at most one edge per item is kept, and those only until they are many.
        """
        row, column = np.nonzero(tile.cosines > self._cosine)
        if not len(row):
            return False
        groups = self._groups[self._nodes[np.concatenate([tile.left, tile.right])]]
        component = components(row, column + len(tile.left), len(groups))
        first = np.empty(len(groups), np.int64)
        first[component[::-1]] = groups[::-1]
        is_edge = first[component] != groups
        self._edges.append((groups[is_edge], first[component][is_edge]))
        self._num_edges += len(self._edges[-1][0])
        if self._num_edges <= len(self._groups) // 8:
            return False
        self.merge()
        return True

    def merge(self) -> Ints:
        """Merge the groups of the edges so far, and return the group of each node: (S,) int64."""
        if self._num_edges:
            left, right = (np.concatenate(ends) for ends in zip(*self._edges, strict=True))
            self._groups = components(left, right, int(self._groups.max()) + 1)[self._groups]
            self._edges = []
            self._num_edges = 0
        return self._groups


def components(left: Ints, right: Ints, size: int) -> Ints:
    """Return the number of the connected component of each of `size` nodes, given the edges: (size,) int64."""
    edges = scipy.sparse.coo_array((np.ones(len(left), bool), (left, right)), shape=(size, size))
    _, component = scipy.sparse.csgraph.connected_components(edges, directed=False)
    numbers: Ints = component.astype(np.int64)
    return numbers


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Pairs that were found, among all pairs above the limit that hold a drawn item."""

    num_items: int  # drawn and compared with all
    num_pairs: int  # true pairs above the limit
    num_found: int

    @property
    def value(self) -> float | None:
        """Fraction of the pairs that was found; None if there was none."""
        return self.num_found / self.num_pairs if self.num_pairs else None

    def to_json(self) -> dict[str, float | None]:
        """Return all values as JSON."""
        return {**asdict(self), "value": self.value}


def measure_recall(
    arranged: Arranged, cosine: float, is_found: Callable[[Ints, Ints], Bools], *, seed: int, progress: Progress
) -> Recall | None:
    """Compare random items with all, and count how many of their pairs of at least a cosine were found.

    Args:
        arranged: the items; if all pairs were compared, there is nothing to measure.
        cosine: limit of the pairs.
        is_found: returns which pairs of items, two (M,) of item numbers, were found.
        seed: of the drawn items.
    """
    if arranged.num_clusters == 1:
        return None
    probes = draw_probes(np.arange(len(arranged.items)), seed)
    probes_QP = arranged.read(probes)
    is_probe_N = np.zeros(len(arranged.items), bool)
    is_probe_N[probes] = True
    num_pairs = num_found = 0
    parts = blocks(len(arranged.items), BLOCK)
    for block in watch(parts, progress, f"measuring the recall of {arranged.unit}", len(arranged.items), "items"):
        query, other = np.nonzero(probes_QP @ arranged.read(block).T >= cosine_limit(cosine) + _ROUNDING)
        left = probes[query]
        right = other + block.start
        is_pair = (right > left) | ((right < left) & ~is_probe_N[right])  # a pair of two probes counts once
        num_pairs += int(is_pair.sum())
        num_found += int(is_found(arranged.items[left[is_pair]], arranged.items[right[is_pair]]).sum())
    return Recall(num_items=len(probes), num_pairs=num_pairs, num_found=num_found)


def measure_neighbor_recall(arranged: Arranged, best: KBest, *, seed: int, progress: Progress) -> Recall | None:
    """Compare random items with all, and count how many of their nearest neighbors were found, or ones as near."""
    if arranged.num_clusters == 1:
        return None
    probes = draw_probes(np.arange(len(arranged.items)), seed)
    title = f"measuring the recall of {arranged.unit}"
    parts = watch(blocks(len(arranged.items), BLOCK), progress, title, len(arranged.items), "items")
    k = best.scores.shape[1]
    true_QK, cosines_QK = knn(arranged.read(probes), map(arranged.read, parts), k, own=probes)
    items = arranged.items[probes]
    is_found_QK = (best.numbers[items][:, None, :] == arranged.items[true_QK][:, :, None]).any(axis=2)
    is_found_QK |= cosines_QK <= best.scores[items][:, -1:] + _ROUNDING  # another one of the same cosine
    return Recall(num_items=len(probes), num_pairs=is_found_QK.size, num_found=int(is_found_QK.sum()))


def draw_probes(numbers: Ints, seed: int) -> Ints:
    """Draw 1,000 of some numbers, or all if there are fewer: ascending."""
    return np.sort(np.random.default_rng(seed).permutation(numbers)[:_NUM_PROBES])
