"""The samples that fit each concept best, in one pass over the items."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Array, Floats, Ints

_MOST_SAMPLES = 2**32


class Best(NamedTuple):
    """For each of C concepts the K samples that fit it best, best first; equal scores by sample.

    Args:
        scores_CK: float32, the cosine of the sample's best item.
        samples_CK: int64.
    """

    scores_CK: Floats
    samples_CK: Ints


def best_samples(blocks: Iterable[tuple[Ints, Floats]], concepts_CP: Floats, k: int) -> Best:
    """Find the `k` best samples of each concept, or all where there are fewer. A sample counts once, by its best item.

    Exact, and the same however the items are cut into blocks. Memory: the products of a block in float64, and 8 bytes
    for each of C x 2 K candidates; it does not grow with the items.

    Args:
        blocks: the sample of each item (B,), ascending over all blocks, and its vector (B, P).
        concepts_CP: (C, P) float32 unit rows.
        k: at least 1.
    """
    kept = [np.empty((len(concepts_CP), 0), np.int64)]
    for samples_B, vectors_BP in whole_samples(blocks):
        samples_S, starts_S = np.unique(samples_B, return_index=True)
        scores_CS = np.maximum.reduceat(cosines(concepts_CP, vectors_BP), starts_S, axis=1)
        kept.append(_largest(to_keys(scores_CS, samples_S), k))
        if sum(part.shape[1] for part in kept) >= 2 * k:
            kept = [_largest(np.concatenate(kept, axis=1), k)]
    keys_CK = -np.sort(-_largest(np.concatenate(kept, axis=1), k), axis=1)
    return from_keys(keys_CK)


def cosines(left_QP: Floats, right_CP: Floats) -> Floats:
    """Multiply unit rows: (Q, C) float32, through float64.

    So that equal vectors get equal cosines, whatever stands beside them in a block: sums in float32 depend on that.
    """
    products: Floats = (left_QP.astype(np.float64) @ right_CP.astype(np.float64).T).astype(np.float32)
    return products


def whole_samples(blocks: Iterable[tuple[Ints, Floats]]) -> Iterator[tuple[Ints, Floats]]:
    """Cut blocks of items anew, so that all items of a sample stand in one."""
    held: tuple[Ints, Floats] | None = None
    for samples, vectors in blocks:
        if held is not None:
            samples, vectors = np.concatenate([held[0], samples]), np.concatenate([held[1], vectors])
        if len(samples):
            last = int(np.searchsorted(samples, samples[-1]))
            if last:
                yield samples[:last], vectors[:last]
            held = samples[last:], vectors[last:]
    if held is not None:
        yield held


def to_keys(scores: Array, samples: Ints) -> Ints:
    """Make one int64 of a float32 score and a sample: larger for a higher score and, of equals, for a lower sample.

    A float's bits, read as an integer, keep its order; those of negative ones are turned round.
    """
    assert not len(samples) or samples.max() < _MOST_SAMPLES
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # + 0: of -0.0 makes 0.0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys: Ints = ordered * _MOST_SAMPLES + (_MOST_SAMPLES - 1 - samples)
    return keys


def from_keys(keys: Ints) -> Best:
    """Take the scores and samples out of keys again."""
    ordered, rest = np.divmod(keys, _MOST_SAMPLES)
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return Best(bits.astype(np.int32).view(np.float32), _MOST_SAMPLES - 1 - rest)


def _largest(keys_CN: Ints, k: int) -> Ints:
    """Keep the k largest of each row, in any order."""
    if keys_CN.shape[1] <= k:
        return keys_CN
    return np.ascontiguousarray(np.partition(keys_CN, -k, axis=1)[:, -k:])
