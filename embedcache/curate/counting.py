"""Counting the items near each concept: background and thresholds, one exact pass, or the results of an index."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from embedcache.arrays import Array, Bools, Floats, Ints, blocks
from embedcache.errors import FingerprintError, quoted
from embedcache.processes import num_cores
from embedcache.progress import Progress
from embedcache.search.card import IndexCard, check_card, open_row_index, read_card
from embedcache.search.faiss_index import RowIndex
from embedcache.search.vectors import Vectors

SAMPLE = 16_384  # items drawn for quantiles and thresholds, which are exact if the pool has no more
QUANTILES = (0.5, 0.9, 0.99, 0.999)

_ONE_DEVIATION_BELOW = 0.158655  # quantile of a normal distribution one standard deviation below its mean
_CONCEPTS_PER_BLOCK = 128
_ROUNDING = 1e-5  # two ways of summing one cosine in float32


@dataclass(frozen=True, kw_only=True)
class Background:
    """Similarities of C concepts to a random sample of a pool."""

    num_items: int
    quantiles: Array  # (C, 4) float32, at `QUANTILES`
    spreads: Array  # (C,) float32, standard deviation of a normal background, estimated below the median
    floors: Array  # (C,) float32, below the k-th best of the sample, and so below that of the pool

    @property
    def has_spread(self) -> bool:
        """Whether the similarities to any concept differ by more than rounding; those of equal items do not."""
        return bool((self.spreads > _ROUNDING).any())

    def thresholds(self, deviations: float) -> Floats:
        """Return thresholds this many standard deviations of the background above its median: (C,).

        The background is estimated where items of the concept do not disturb it, from the median downwards, as an
        empirical null is ("Large-Scale Simultaneous Hypothesis Testing: The Choice of a Null Hypothesis", Efron, JASA
        2004, fits the center). A normal background exceeds 4 deviations for 1 in 31,574 items.
        """
        return (self.quantiles[:, 0] + deviations * self.spreads).astype(np.float32)


def estimate_background(concepts_CP: Floats, sample_SP: Floats, k: int) -> Background:
    """Compare concepts with a sample of at least k items, rows of length 1.

    Memory: per core, the similarities of 128 concepts.
    """
    ranks = np.round(np.array([_ONE_DEVIATION_BELOW, *QUANTILES]) * (len(sample_SP) - 1)).astype(np.int64)

    def quantiles(block: slice) -> Floats:
        sims_BS = concepts_CP[block] @ sample_SP.T
        sims_BS.sort(axis=1)
        return np.column_stack([sims_BS[:, ranks], sims_BS[:, -k]])

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_cores()) as pool:
        found_CX = np.concatenate(list(pool.map(quantiles, blocks(len(concepts_CP), _CONCEPTS_PER_BLOCK))))
    return Background(
        num_items=len(sample_SP),
        quantiles=found_CX[:, 1:-1],
        spreads=found_CX[:, 1] - found_CX[:, 0],
        floors=found_CX[:, -1] - np.float32(_ROUNDING),
    )


class TopItems:
    """The k most similar items of each concept; of equal scores the lower row.

    The result does not depend on the order in which candidates are added. Memory: 2 C × k candidates, and those that
    were added last.
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
        """Add the candidates of another."""
        for part in other._parts:
            self.add(*part)

    def table(self) -> tuple[Floats, Ints]:
        """Return scores (C, k), best first, and rows (C, k); -inf and -1 if there are fewer."""
        self._shrink()
        scores_CK = np.full((self._num_concepts, self._k), -np.inf, np.float32)
        rows_CK = np.full((self._num_concepts, self._k), -1, np.int64)
        if self._parts:
            concepts_M, scores_M, rows_M = self._parts[0]
            ranks_M = _ranks(concepts_M)
            scores_CK[concepts_M, ranks_M] = scores_M
            rows_CK[concepts_M, ranks_M] = rows_M
        return scores_CK, rows_CK

    def _shrink(self) -> None:
        if not self._parts:
            return
        concepts_M, scores_M, rows_M = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.lexsort((rows_M, -scores_M, concepts_M))
        kept = order[_ranks(concepts_M[order]) < self._k]
        self._parts = [(concepts_M[kept], scores_M[kept], rows_M[kept])]


def _ranks(sorted_M: Array) -> Ints:
    """Count equal neighbors from 0: [3, 3, 5] -> [0, 1, 0]."""
    return np.arange(len(sorted_M)) - np.searchsorted(sorted_M, sorted_M)


_TILE = 2_000_000  # similarities at a time: 8 MB per core; smaller tiles slow the product down
_MIN_TILE_ROWS = 64
_SCRATCH = threading.local()


@dataclass(kw_only=True)
class PartialCoverage:
    """Counts of a range of chunks. G is 1, or 2 if a selection is counted beside the whole pool."""

    num_items: Ints  # (G,)
    num_covered: Ints  # (G,) items above the threshold of at least one concept
    counts: Ints  # (G, C) items above each concept's threshold
    assigned: Ints  # (G, C) covered items by the concept they are most similar to, among those they are above
    shared: Ints  # (C, J) items of the whole pool above the thresholds of both a concept and its j-th nearest
    top: TopItems


class CoverageCounter:
    """An exact pass over a pool (see `run_pass`) that counts the items near each concept.

    A tile of similarities is one matrix product and one comparison; all else works on the few values above a threshold
    or possibly among the k best. Memory: a chunk, a tile, C × (k + J) numbers, and the positions above a threshold.

    Args:
        concepts_CP: rows of length 1.
        thresholds_C: an item counts if its similarity is above.
        floors_C: no item below is among a concept's k best.
        nearest_CJ: numbers of the concepts nearest to each.
        k: items to keep per concept.
        is_selected_N: whether each row of the pool's modality is selected; None: no selection.
    """

    def __init__(
        self,
        concepts_CP: Floats,
        *,
        thresholds_C: Floats,
        floors_C: Floats,
        nearest_CJ: Ints,
        k: int,
        is_selected_N: Bools | None = None,
    ) -> None:
        self._columns_PC = np.ascontiguousarray(concepts_CP.T)
        self._thresholds_C, self._floors_C = thresholds_C, floors_C
        self.lower_C = np.minimum(thresholds_C, floors_C)
        self._nearest_CJ, self._k, self._is_selected_N = nearest_CJ, k, is_selected_N

    def process(self, rows_B: Ints, vectors_BP: Floats) -> PartialCoverage:
        """Count a chunk."""
        partial = self.empty()
        partial.num_items = self.count_items(rows_B)
        num_rows, num_concepts = max(1, len(rows_B)), len(self.lower_C)
        num_tiles = -(-num_rows // max(_MIN_TILE_ROWS, _TILE // num_concepts))
        size = -(-num_rows // num_tiles)  # tiles of about equal size
        sims, mask = _scratch_arrays(size, num_concepts)
        for tile in blocks(len(rows_B), size):
            sims_BC, mask_BC = sims[: tile.stop - tile.start], mask[: tile.stop - tile.start]
            np.matmul(vectors_BP[tile], self._columns_PC, out=sims_BC)
            np.greater_equal(sims_BC, self.lower_C, out=mask_BC)
            positions = np.flatnonzero(mask_BC)
            items, concepts = np.divmod(positions, num_concepts)
            self.add(partial, rows_B[tile][items], concepts, sims_BC.ravel()[positions])
        return partial

    def merge(self, before: PartialCoverage, after: PartialCoverage) -> PartialCoverage:
        """Add the second to the first."""
        before.num_items = before.num_items + after.num_items
        before.num_covered = before.num_covered + after.num_covered
        before.counts = before.counts + after.counts
        before.assigned = before.assigned + after.assigned
        before.shared = before.shared + after.shared
        before.top.merge(after.top)
        return before

    def empty(self) -> PartialCoverage:
        """Return counts of nothing."""
        num_groups, num_concepts = 1 if self._is_selected_N is None else 2, len(self.lower_C)
        return PartialCoverage(
            num_items=np.zeros(num_groups, np.int64),
            num_covered=np.zeros(num_groups, np.int64),
            counts=np.zeros((num_groups, num_concepts), np.int64),
            assigned=np.zeros((num_groups, num_concepts), np.int64),
            shared=np.zeros(self._nearest_CJ.shape, np.int64),
            top=TopItems(num_concepts, self._k),
        )

    def count_items(self, rows: Ints) -> Ints:
        """Count items of the pool, and of the selection: (G,)."""
        return np.array([mask.sum() for mask in self._group_masks(rows)])

    def add(self, partial: PartialCoverage, rows_M: Ints, concepts_M: Ints, scores_M: Floats) -> None:
        """Count matches: all those of an item, sorted by row and concept, that are not below `lower_C`."""
        is_candidate = scores_M >= self._floors_C[concepts_M]
        partial.top.add(concepts_M[is_candidate], scores_M[is_candidate], rows_M[is_candidate])
        is_above = scores_M > self._thresholds_C[concepts_M]
        rows_A, concepts_A = rows_M[is_above], concepts_M[is_above]
        self._count(partial, rows_A, concepts_A, scores_M[is_above])
        self._count_shared(partial, rows_A, concepts_A)

    def _count(self, partial: PartialCoverage, rows_A: Ints, concepts_A: Ints, scores_A: Floats) -> None:
        num_concepts = len(self.lower_C)
        is_top_A = _first_largest(rows_A, scores_A)
        for group, mask_A in enumerate(self._group_masks(rows_A)):
            partial.num_covered[group] += (is_top_A & mask_A).sum()
            partial.counts[group] += np.bincount(concepts_A[mask_A], minlength=num_concepts)
            partial.assigned[group] += np.bincount(concepts_A[is_top_A & mask_A], minlength=num_concepts)

    def _group_masks(self, rows: Ints) -> list[Bools]:
        """Return which rows are in the pool, and which in the selection."""
        everything = np.ones(len(rows), bool)
        return [everything] if self._is_selected_N is None else [everything, self._is_selected_N[rows]]

    def _count_shared(self, partial: PartialCoverage, rows_A: Ints, concepts_A: Ints) -> None:
        if not len(rows_A):
            return
        codes_A = rows_A * len(self.lower_C) + concepts_A  # ascending
        wanted_AJ = rows_A[:, None] * len(self.lower_C) + self._nearest_CJ[concepts_A]
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


def _first_largest(groups_M: Ints, values_M: Floats) -> Bools:
    """Return a mask of the largest value per group, the first of equal ones: (M,) bool. Groups ascend."""
    is_first_M = np.zeros(len(groups_M), bool)
    if not len(groups_M):
        return is_first_M
    starts = np.flatnonzero(np.diff(groups_M, prepend=-1))
    largest_M = np.repeat(np.maximum.reduceat(values_M, starts), np.diff(starts, append=len(groups_M)))
    positions = np.flatnonzero(values_M == largest_M)
    is_first_M[positions[np.flatnonzero(np.diff(groups_M[positions], prepend=-1))]] = True
    return is_first_M


_FIRST_K = 256  # results requested at first; doubled while some of the last half are above the limit
_MORE_LISTS = 4
_ITEMS_PER_BLOCK = 2**17  # results that are compared at a time


def open_index(path: Path | str, pool: Vectors) -> tuple[RowIndex, IndexCard]:
    """Open an index of the vectors of a pool.

    Raises `FingerprintError` if it was built from other samples, another feature or run, or fewer items.
    """
    path = Path(path)
    card = read_card(path)
    make = f"build one: embedcache curate index {quoted(pool.cache.path)} NEW-INDEX --modality {pool.modality}"
    if not pool.cache.info.has_rows_of(card.index_digest):
        raise FingerprintError(f"index {path}: expected the samples of {pool.cache.path}, got others; {make}")
    requested = {
        "modality": pool.modality,
        "feature": pool.feature.name,
        "fingerprint": pool.feature.fingerprint,
        "run_weights": None if pool.config is None else pool.config.weights_digest,
        "num_vectors": len(pool.rows),
        "width": pool.width,
    }
    check_card(path, card, requested, next_step=make)
    return open_row_index(path, card, device=pool.device), card


def count_indexed(
    pool: Vectors,
    counter: CoverageCounter,
    concepts_CP: Floats,
    index: RowIndex,
    parameters: Mapping[str, int],
    progress: Progress,
) -> PartialCoverage:
    """Count what an index finds near each concept, by exact cosines: never too many, too few by what it misses.

    Memory: 20 bytes per match, and the vectors of 131,072 items.
    """
    partial = counter.empty()
    partial.num_items = counter.count_items(pool.rows)
    progress.start("searching", len(concepts_CP), "concepts")
    parts = list(_search_matches(pool, concepts_CP, counter.lower_C, index, parameters, progress))
    progress.finish()
    rows_M, concepts_M = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    order = np.lexsort((concepts_M, rows_M))
    scores_M = np.concatenate([part[2] for part in parts])
    counter.add(partial, rows_M[order], concepts_M[order], scores_M[order])
    return partial


def _search_matches(
    pool: Vectors,
    concepts_CP: Floats,
    lower_C: Floats,
    index: RowIndex,
    parameters: Mapping[str, int],
    progress: Progress,
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Search for the items that are not below a concept's limit: rows, concepts and exact cosines, (M,) each."""
    numbers, k = np.arange(len(concepts_CP)), min(_FIRST_K, len(index))
    while len(numbers):
        unfinished = []
        for block in blocks(len(numbers), max(1, _ITEMS_PER_BLOCK // k)):
            part = numbers[block]
            rows_BK = index.search(concepts_CP[part], k, _more_thorough(parameters, k))[1]
            sims_BK = _exact_cosines(pool, concepts_CP[part], rows_BK)
            is_match_BK: Bools = (rows_BK >= 0) & (sims_BK >= lower_C[part, None])
            has_more_B = is_match_BK[:, k // 2 :].max(axis=1) * (k < len(index))
            which, ranks = np.nonzero(is_match_BK & ~has_more_B[:, None])
            yield rows_BK[which, ranks], part[which], sims_BK[which, ranks]
            unfinished.append(part[has_more_B])
            progress.advance(int((~has_more_B).sum()))
        numbers, k = np.concatenate(unfinished), min(2 * k, len(index))


def _exact_cosines(pool: Vectors, concepts_BP: Floats, rows_BK: Ints) -> Floats:
    """Compare concepts with the stored vectors of their results: (B, K); arbitrary where nothing was found."""
    rows_U, positions = np.unique(rows_BK.clip(min=pool.rows[0]), return_inverse=True)
    sims_BU = concepts_BP @ pool.read(rows_U).T
    return np.take_along_axis(sims_BU, positions.reshape(rows_BK.shape), axis=1)


def _more_thorough(parameters: Mapping[str, int], k: int) -> dict[str, int]:
    """Return parameters for many results: they were tuned for the 10 nearest, and matches are in more lists."""
    more = dict(parameters)
    if "nprobe" in more:
        more["nprobe"] *= _MORE_LISTS * -(-k // _FIRST_K)
    if "efSearch" in more:
        more["efSearch"] *= -(-2 * k // more["efSearch"])  # the next multiple from 2 k on
    return more
