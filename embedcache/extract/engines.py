"""What runs a job: this machine, or a Ray cluster.

This machine: one process a device. With one device it is this process itself.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from embedcache.errors import EmbedcacheError, UnfinishedError
from embedcache.extract.job import Done, Job, merge_done
from embedcache.extract.worker import Worker
from embedcache.files import is_remote, open_path
from embedcache.processes import num_cores
from embedcache.progress import Progress
from embedcache.registry import Registry
from embedcache.sources.base import Source

ENGINES = Registry(
    "engine",
    {"local": "embedcache.extract.engines:run", "ray": "embedcache.extract.ray_engine:run"},
)


class Engine(Protocol):
    """Runs a job to its end."""

    def __call__(self, job: Job, source: Source, progress: Progress) -> list[Done]:
        """Encode all that is missing; give what was done, an entry a target.

        Args:
            job: what to extract.
            source: the job's source, open in this process.
            progress: told about items.
        """
        ...


_SECONDS_BETWEEN_WORDS = 0.2


def run(job: Job, source: Source, progress: Progress) -> list[Done]:
    """Encode all that is missing, on all the job's devices.

    Several processes take chunks as they go; what one that was killed leaves undone, the others finish. Behind a URL,
    where nothing can be claimed, each has a share of the chunks instead.

    Raises:
        UnfinishedError: all processes were killed, or one that had a share of its own.
        EmbedcacheError: what went wrong in one of them; the others are stopped.
    """
    devices = job.settings.devices or all_devices()
    if len(devices) == 1:
        return Worker(job, source=source, device=devices[0]).run(progress)
    return _run_many(job, devices, progress)


def all_devices() -> tuple[str, ...]:
    """List the CUDA devices of this machine, or the CPU where there is none."""
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) or ("cpu",)


def _run_many(job: Job, devices: Sequence[str], progress: Progress) -> list[Done]:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes: dict[Connection, Any] = {}
    has_shares = is_remote(open_path(job.cache))
    for number, device in enumerate(devices):
        ours, theirs = context.Pipe(duplex=False)
        share = job.share(number, len(devices)) if has_shares else job
        num_threads = max(1, num_cores() // len(devices))
        process = context.Process(target=_work, args=(share, device, num_threads, theirs), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process
    try:
        finished, num_lost = _listen(list(processes), progress)
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    if num_lost and (has_shares or not finished):
        raise UnfinishedError(
            f"{num_lost} of {len(devices)} processes died; what is committed is kept: run the same command again"
        )
    if num_lost:
        progress.note(f"{num_lost} of {len(devices)} processes died; the others did their work")
    return merge_done(finished)


def _listen(pipes: list[Connection], progress: Progress) -> tuple[list[list[Done]], int]:
    """Pass on what the processes say until each has ended; give what was done, and how many just died."""
    finished: list[list[Done]] = []
    told, lost = _Told(progress), 0
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, *content = pipe.recv()
            except EOFError:
                pipes.remove(pipe)
                lost += 1
                continue
            if kind == "error":
                raise content[0]
            if kind == "bug":
                raise RuntimeError(f"a process of the extraction failed:\n{content[0]}")
            if kind == "done":
                pipes.remove(pipe)
                finished.append(content[0])
            else:
                told.tell(kind, *content)
    progress.finish()
    return finished, lost


class _Told:
    """One progress of what several processes tell: the first to start a piece of work starts it for all."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._begun: list[str] = []

    def tell(self, kind: str, what: str, *content: Any) -> None:
        if kind == "note":
            self._progress.note(what)
        elif kind == "start" and what not in self._begun:
            self._begun.append(what)
            self._progress.start(what, *content)
        elif kind == "advance" and what == self._begun[-1]:
            self._progress.advance(*content)


def _work(job: Job, device: str, num_threads: int, pipe: Connection) -> None:
    """Be one of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started us ends us
    import torch

    if device == "cpu":
        torch.set_num_threads(num_threads)
    settings = replace(job.settings, threads=job.settings.threads or num_threads)
    job = replace(job, settings=settings)
    try:
        pipe.send(("done", Worker(job, device=device).run(_PipedProgress(pipe))))
    except EmbedcacheError as error:
        pipe.send(("error", error))
    except BrokenPipeError:  # the process that started us was killed
        os._exit(1)
    except Exception:  # noqa: BLE001 - it is raised by the process that started us
        pipe.send(("bug", traceback.format_exc()))


class _PipedProgress:
    """Tells the process that started us, a few times a second."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._what = ""
        self._count = 0
        self._last = 0.0

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin a piece of work."""
        self._what = what
        self._pipe.send(("start", what, total, unit))

    def advance(self, count: int) -> None:
        """Say that `count` more units are done."""
        self._count += count
        if time.monotonic() - self._last > _SECONDS_BETWEEN_WORDS:
            self.finish()

    def finish(self) -> None:
        """Say what was not said yet; others may still be at it."""
        self._pipe.send(("advance", self._what, self._count))
        self._count, self._last = 0, time.monotonic()

    def note(self, line: str) -> None:
        """Say a line."""
        self._pipe.send(("note", line))
