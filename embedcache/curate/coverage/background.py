"""What the similarities of each concept look like on a random sample of the pool, and the thresholds this gives."""

from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Array, Floats, blocks

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
        2004, fits the centre). A normal background passes 1 in 31,574 items at 4 deviations.
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
