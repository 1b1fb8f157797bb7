"""Cores, threads, worker processes and Ray: all that decides where Python code runs, on this machine or a cluster."""

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from embedcache.errors import EmbedcacheError, show_faults
from embedcache.progress import NullProgress, Progress, join_names
from embedcache.registry import Trust, adopt_trust, current_trust, require

T = TypeVar("T")
R = TypeVar("R")

_CGROUP = Path("/sys/fs/cgroup")
_SECONDS_BETWEEN_REPORTS = 0.2
_IS_CLOSED: ContextVar[threading.Event | None] = ContextVar("is_closed", default=None)


@cache
def num_cores() -> int:
    """Return the number of cores this process may use: its CPU affinity, limited by a container's CPU quota."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, cgroup_cores(_CGROUP) or available))


def cgroup_cores(root: Path) -> int | None:
    """Return the CPU quota of a container in cores, rounded up; None if there is none in the control group `root`."""
    try:
        quota, period = map(int, (root / "cpu.max").read_text().split())
    except (OSError, ValueError):  # there are no control groups, or the quota is "max"
        return None
    return math.ceil(quota / period)


def prefetch_map(
    executor: Executor, function: Callable[[T], R], items: Iterable[T], *, window: int
) -> Generator[R, None, None]:
    """Yield results in order, with up to `window` calls running or waiting to be consumed.

    Args:
        executor: threads.
        function: called for each item; where it calls `check_cancelled`, it ends once no more results are consumed.
    """
    waiting: deque[Future[R]] = deque()
    is_closed = threading.Event()

    def call(item: T) -> R:
        with cancelled_by(is_closed):
            return function(item)

    try:
        for item in items:
            waiting.append(executor.submit(call, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        is_closed.set()
        for future in waiting:
            future.cancel()


@contextmanager
def cancelled_by(event: threading.Event) -> Iterator[None]:
    """Let `check_cancelled` end what this thread does in this context, once an event is set."""
    token = _IS_CLOSED.set(event)
    try:
        yield
    finally:
        _IS_CLOSED.reset(token)


def check_cancelled() -> None:
    """Raise a `CancelledError` where a result is no longer needed: of `prefetch_map`, or within `cancelled_by`."""
    is_closed = _IS_CLOSED.get()
    if is_closed is not None and is_closed.is_set():
        raise CancelledError


def run_processes(
    work: Callable[[T, Progress], R],
    tasks: Sequence[T],
    progress: Progress,
    *,
    is_shared: bool = False,
) -> tuple[list[R], int]:
    """Run `work(task, progress)` in one spawned process per task until all of them have ended.

    A process that dies, such as one killed because memory ran out, does not stop the others.

    Args:
        work: function of a module; the tasks and its results must be picklable.
        tasks: one per process.
        progress: shows the progress of all processes.
        is_shared: whether all processes share the items of each step, which are shown as one; else each process has
            steps of its own, which are shown side by side.

    Returns:
        The results in the order in which processes finished, and the number of processes that died.

    Raises:
        EmbedcacheError, OSError: raised by `work` in one of the processes; the others are terminated.
        RuntimeError: any other exception in a process, with its traceback.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes: dict[Connection, Any] = {}
    for task in tasks:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_child, args=(work, task, sender, current_trust()), daemon=True)
        process.start()
        sender.close()
        processes[receiver] = process
    current: dict[str, str] = {}
    parts = {pipe: _SharedProgress(progress, current) if is_shared else progress.part() for pipe in processes}
    try:
        return _collect(parts)
    finally:
        progress.finish()
        for process in processes.values():
            process.terminate()
            process.join()


def _run_child(work: Callable[[T, Progress], R], task: T, pipe: Connection, trust: Trust) -> None:
    """Run in a worker process: send the result of its task, or the error, to the parent process."""
    show_faults()
    adopt_trust(trust)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process terminates this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(("result", work(task, _PipeProgress(pipe.send))))
    except EmbedcacheError as error:
        pipe.send(("error", error))
    except BrokenPipeError:  # the parent process was killed
        os._exit(1)
    except OSError as error:
        pipe.send(("error", OSError(error.errno, error.strerror, error.filename) if error.errno else error))
    except Exception:  # noqa: BLE001 - the parent process raises it
        pipe.send(("bug", traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process as soon as its parent process has ended, which cannot terminate it when it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _collect(parts: Mapping[Connection, Progress]) -> tuple[list[Any], int]:
    """Show the progress of processes until all have ended; return their results, and the number of those that died.

    A message is a kind and its content: `result`, `error` or `bug` of `_run_child`, else a method of the process's
    progress.
    """
    results = []
    num_died = 0
    pipes = list(parts)
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, *content = pipe.recv()
            except EOFError:
                kind, content = "died", []
            if kind == "error":
                raise content[0]
            if kind == "bug":
                raise RuntimeError(f"a worker process failed:\n{content[0]}")
            if kind in ("result", "died"):
                pipes.remove(pipe)
                parts[pipe].finish()
                results += content
                num_died += kind == "died"
            else:
                getattr(parts[pipe], kind)(*content)
    return results, num_died


class _PipeProgress:
    """Progress whose calls are sent to the parent process, counts a few times per second."""

    def __init__(self, send: Callable[[Any], object], name: str = "") -> None:
        self._send, self._name = send, name
        self._state = ""
        self._count = 0
        self._last_s = 0.0

    def start(self, what: str, total: int, unit: str) -> None:
        self._state = ""
        self._send(("start", join_names(self._name, what), total, unit))

    def advance(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._last_s > _SECONDS_BETWEEN_REPORTS:
            self._report()

    def describe(self, state: str) -> None:
        self._state = state

    def finish(self) -> None:
        self._report()
        self._send(("finish",))

    def note(self, line: str) -> None:
        self._send(("note", line))

    def part(self, name: str = "") -> "_PipeProgress":
        return _PipeProgress(self._send, join_names(self._name, name))

    def _report(self) -> None:
        self._send(("describe", self._state))
        self._send(("advance", self._count))
        self._count, self._last_s = 0, time.monotonic()


class _SharedProgress(NullProgress):
    """Progress of one of several processes that share the items of each step: the step begun last is shown, once.

    `current` has its name, and is the same object for all processes. No process ends a step, as others may be in it.
    The total of a process is multiplied by `num_parts`, the number of processes with items of their own.
    """

    def __init__(self, progress: Progress, current: dict[str, str], num_parts: int = 1) -> None:
        self._progress, self._current = progress, current
        self._num_parts = num_parts
        self._step = ""

    def start(self, what: str, total: int, unit: str) -> None:
        self._step = what
        if self._current.get("step") != what:
            self._current["step"] = what
            self._progress.start(what, total * self._num_parts, unit)

    def advance(self, count: int) -> None:
        if self._step == self._current.get("step"):
            self._progress.advance(count)

    def describe(self, state: str) -> None:
        if self._step == self._current.get("step"):
            self._progress.describe(state)

    def note(self, line: str) -> None:
        self._progress.note(line)


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one without an address; a connection that existed before stays open."""
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    except ConnectionError as error:
        raise EmbedcacheError(f"no Ray cluster at {address}: {error}; start one with: ray start --head") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_ray_tasks(
    ray: Any,
    work: Callable[[T, Progress], R],
    tasks: Sequence[T],
    progress: Progress,
    *,
    num_gpus: int,
) -> list[R]:
    """Run `work(task, progress)` as one Ray task each; Ray repeats those of a machine that was lost.

    Args:
        ray: the module, as of `connected`.
        work: function of a module, which may be called twice for one task.
        tasks: equal parts of the same steps.
        progress: shows the progress of all tasks as one.
        num_gpus: number of GPUs that each task needs.

    Returns:
        The results in the order in which tasks finished.

    Raises:
        EmbedcacheError: raised by `work` in one of the tasks; the others are cancelled.
    """
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=-1, scheduling_strategy="SPREAD")(_run_ray_task)
    running = [remote.remote(work, task, number, mailbox, current_trust()) for number, task in enumerate(tasks)]
    current: dict[str, str] = {}
    parts = [_SharedProgress(progress, current, len(tasks)) for _ in tasks]
    results = []
    try:
        while running:
            finished, running = ray.wait(running, timeout=_SECONDS_BETWEEN_REPORTS)
            results += [ray.get(each) for each in finished]
            for number, (method, *arguments) in mailbox.get_nowait_batch(mailbox.qsize()):
                getattr(parts[number], method)(*arguments)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmbedcacheError):
            raise error.cause from None
        raise
    finally:
        for each in running:
            ray.cancel(each, force=True)
        mailbox.shutdown(force=True)
        progress.finish()
    return results


def _run_ray_task(work: Callable[[T, Progress], R], task: T, number: int, mailbox: Any, trust: Trust) -> R:
    adopt_trust(trust)
    return work(task, _PipeProgress(lambda message: mailbox.put((number, message))))
