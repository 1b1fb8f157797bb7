"""Measuring: medians of alternating calls as a table, and time and memory of a command in a process of its own."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from embedcache.cli.console import print_line, print_table
from embedcache.provenance import peak_memory_bytes


def median_seconds(call: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the median time of several calls, after one that does not count."""
    call()

    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def median_rates(calls: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, float]:
    """Return the median result of each call, alternated so that a slow minute affects all of them."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            rates[name].append(call())
    return {name: statistics.median(values) for name, values in rates.items()}


def show(title: str, unit: str, rates: Mapping[str, float]) -> None:
    """Print rates, each with its ratio to the first, which is the floor or the peer, and the peak memory so far."""
    first, floor = next(iter(rates.items()))
    rows = [[name, f"{rate:,.1f}", f"{rate / floor:.3f}"] for name, rate in rates.items()]
    print_table([title, unit, f"ratio to {first}"], rows)
    print_line(f"peak memory {peak_memory_bytes() / 1e9:.2f} GB")


class Usage(NamedTuple):
    """What a command used.

    Args:
        seconds: wall-clock time, imports included.
        cpu_s: CPU time of all threads.
        peak_gb: largest resident memory.
        memory_gb: largest anonymous and shared memory.
        mapped_gb: largest resident pages of mapped files, which the system may drop.
    """

    seconds: float
    cpu_s: float
    peak_gb: float
    memory_gb: float
    mapped_gb: float


_POLL_S = 0.02


def run_command(words: Sequence[str], *, folder: Path) -> Usage:
    """Run `python -m` with words in a separate process, and read its memory from `/proc` 50 times per second."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    peaks = {"VmHWM": 0, "memory": 0, "RssFile": 0}
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        command = [sys.executable, "-m", *words]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)

        code = None
        while code is None:
            sizes = _sizes(process.pid)
            for name, size in sizes.items():
                peaks[name] = max(peaks[name], size)
            time.sleep(_POLL_S)
            pid, status, resources = os.wait4(process.pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
        seconds = time.perf_counter() - started
        process.returncode = code

        out.seek(0)
        if code:
            raise RuntimeError(f"{' '.join(words)}: exit code {code}: {out.read()}")
    peak, memory, mapped = (size / 1e9 for size in peaks.values())
    return Usage(seconds, resources.ru_utime + resources.ru_stime, peak, memory, mapped)


def _sizes(pid: int) -> dict[str, int]:
    """Return bytes of a process: its peak, its anonymous and shared memory, and its mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("Rss", "VmHWM")))
    sizes = {name.rstrip(":"): 1024 * int(size) for name, size, _ in fields}
    memory = sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
    return {"VmHWM": sizes.get("VmHWM", 0), "memory": memory, "RssFile": sizes.get("RssFile", 0)}


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call in a fresh process on all cores, and return the result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()
