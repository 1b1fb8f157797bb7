"""Counting the items near each concept: a scale from a sample of the items, and one exact pass over all of them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.curate.prevalence import CERTAIN, COUNTED, POSSIBLE, Scale, measure_scale, strip_ranks
from embedcache.neighbors.knn import KBest
from embedcache.processes import num_cores

SAMPLE = 65_536
"""Items drawn for the scale of each concept, which is exact if the pool has no more."""
STRIP_SAMPLE = 4_096
"""Items of the sample among which those are ranked that a person is asked about."""

_CONCEPTS_PER_BLOCK = 32
_ROUNDING = 1e-5  # two ways of summing one cosine in float32


@dataclass(frozen=True, kw_only=True)
class Background:
    """Similarities of C concepts to a random sample of a pool.

    Args:
        num_items: size of the sample.
        scale: where the background of each concept lies, and how far its best items are above it.
        thresholds: (C,) float32, cosine above which items are counted; the best item of the sample is above it.
        certain: (C,) float32, cosine above which an item almost certainly shows the concept.
        possible: (C,) int64, items of the sample that may show the concept.
        floors: (C,) float32, below the k-th best of the sample, and so below that of the pool.
        strips: (C, R) int64, positions in the sample of items of all ranks, best first.
        strip_cosines: (C, R) float32, their similarities.
    """

    num_items: int
    scale: Scale
    thresholds: Floats
    certain: Floats
    possible: Ints
    floors: Floats
    strips: Ints
    strip_cosines: Floats


def estimate_background(concepts_CP: Floats, sample_SP: Floats, k: int) -> Background:
    """Compare concepts with a sample of at least k items in random order, rows of length 1.

    Memory: per core, six times the similarities of 32 concepts, 50 MB for a sample of 65,536.
    """
    ranks_R = strip_ranks(min(STRIP_SAMPLE, len(sample_SP)))

    def compare(block: slice) -> Iterator[Array]:
        sims_BS = concepts_CP[block] @ sample_SP.T
        scale = measure_scale(sims_BS)
        yield from (scale.medians, scale.spreads, scale.reaches)
        yield (sims_BS > scale.cosines(POSSIBLE)[:, None]).sum(axis=1)
        yield np.partition(sims_BS, -k, axis=1)[:, -k] - np.float32(_ROUNDING)
        strips = np.argsort(-sims_BS[:, :STRIP_SAMPLE], axis=1, kind="stable")[:, ranks_R]
        yield from (strips, np.take_along_axis(sims_BS, strips, axis=1))

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_cores()) as pool:
        parts = list(pool.map(lambda block: list(compare(block)), blocks(len(concepts_CP), _CONCEPTS_PER_BLOCK)))
    columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
    medians, spreads, reaches, possible, floors, strips, strip_cosines = columns

    scale = Scale(medians=medians, spreads=spreads, reaches=reaches)
    return Background(
        num_items=len(sample_SP),
        scale=scale,
        thresholds=scale.cosines(COUNTED),
        certain=scale.cosines(CERTAIN),
        possible=possible,
        floors=floors,
        strips=strips,
        strip_cosines=strip_cosines,
    )


_TILE = 2_000_000  # similarities at a time: 8 MB per core; smaller tiles slow the product down
_MIN_TILE_ROWS = 64
_SCRATCH = threading.local()


@dataclass(kw_only=True)
class PartialCoverage:
    """Counts of a range of chunks. G is 1, or 2 if a selection is counted beside the whole pool."""

    num_items: Ints  # (G,)
    num_covered: Ints  # (G,) items above the threshold of at least one concept
    above: Ints  # (G, C) items above each concept's threshold
    best: Ints  # (G, C) items by the concept they are most similar to
    assigned: Ints  # (G, C) these items, as far as they are above its threshold
    certain: Ints  # (G, C) these items, as far as they are almost certain
    shared: Ints  # (C, J) items of the whole pool above the thresholds of both a concept and its j-th nearest
    top: KBest  # the most similar items of each concept


class CoverageCounter:
    """The computation of an exact pass over a pool, which counts the items near each concept.

    A tile of similarities is one matrix product, one comparison and one search for the best concept of each item; all
    else works on the few values above a threshold or possibly among the k best. Memory: a chunk, a tile, C × (k + J)
    numbers, and the positions above a threshold.

    Args:
        concepts_CP: rows of length 1.
        background: thresholds of the concepts.
        nearest_CJ: numbers of the concepts nearest to each.
        k: items to keep per concept.
        is_selected_N: whether each row of the pool's modality is selected; None: no selection.
    """

    def __init__(
        self,
        concepts_CP: Floats,
        background: Background,
        *,
        nearest_CJ: Ints,
        k: int,
        is_selected_N: Bools | None = None,
    ) -> None:
        self._columns_PC = np.ascontiguousarray(concepts_CP.T)
        self._background = background
        self._lower_C = np.minimum(background.thresholds, background.floors)
        self._nearest_CJ, self._k, self._is_selected_N = nearest_CJ, k, is_selected_N

    def process(self, rows_B: Ints, vectors_BP: Floats) -> PartialCoverage:
        """Count a chunk."""
        partial = self.empty()
        partial.num_items = np.array([mask.sum() for mask in self._group_masks(rows_B)])
        num_rows, num_concepts = max(1, len(rows_B)), len(self._lower_C)
        num_tiles = -(-num_rows // max(_MIN_TILE_ROWS, _TILE // num_concepts))
        size = -(-num_rows // num_tiles)  # tiles of about equal size
        sims, mask = _scratch_arrays(size, num_concepts)

        for tile in blocks(len(rows_B), size):
            sims_BC, mask_BC = sims[: tile.stop - tile.start], mask[: tile.stop - tile.start]
            np.matmul(vectors_BP[tile], self._columns_PC, out=sims_BC)
            self._count_best(partial, rows_B[tile], sims_BC)

            np.greater_equal(sims_BC, self._lower_C, out=mask_BC)
            positions = np.flatnonzero(mask_BC)
            items, concepts = np.divmod(positions, num_concepts)
            self._count_above(partial, rows_B[tile][items], concepts, sims_BC.ravel()[positions])
        return partial

    def merge(self, before: PartialCoverage, after: PartialCoverage) -> PartialCoverage:
        """Add the second to the first."""
        for field in fields(PartialCoverage):
            if field.name != "top":
                setattr(before, field.name, getattr(before, field.name) + getattr(after, field.name))
        concepts, ranks = np.nonzero(after.top.numbers >= 0)
        before.top.add(concepts, after.top.numbers[concepts, ranks], after.top.scores[concepts, ranks])
        return before

    def empty(self) -> PartialCoverage:
        """Return counts of nothing, into which others may be merged."""
        num_groups, num_concepts = 1 if self._is_selected_N is None else 2, len(self._lower_C)
        above, best, assigned, certain = np.zeros((4, num_groups, num_concepts), np.int64)
        return PartialCoverage(
            num_items=np.zeros(num_groups, np.int64),
            num_covered=np.zeros(num_groups, np.int64),
            above=above,
            best=best,
            assigned=assigned,
            certain=certain,
            shared=np.zeros(self._nearest_CJ.shape, np.int64),
            top=KBest(num_concepts, self._k),
        )

    def _count_best(self, partial: PartialCoverage, rows_B: Ints, sims_BC: Floats) -> None:
        """Count the items of a tile by the concept they are most similar to; of equal ones the first."""
        concepts_B = sims_BC.argmax(axis=1)
        scores_B = sims_BC[np.arange(len(concepts_B)), concepts_B]
        is_above_B = scores_B > self._background.thresholds[concepts_B]
        is_certain_B = scores_B > self._background.certain[concepts_B]
        for group, mask_B in enumerate(self._group_masks(rows_B)):
            partial.best[group] += self._count_concepts(concepts_B[mask_B])
            partial.assigned[group] += self._count_concepts(concepts_B[mask_B & is_above_B])
            partial.certain[group] += self._count_concepts(concepts_B[mask_B & is_certain_B])

    def _count_above(self, partial: PartialCoverage, rows_M: Ints, concepts_M: Ints, scores_M: Floats) -> None:
        """Count matches: all those of an item, sorted by row and concept, that are not below `_lower_C`."""
        is_candidate = scores_M >= self._background.floors[concepts_M]
        partial.top.add(concepts_M[is_candidate], rows_M[is_candidate], scores_M[is_candidate])

        is_above = scores_M > self._background.thresholds[concepts_M]
        rows_A, concepts_A = rows_M[is_above], concepts_M[is_above]
        for group, mask_A in enumerate(self._group_masks(rows_A)):
            partial.num_covered[group] += np.count_nonzero(np.diff(rows_A[mask_A], prepend=-1))
            partial.above[group] += self._count_concepts(concepts_A[mask_A])
        self._count_shared(partial, rows_A, concepts_A)

    def _count_concepts(self, concepts: Ints) -> Ints:
        return np.bincount(concepts, minlength=len(self._lower_C))

    def _group_masks(self, rows: Ints) -> list[Bools]:
        """Return which rows are in the pool, and which in the selection."""
        everything = np.ones(len(rows), bool)
        return [everything] if self._is_selected_N is None else [everything, self._is_selected_N[rows]]

    def _count_shared(self, partial: PartialCoverage, rows_A: Ints, concepts_A: Ints) -> None:
        if not len(rows_A):
            return
        codes_A = rows_A * len(self._lower_C) + concepts_A  # ascending
        wanted_AJ = rows_A[:, None] * len(self._lower_C) + self._nearest_CJ[concepts_A]
        positions_AJ = np.searchsorted(codes_A, wanted_AJ).clip(max=len(codes_A) - 1)
        which, ranks = np.nonzero(codes_A[positions_AJ] == wanted_AJ)
        codes = concepts_A[which] * self._nearest_CJ.shape[1] + ranks
        partial.shared += np.bincount(codes, minlength=partial.shared.size).reshape(partial.shared.shape)


def _scratch_arrays(num_rows: int, num_concepts: int) -> tuple[Floats, Bools]:
    """Return arrays that a thread keeps from tile to tile; new ones would come from the system page by page."""
    arrays: tuple[Floats, Bools] | None = getattr(_SCRATCH, "arrays", None)
    if arrays is None or len(arrays[0]) < num_rows or arrays[0].shape[1] != num_concepts:
        arrays = np.empty((num_rows, num_concepts), np.float32), np.empty((num_rows, num_concepts), bool)
        _SCRATCH.arrays = arrays
    return arrays
