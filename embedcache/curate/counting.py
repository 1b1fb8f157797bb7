"""The pass that counts, for each concept, the items of a pool above its threshold.

The k best items of each concept, kept while a pool streams by.

What the similarities of each concept look like on a random sample of the pool, and the thresholds this gives.
"""

import threading
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks


class Best:
    """Collects candidates, and forgets those that k others of their concept beat. Ties go to the lower row.

    What is kept does not depend on the order or the parts in which candidates come. Memory: 2 C × k candidates, and
    those that were added last.

    Args:
        num_concepts: C.
        k: items kept of each.
    """

    def __init__(self, num_concepts: int, k: int) -> None:
        self._num_concepts, self._k = num_concepts, k
        self._parts: list[tuple[Ints, Floats, Ints]] = []

    def add(self, concepts_M: Ints, scores_M: Floats, rows_M: Ints) -> None:
        """Add candidates."""
        self._parts.append((concepts_M, scores_M, rows_M))
        if sum(len(part[0]) for part in self._parts) > 2 * self._num_concepts * self._k:
            self._shrink()

    def merge(self, other: "Best") -> None:
        """Add another's."""
        for part in other._parts:
            self.add(*part)

    def table(self) -> tuple[Floats, Ints]:
        """Get scores (C, k), best first, and rows (C, k); -inf and -1 where there are fewer."""
        self._shrink()
        scores_CK = np.full((self._num_concepts, self._k), -np.inf, np.float32)
        rows_CK = np.full((self._num_concepts, self._k), -1, np.int64)
        if self._parts:
            concepts_M, scores_M, rows_M = self._parts[0]
            places_M = _places(concepts_M)
            scores_CK[concepts_M, places_M] = scores_M
            rows_CK[concepts_M, places_M] = rows_M
        return scores_CK, rows_CK

    def _shrink(self) -> None:
        if not self._parts:
            return
        concepts_M, scores_M, rows_M = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((rows_M, -scores_M, concepts_M))
        kept = order[_places(concepts_M[order]) < self._k]
        self._parts = [(concepts_M[kept], scores_M[kept], rows_M[kept])]


def _places(sorted_M: Array) -> Ints:
    """Count equal neighbors from 0: [3, 3, 5] -> [0, 1, 0]."""
    places_M: Ints = np.arange(len(sorted_M)) - np.searchsorted(sorted_M, sorted_M)
    return places_M


SAMPLE = 16_384
"""Items drawn; quantiles and thresholds come from them, exact where the pool has no more."""

QUANTILES = (0.5, 0.9, 0.99, 0.999)

_ONE_BELOW = 0.158655  # of a normal distribution, below its mean minus its standard deviation
_BLOCK = 128
_ROUNDING = 1e-5  # two ways of summing one cosine in float32


@dataclass(frozen=True, kw_only=True)
class Background:
    """Similarities of concepts with a sample of a pool.

    Args:
        num_items: in the sample.
        quantiles: (C, 4) float32, at `QUANTILES`.
        spreads: (C,) float32, how far below the median one standard deviation of a normal background reaches.
        floors: (C,) float32, below the k-th best of the sample, and so below that of the pool.
    """

    num_items: int
    quantiles: Array
    spreads: Array
    floors: Array

    def thresholds(self, deviations: float) -> Floats:
        """Put each concept's threshold that many standard deviations of the background above its median: (C,).

        The background is estimated where items of the concept do not disturb it: from the median downwards, as an
        empirical null is ("Large-Scale Simultaneous Hypothesis Testing: The Choice of a Null Hypothesis", Efron, JASA
        2004, fits the center). A normal background passes 1 in 31,574 items at 4 deviations.
        """
        thresholds_C: Floats = (self.quantiles[:, 0] + deviations * self.spreads).astype(np.float32)
        return thresholds_C


def look_at(concepts_CP: Floats, sample_SP: Floats, k: int) -> Background:
    """Compare concepts with a sample. Memory: 128 concepts' similarities with it.

    Args:
        concepts_CP: rows of length 1.
        sample_SP: alike, of at least k rows.
        k: whose best is the floor.
    """
    parts = []
    for block in blocks(len(concepts_CP), _BLOCK):
        sims_BS = np.sort(concepts_CP[block] @ sample_SP.T, axis=1)
        places = np.round(np.array([_ONE_BELOW, *QUANTILES]) * (len(sample_SP) - 1)).astype(np.int64)
        parts.append(np.column_stack([sims_BS[:, places], sims_BS[:, -k]]))
    found_CX = np.concatenate(parts)
    return Background(
        num_items=len(sample_SP),
        quantiles=found_CX[:, 1:-1],
        spreads=found_CX[:, 1] - found_CX[:, 0],
        floors=found_CX[:, -1] - np.float32(_ROUNDING),
    )


_TILE = 2_000_000  # similarities at a time: 8 MB a core; smaller ones slow the product down
_FEWEST_ROWS = 64
_KEPT = threading.local()


@dataclass(kw_only=True)
class Tally:
    """What a range of chunks holds. G is 1, or 2 where a selection is counted beside the whole pool.

    Args:
        num_items: (G,) items.
        num_covered: (G,) items above the threshold of at least one concept.
        counts: (G, C) items above each concept's threshold.
        assigned: (G, C) of the covered items, those most similar to this concept among the concepts they are above.
        shared: (C, J) items of the whole pool above the thresholds of both a concept and its j-th nearest concept.
        best: the most similar items of each concept.
    """

    num_items: Ints
    num_covered: Ints
    counts: Ints
    assigned: Ints
    shared: Ints
    best: Best


class Counting:
    """A pass over a pool; exact.

    A tile of similarities is one matrix product, then compared once: all else is done with the few that are above a
    threshold or may be among the k best. Memory: a chunk, a tile, C × (k + J), and the places above a threshold.

    Args:
        concepts_CP: rows of length 1.
        thresholds_C: an item is counted where its similarity is above.
        floors_C: no item below is among a concept's k best.
        near_CJ: numbers of the concepts nearest to each.
        k: items kept of each concept.
        is_selected_N: of each row of the pool's modality; None: no selection.
    """

    def __init__(
        self,
        concepts_CP: Floats,
        *,
        thresholds_C: Floats,
        floors_C: Floats,
        near_CJ: Ints,
        k: int,
        is_selected_N: Bools | None = None,
    ) -> None:
        self._columns_PC = np.ascontiguousarray(concepts_CP.T)
        self._thresholds_C, self._floors_C = thresholds_C, floors_C
        self.lower_C = np.minimum(thresholds_C, floors_C)
        self._near_CJ, self._k, self._is_selected_N = near_CJ, k, is_selected_N

    def take(self, rows_B: Ints, vectors_BP: Floats) -> Tally:
        """Count a chunk."""
        tally = self.nothing()
        tally.num_items = self.count_items(rows_B)
        num_concepts = len(self.lower_C)
        size = _even(len(rows_B), max(_FEWEST_ROWS, _TILE // num_concepts))
        sims, mask = _scratch(size, num_concepts)
        for tile in blocks(len(rows_B), size):
            sims_BC, mask_BC = sims[: tile.stop - tile.start], mask[: tile.stop - tile.start]
            np.matmul(vectors_BP[tile], self._columns_PC, out=sims_BC)
            np.greater_equal(sims_BC, self.lower_C, out=mask_BC)
            found = np.flatnonzero(mask_BC)
            items, concepts = np.divmod(found, num_concepts)
            self.add(tally, rows_B[tile][items], concepts, sims_BC.ravel()[found])
        return tally

    def nothing(self) -> Tally:
        """Start a tally."""
        num_groups, num_concepts = 1 if self._is_selected_N is None else 2, len(self.lower_C)
        return Tally(
            num_items=np.zeros(num_groups, np.int64),
            num_covered=np.zeros(num_groups, np.int64),
            counts=np.zeros((num_groups, num_concepts), np.int64),
            assigned=np.zeros((num_groups, num_concepts), np.int64),
            shared=np.zeros(self._near_CJ.shape, np.int64),
            best=Best(num_concepts, self._k),
        )

    def count_items(self, rows: Ints) -> Ints:
        """Count items of the pool, and of the selection: (G,)."""
        return np.array([is_in.sum() for is_in in self._groups(rows)])

    def add(self, tally: Tally, rows_M: Ints, concepts_M: Ints, scores_M: Floats) -> None:
        """Count matches: all those of an item, by row and then by concept, that are not below `lower_C`."""
        is_near = scores_M >= self._floors_C[concepts_M]
        tally.best.add(concepts_M[is_near], scores_M[is_near], rows_M[is_near])
        is_above = scores_M > self._thresholds_C[concepts_M]
        rows_A, concepts_A = rows_M[is_above], concepts_M[is_above]
        self._count(tally, rows_A, concepts_A, scores_M[is_above])
        self._share(tally, rows_A, concepts_A)

    def merge(self, before: Tally, after: Tally) -> Tally:
        """Add the second to the first."""
        before.num_items = before.num_items + after.num_items
        before.num_covered = before.num_covered + after.num_covered
        before.counts = before.counts + after.counts
        before.assigned = before.assigned + after.assigned
        before.shared = before.shared + after.shared
        before.best.merge(after.best)
        return before

    def _count(self, tally: Tally, rows_A: Ints, concepts_A: Ints, scores_A: Floats) -> None:
        num_concepts = len(self.lower_C)
        is_top_A = _first_largest(rows_A, scores_A)
        for group, is_in_A in enumerate(self._groups(rows_A)):
            tally.num_covered[group] += (is_top_A & is_in_A).sum()
            tally.counts[group] += np.bincount(concepts_A[is_in_A], minlength=num_concepts)
            tally.assigned[group] += np.bincount(concepts_A[is_top_A & is_in_A], minlength=num_concepts)

    def _groups(self, rows: Ints) -> list[Bools]:
        """Say which items are in the pool, and which in the selection."""
        everything = np.ones(len(rows), bool)
        return [everything] if self._is_selected_N is None else [everything, self._is_selected_N[rows]]

    def _share(self, tally: Tally, rows_A: Ints, concepts_A: Ints) -> None:
        codes_A = rows_A * len(self.lower_C) + concepts_A  # ascending
        wanted_AJ = rows_A[:, None] * len(self.lower_C) + self._near_CJ[concepts_A]
        which, places = np.nonzero(_are_in(wanted_AJ, codes_A))
        codes = concepts_A[which] * self._near_CJ.shape[1] + places
        tally.shared += np.bincount(codes, minlength=tally.shared.size).reshape(tally.shared.shape)


def _are_in(wanted: Ints, sorted_A: Ints) -> Bools:
    if not len(sorted_A):
        return np.zeros(wanted.shape, bool)
    found: Bools = sorted_A[np.searchsorted(sorted_A, wanted).clip(max=len(sorted_A) - 1)] == wanted
    return found


def _scratch(num_rows: int, num_concepts: int) -> tuple[Floats, Bools]:
    """Give memory that a thread keeps from tile to tile: new memory of this size comes from the system page by page."""
    kept: tuple[Floats, Bools] | None = getattr(_KEPT, "arrays", None)
    if kept is None or len(kept[0]) < num_rows or kept[0].shape[1] != num_concepts:
        kept = np.empty((num_rows, num_concepts), np.float32), np.empty((num_rows, num_concepts), bool)
        _KEPT.arrays = kept
    return kept


def _even(num_rows: int, most: int) -> int:
    """Cut rows into as few tiles as may be, all of about one size: gives the size."""
    return max(1, -(-num_rows // max(1, -(-num_rows // most))))


def _first_largest(groups_M: Ints, values_M: Floats) -> Bools:
    """Mark the largest value of each run of equal groups; of ties the first. Groups ascend."""
    is_first_M = np.zeros(len(groups_M), bool)
    if not len(groups_M):
        return is_first_M
    starts = np.flatnonzero(np.diff(groups_M, prepend=-1))
    largest_M = np.repeat(np.maximum.reduceat(values_M, starts), np.diff(starts, append=len(groups_M)))
    places = np.flatnonzero(values_M == largest_M)
    is_first_M[places[np.flatnonzero(np.diff(groups_M[places], prepend=-1))]] = True
    return is_first_M
