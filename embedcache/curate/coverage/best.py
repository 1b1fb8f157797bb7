"""The k best items of each concept, kept while a pool streams by."""

import numpy as np

from embedcache.arrays import Array, Floats, Ints


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
    """Count equal neighbours from 0: [3, 3, 5] -> [0, 1, 0]."""
    places_M: Ints = np.arange(len(sorted_M)) - np.searchsorted(sorted_M, sorted_M)
    return places_M
