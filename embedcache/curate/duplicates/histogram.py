"""How close items lie to their nearest other: counts, and bars of text."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Floats, Ints

_WIDTHS = (0.005, 0.01, 0.02, 0.05, 0.1)
_MOST_BINS = 32
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of cosines.

    Args:
        lows: (H,) where each bin begins, ascending.
        width: of a bin; the last one holds its upper end, 1, as well.
        counts: (H,) int64.
    """

    lows: Floats
    width: float
    counts: Ints

    def bars(self) -> Iterator[str]:
        """Draw a line a bin, the closest first; the length of a bar is the logarithm of its count."""
        logs = np.log1p(self.counts) / np.log1p(max(1, self.counts.max(initial=0)))
        for low, log, count in zip(self.lows[::-1], logs[::-1], self.counts[::-1], strict=True):
            yield f"{low:6.3f}  {'█' * round(_BAR * float(log)):{_BAR}}  {count:,}"


def histogram(cosines_N: Floats) -> Histogram:
    """Count cosines in at most 32 bins that end at 1; those below all of them are in the first.

    Args:
        cosines_N: (N,) each item's largest cosine to another.
    """
    lowest = float(np.clip(cosines_N.min(initial=1), -1, 1))
    width = next((width for width in _WIDTHS if (1 - lowest) / width <= _MOST_BINS), _WIDTHS[-1])
    num_bins = min(_MOST_BINS, max(1, int(np.ceil((1 - lowest) / width - 1e-6))))
    bins = np.ceil((1 - cosines_N.astype(np.float64)) / width - 1e-4).astype(np.int64) - 1
    bins = np.clip(bins, 0, num_bins - 1)
    lows = (1 - width * np.arange(num_bins, 0, -1)).astype(np.float32)
    counts = np.bincount(num_bins - 1 - bins, minlength=num_bins).astype(np.int64)
    return Histogram(lows=lows, width=width, counts=counts)
