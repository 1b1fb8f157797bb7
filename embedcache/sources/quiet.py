"""Silence for warnings of a library, in one thread only.

`warnings.catch_warnings` swaps a list that all threads share (until Python 3.14), so a decoder on one thread
would silence, or un-silence, all others. Here one filter stays in that list and asks, each time, whether the
thread that warns is inside `no_warnings()`.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _ThisThread(threading.local):
    depth = 0
    pattern = "(?!)"  # which matches nothing, for scikit-learn, which copies filters to its threads by their pattern

    def match(self, _text: str) -> bool:
        """Stand where the warnings module expects a pattern for the message."""
        return self.depth > 0


_quiet = _ThisThread()
_FILTER: Any = ("ignore", _quiet, Warning, None, 0)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Drop every warning that this thread gives inside the block; other threads keep theirs."""
    _put_first()
    _quiet.depth += 1
    try:
        yield
    finally:
        _quiet.depth -= 1


def _put_first() -> None:
    """See that our filter is asked before all others, those added since the last call included."""
    filters: list[Any] = warnings.filters  # type: ignore[assignment]  # declared as a Sequence; is a list
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
        for place in reversed([n for n, item in enumerate(filters) if n and item is _FILTER]):
            del filters[place]
