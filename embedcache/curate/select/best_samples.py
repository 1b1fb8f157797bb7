"""The samples that match each concept best, exactly, in one pass over the items of any number of samples."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Floats, Ints, from_sort_keys, to_sort_keys
from embedcache.curate.select.pool import compute_cosines


class TopSamples(NamedTuple):
    """The K samples that match each of C concepts best, best first; equal scores by sample."""

    scores_CK: Floats  # cosine of the sample's best item
    samples_CK: Ints


def best_samples(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> TopSamples:
    """Find the `k` best samples of each concept, or all if there are fewer. A sample counts once, by its best item.

    Exact, for any division of the items into blocks: the sample of each item (B,), ascending over all blocks, and its
    vector (B, P). Memory: the products of a block in float64, and 8 bytes for each of C x 2 K candidates; it does not
    grow with the items.
    """
    best = _BestKeys(len(concepts_CP), k)
    for samples_B, vectors_BP in whole_samples(blocks):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        best.add(np.maximum.reduceat(compute_cosines(concepts_CP, vectors_BP), starts_S, axis=1), samples_S)
    return TopSamples(*from_sort_keys(-np.sort(-best.merged(), axis=1)))


class _BestKeys:
    """The k largest sort keys of each concept, of scores that come in the order of their samples.

    Of a full row only the scores above its lowest are looked at, of which there are fewer and fewer.
    """

    def __init__(self, num_concepts: int, k: int) -> None:
        self._k, self._keys_CK = k, np.empty((num_concepts, 0), np.int64)
        self._lowest_C1 = np.full((num_concepts, 1), -np.inf, np.float32)
        self._concepts: list[Ints] = []  # of the keys that are not merged yet
        self._keys: list[Ints] = []

    def add(self, scores_CS: Floats, samples_S: Ints) -> None:
        """Add the scores of further samples."""
        if self._keys_CK.shape[1] < self._k:
            keys_CN = np.concatenate([self._keys_CK, to_sort_keys(scores_CS, samples_S)], axis=1)
            self._keys_CK = _largest(keys_CN, self._k)
            self._find_lowest()
            return
        concept_M, sample_M = np.nonzero(scores_CS > self._lowest_C1)  # of equal scores the earlier sample is better
        if not len(concept_M):
            return
        self._concepts.append(concept_M)
        self._keys.append(to_sort_keys(scores_CS[concept_M, sample_M], samples_S[sample_M]))
        if 4 * sum(map(len, self._keys)) >= self._keys_CK.size:
            self.merged()

    def merged(self) -> Ints:
        """Return the k largest keys of each concept, or all if there are fewer, in any order: (C, K) int64."""
        if self._keys:
            concept_M, key_M = np.concatenate(self._concepts), np.concatenate(self._keys)
            order_M = np.argsort(concept_M, kind="stable")
            edges = np.searchsorted(concept_M[order_M], np.arange(len(self._keys_CK) + 1))
            for concept, (start, stop) in enumerate(pairwise(edges.tolist())):
                if stop > start:
                    keys = np.concatenate([self._keys_CK[concept], key_M[order_M[start:stop]]])
                    self._keys_CK[concept] = np.partition(keys, -self._k)[-self._k :]
            self._concepts, self._keys = [], []
            self._find_lowest()
        return self._keys_CK

    def _find_lowest(self) -> None:
        if self._keys_CK.shape[1] == self._k:
            self._lowest_C1, _ = from_sort_keys(self._keys_CK.min(axis=1, keepdims=True))


def whole_samples(blocks: Iterable[tuple[Ints, Floats]]) -> Iterator[tuple[Ints, Floats]]:
    """Divide blocks of items anew, so that all items of a sample are in one block."""
    pending: tuple[Ints, Floats] | None = None
    for samples, vectors in blocks:
        if pending is not None:
            samples = np.concatenate([pending[0], samples])
            vectors = np.concatenate([pending[1], vectors])
        if len(samples):
            last = int(np.searchsorted(samples, samples[-1]))
            if last:
                yield samples[:last], vectors[:last]
            pending = samples[last:], vectors[last:]
    if pending is not None:
        yield pending


def _largest(keys_CN: Ints, k: int) -> Ints:
    """Return the k largest of each row, in any order."""
    if keys_CN.shape[1] <= k:
        return keys_CN
    return np.ascontiguousarray(np.partition(keys_CN, -k, axis=1)[:, -k:])
