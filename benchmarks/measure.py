"""Measuring: medians of repeated calls as a table, and time and peak memory of a command in its own process.

    python -m benchmarks.measure FILE MODULE [ARGUMENTS]

runs a module as `python -m` does and writes its time and memory to a file. The process reports its own peak, because
the peak that the system reports for a child includes the memory of the process that started it.
"""

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar

from embedcache.cli.console import print_line, print_table
from embedcache.records import peak_memory_bytes

Result = TypeVar("Result")


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


def show(title: str, unit: str, rates: Sequence[tuple[str, float]]) -> None:
    """Print rates, each with its ratio to the first, which is the floor or the peer, and the peak memory so far."""
    floor = rates[0][1]
    rows = [[name, f"{rate:,.1f}", f"{rate / floor:.3f}"] for name, rate in rates]
    print_table([title, unit, f"ratio to {rates[0][0]}"], rows)
    print_line(f"peak memory {peak_memory_bytes() / 1e9:.2f} GB")


class Cost(NamedTuple):
    """Cost of a command.

    Args:
        seconds: wall-clock time, imports included.
        cpu_s: CPU time of all threads.
        peak_gb: largest resident memory.
    """

    seconds: float
    cpu_s: float
    peak_gb: float


def run_embedcache(words: Sequence[str], *, folder: Path, is_quiet: bool = True) -> Cost:
    """Run `embedcache` with arguments in a separate process."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "benchmarks.measure", file.name, "embedcache", *words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
        out = subprocess.DEVNULL if is_quiet else None
        started = time.perf_counter()
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=out, stderr=out)
        seconds = time.perf_counter() - started
        return Cost(seconds, **json.loads(Path(file.name).read_text()))


class Usage(NamedTuple):
    """What a command used.

    Args:
        seconds: wall-clock time, imports included.
        memory_gb: largest anonymous and shared memory.
        mapped_gb: largest resident pages of mapped files, which the system may drop.
        disk_bytes: size of what it wrote, if that was measured.
    """

    seconds: float
    memory_gb: float
    mapped_gb: float
    disk_bytes: int = 0
    remark: str = ""


_POLL_S = 0.02


def run_measured(words: Sequence[str], *, folder: Path) -> Usage:
    """Run `python -m` with words in a separate process, and read its memory from `/proc` 50 times per second.

    The remark is the last line of a command that failed.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", *words]
    started, memory, mapped = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        while process.poll() is None:
            anonymous_bytes, mapped_bytes = _resident_bytes(process.pid)
            memory, mapped = max(memory, anonymous_bytes), max(mapped, mapped_bytes)
            time.sleep(_POLL_S)
        seconds = time.perf_counter() - started
        out.seek(0)
        lines = out.read().rstrip().splitlines()
    remark = f"exit code {process.returncode}: {lines[-1] if lines else ''}" if process.returncode else ""
    return Usage(seconds, memory / 1e9, mapped / 1e9, remark=remark)


def _resident_bytes(pid: int) -> tuple[int, int]:
    """Return the resident anonymous and shared memory of a process, and that of its mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {
        name: 1024 * int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines if "Rss" in line)
    }
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("RssFile", 0)


def in_own_process(function: Callable, *arguments: object) -> tuple:  # type: ignore[type-arg]
    """Call in a fresh process on all cores; return the result and the GB that it added, see `added_peak_gb`."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(_measured, function, arguments).result()


def _measured(function: Callable, arguments: tuple) -> tuple:  # type: ignore[type-arg]
    import torch

    torch.manual_seed(0)
    return added_peak_gb(lambda: function(*arguments))


def added_peak_gb(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of a call, and the GB by which resident memory grew at most while it ran.

    On Linux the peak of the process is set to its present size before, or a call that needs less memory than the
    imports did at their peak would seem to need none.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory_bytes()
    result = call()
    return result, (peak_memory_bytes() - before) / 1e9


def warmed_up(call: Callable[[], object]) -> Callable[[], object]:
    """Return a function that has been called twice."""
    for _ in range(2):
        call()
    return call


def use_one_core() -> None:
    """Run this process on one thread of one core from now on, so that its CPU time is that of its work."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # threads of other libraries, too
    torch.set_num_threads(1)


def main() -> None:
    """Run the module and write the file."""
    path, module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    code: object = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    Path(path).write_text(json.dumps({"cpu_s": time.process_time(), "peak_gb": peak_memory_bytes() / 1e9}))
    sys.exit(code)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
