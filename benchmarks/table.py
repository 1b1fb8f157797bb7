"""Medians of repeated runs, and a table of them."""

import statistics
import time
from collections.abc import Callable, Sequence

from embedcache.artifact import peak_memory_bytes
from embedcache.cli.console import say, show_table


def median_seconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """Time a call several times after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def show(title: str, unit: str, rates: Sequence[tuple[str, float]]) -> None:
    """Print rates, each with its ratio to the first, which is the floor or the peer; and the peak memory so far."""
    floor = rates[0][1]
    rows = [[name, f"{rate:,.1f}", f"{rate / floor:.3f}"] for name, rate in rates]
    show_table([title, unit, f"ratio to {rates[0][0]}"], rows)
    say(f"peak memory {peak_memory_bytes() / 1e9:.2f} GB")
