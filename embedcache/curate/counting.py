"""The pass that counts, for each concept, the items of a pool above its threshold.

The k best items of each concept, kept while a pool streams by.

What the similarities of each concept look like on a random sample of the pool, and the thresholds this gives.

Coverage through an index: it names the items to look at, and their exact cosines are counted.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.errors import FingerprintError
from embedcache.progress import Progress
from embedcache.search.faiss_index import RowIndex, read_index
from embedcache.search.index import IndexCard, check_card, read_card
from embedcache.search.vectors import Vectors


class TopItems:
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

    def merge(self, other: "TopItems") -> None:
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


def estimate_background(concepts_CP: Floats, sample_SP: Floats, k: int) -> Background:
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
class PartialCoverage:
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
    best: TopItems


class CoverageCounter:
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

    def process(self, rows_B: Ints, vectors_BP: Floats) -> PartialCoverage:
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

    def nothing(self) -> PartialCoverage:
        """Start a tally."""
        num_groups, num_concepts = 1 if self._is_selected_N is None else 2, len(self.lower_C)
        return PartialCoverage(
            num_items=np.zeros(num_groups, np.int64),
            num_covered=np.zeros(num_groups, np.int64),
            counts=np.zeros((num_groups, num_concepts), np.int64),
            assigned=np.zeros((num_groups, num_concepts), np.int64),
            shared=np.zeros(self._near_CJ.shape, np.int64),
            best=TopItems(num_concepts, self._k),
        )

    def count_items(self, rows: Ints) -> Ints:
        """Count items of the pool, and of the selection: (G,)."""
        return np.array([is_in.sum() for is_in in self._groups(rows)])

    def add(self, tally: PartialCoverage, rows_M: Ints, concepts_M: Ints, scores_M: Floats) -> None:
        """Count matches: all those of an item, by row and then by concept, that are not below `lower_C`."""
        is_near = scores_M >= self._floors_C[concepts_M]
        tally.best.add(concepts_M[is_near], scores_M[is_near], rows_M[is_near])
        is_above = scores_M > self._thresholds_C[concepts_M]
        rows_A, concepts_A = rows_M[is_above], concepts_M[is_above]
        self._count(tally, rows_A, concepts_A, scores_M[is_above])
        self._share(tally, rows_A, concepts_A)

    def merge(self, before: PartialCoverage, after: PartialCoverage) -> PartialCoverage:
        """Add the second to the first."""
        before.num_items = before.num_items + after.num_items
        before.num_covered = before.num_covered + after.num_covered
        before.counts = before.counts + after.counts
        before.assigned = before.assigned + after.assigned
        before.shared = before.shared + after.shared
        before.best.merge(after.best)
        return before

    def _count(self, tally: PartialCoverage, rows_A: Ints, concepts_A: Ints, scores_A: Floats) -> None:
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

    def _share(self, tally: PartialCoverage, rows_A: Ints, concepts_A: Ints) -> None:
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


_Matches: TypeAlias = tuple[Ints, Ints, Floats]
"""Rows, concepts and exact cosines: (M,) each."""

_FIRST = 256
"""Items asked for at first; twice as many as long as some of the last half are above."""

_MORE_LISTS = 4

_AT_ONCE = 2**17
"""Items that are looked at together, of as many concepts as that is."""


def open_index(path: Path | str, pool: Vectors) -> tuple[RowIndex, IndexCard]:
    """Open an index of the very vectors of a pool.

    Raises:
        PathError: there is no finished index.
        FingerprintError: it was made from other samples, another feature or run, or holds fewer items.
    """
    path = Path(path)
    card = read_card(path)
    if not pool.cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(f"index {path} was made from other samples than {pool.cache.path} holds")
    asked = {
        "modality": pool.modality,
        "feature": pool.feature.name,
        "fingerprint": pool.feature.fingerprint,
        "run_weights": None if pool.config is None else pool.config.weights_digest,
        "num_vectors": len(pool.rows),
    }
    make = f"build one: embedcache curate index {pool.cache.path} NEW-INDEX --modality {pool.modality}"
    check_card(path, card, asked, next_step=make)
    return read_index(path / "index.faiss"), card


def count_indexed(
    pool: Vectors,
    work: CoverageCounter,
    concepts_CP: Floats,
    index: RowIndex,
    effort: Mapping[str, int],
    progress: Progress,
) -> PartialCoverage:
    """Count what an index finds of each concept: never too much, and too little by what the index misses.

    Memory: 20 bytes a match, and the vectors of 131,072 items.

    Args:
        pool: whose vectors the index holds.
        work: what is counted.
        concepts_CP: rows of length 1.
        index: of the pool.
        effort: search parameters.
        progress: told about concepts.
    """
    tally = work.nothing()
    tally.num_items = work.count_items(pool.rows)
    progress.start("searching", len(concepts_CP), "concepts")
    parts = list(_matches(pool, concepts_CP, work.lower_C, index, effort, progress))
    progress.finish()
    rows_M, concepts_M = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    order = np.lexsort((concepts_M, rows_M))
    work.add(tally, rows_M[order], concepts_M[order], np.concatenate([part[2] for part in parts])[order])
    return tally


def _matches(
    pool: Vectors,
    concepts_CP: Floats,
    lower_C: Floats,
    index: RowIndex,
    effort: Mapping[str, int],
    progress: Progress,
) -> Iterator[_Matches]:
    """Find the items that are not below a concept's limit."""
    numbers, k = np.arange(len(concepts_CP)), min(_FIRST, len(index))
    while len(numbers):
        unfinished = []
        for block in blocks(len(numbers), max(1, _AT_ONCE // k)):
            part = numbers[block]
            rows_BK = index.search(concepts_CP[part], k, _deeper(effort, k))[1]
            sims_BK = _exact(pool, concepts_CP[part], rows_BK)
            is_match_BK: Bools = (rows_BK >= 0) & (sims_BK >= lower_C[part, None])
            goes_on_B = is_match_BK[:, k // 2 :].max(axis=1) * (k < len(index))
            which, places = np.nonzero(is_match_BK & ~goes_on_B[:, None])
            yield rows_BK[which, places], part[which], sims_BK[which, places]
            unfinished.append(part[goes_on_B])
            progress.advance(int((~goes_on_B).sum()))
        numbers, k = np.concatenate(unfinished), min(2 * k, len(index))


def _exact(pool: Vectors, concepts_BP: Floats, rows_BK: Ints) -> Floats:
    """Compare concepts with the very vectors of what was found for each: (B, K); anything where nothing was found."""
    rows_U, places = np.unique(rows_BK.clip(min=pool.rows[0]), return_inverse=True)
    sims_BU = concepts_BP @ pool.read(rows_U).T
    sims_BK: Floats = np.take_along_axis(sims_BU, places.reshape(rows_BK.shape), axis=1)
    return sims_BK


def _deeper(effort: Mapping[str, int], k: int) -> dict[str, int]:
    """Look further: the effort was chosen for the 10 nearest, and what is above a threshold lies in more lists."""
    further = {"nprobe": _MORE_LISTS * -(-k // _FIRST), "efSearch": -(-2 * k // effort.get("efSearch", 1))}
    return {name: value * max(1, further.get(name, 1)) for name, value in effort.items()}
