"""Medians of repeated runs, and a table of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from embedcache.cli.console import print_line, print_table
from embedcache.provenance import peak_memory_bytes


def median_seconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """Time a call several times after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def median_rates(calls: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, float]:
    """Take turns: call each in order, `repeats` times over, so that a slow minute hits all; give each one's median."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            rates[name].append(call())
    return {name: statistics.median(values) for name, values in rates.items()}


def show(title: str, unit: str, rates: Sequence[tuple[str, float]]) -> None:
    """Print rates, each with its ratio to the first, which is the floor or the peer; and the peak memory so far."""
    floor = rates[0][1]
    rows = [[name, f"{rate:,.1f}", f"{rate / floor:.3f}"] for name, rate in rates]
    print_table([title, unit, f"ratio to {rates[0][0]}"], rows)
    print_line(f"peak memory {peak_memory_bytes() / 1e9:.2f} GB")
