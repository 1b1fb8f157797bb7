"""How long comparisons of vectors take: reported before a long one begins, or once half a second of it is done."""

import time
from collections.abc import Callable

import numpy as np

from embedcache.arrays import Floats
from embedcache.progress import Progress

_SHORT_S = 10.0  # shorter comparisons are not announced
_MEASURED_S = 0.5
_TIMED = 512, 4096  # queries and candidates of a product that is timed
_TIMES = 3


def _best_similarities(queries_QP: Floats, candidates_CP: Floats) -> Floats:
    """Compute the largest dot product of each query: (Q,)."""
    best_Q: Floats = (queries_QP @ candidates_CP.T).max(axis=1)
    return best_Q


def note_duration(
    progress: Progress,
    what: str,
    num_pairs: float,
    width: int,
    *,
    compare: Callable[[Floats, Floats], object] = _best_similarities,
    timed: tuple[int, int] = _TIMED,
) -> None:
    """Report before a comparison how long it will take, if that is more than 10 s; a small one is timed.

    If the first time is long, the fastest of three more counts: threads and a device may have had to start.

    Args:
        progress: receives the report.
        what: name of the comparison.
        num_pairs: number of pairs of vectors that are compared.
        width: width of a vector.
        compare: the comparison of queries (Q, P) with candidates (C, P), float32.
        timed: number of queries and of candidates of the small comparison.
    """
    rng = np.random.default_rng(0)
    queries, candidates = (rng.random((count, width), np.float32) for count in timed)

    def estimate() -> float:
        started = time.perf_counter()
        compare(queries, candidates)
        return (time.perf_counter() - started) * num_pairs / (timed[0] * timed[1])

    if estimate() > _SHORT_S and (seconds := min(estimate() for _ in range(_TIMES))) > _SHORT_S:
        progress.note(f"{what}: {num_pairs:,.0f} pairs of vectors, about {_duration(seconds)}")


class MeasuredDuration:
    """Reports how long a comparison takes once half a second of it is done, if that is more than 10 s in all.

    For one whose time is not that of its products: collecting neighbors takes many times as long. The first part is not
    measured: threads and a device may have had to start.
    """

    def __init__(self, progress: Progress, what: str, num_pairs: float) -> None:
        self._progress, self._what, self._num_pairs = progress, what, num_pairs
        self._started: float | None = None
        self._num_done, self._is_over = 0.0, False

    def add(self, num_pairs: float) -> None:
        """Count pairs that were compared."""
        if self._started is None:
            self._started = time.perf_counter()
            return
        self._num_done += num_pairs
        elapsed = time.perf_counter() - self._started
        if self._is_over or elapsed < _MEASURED_S:
            return
        self._is_over, seconds = True, elapsed * self._num_pairs / self._num_done
        if seconds > _SHORT_S:
            self._progress.note(f"{self._what}: {self._num_pairs:,.0f} pairs of vectors, about {_duration(seconds)}")


def _duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two.

    Example:
        >>> _duration(100), _duration(150), _duration(100_000)
        ('100 s', '2 minutes', '28 hours')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
