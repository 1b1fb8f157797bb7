"""Where code runs: cores, threads, worker processes, Ray, and the devices of models. Torch is imported when used."""

import logging
import math
import multiprocessing
import os
import signal
import sys
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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from embedcache.errors import EmbedcacheError, SettingError, show_faults
from embedcache.progress import NullProgress, Progress, join_names
from embedcache.registry import Trust, adopt_trust, current_trust, require
from embedcache.settings import setting

if TYPE_CHECKING:
    import torch

    from embedcache.arrays import Floats, Products

T = TypeVar("T")
R = TypeVar("R")

_CGROUP = Path("/sys/fs/cgroup")
_SECONDS_BETWEEN_REPORTS = 0.2
_IS_CLOSED: ContextVar[threading.Event | None] = ContextVar("is_closed", default=None)
SMALL_FLOPS = 2e10
"""Floating-point operations of a step below which threads mostly wait for each other.

A step is one of training, or a product of a factorization. On two busy cores, two threads took 5 times as long as one.
"""
AUTO = "auto"
DEVICE_HELP = "Torch device, such as cpu, cuda or cuda:1; auto is the first of cuda, mps and cpu that this machine has."
Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""Precision of matrix products."""

_log = logging.getLogger(__name__)


@cache
def num_cores() -> int:
    """Return the number of cores this process may use: its CPU affinity, limited by a container's CPU quota.

    Example:
        >>> num_cores() >= 1
        True
    """
    available = _available_cores()
    return max(1, min(available, cgroup_cores(_CGROUP) or available))


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_cores(root: Path) -> int | None:
    """Return the CPU quota of a container in cores, rounded up. It is None if the control group `root` has no quota."""
    # Without a quota the file contains "max". Some systems have no control groups.
    try:
        quota, period = map(int, (root / "cpu.max").read_text().split())
    except (OSError, ValueError):
        return None
    return math.ceil(quota / period)


def prefers_one_thread(flops: float) -> bool:
    """Return whether products of so many operations are too small for threads.

    It is False if the user has chosen a number of threads, by the environment variable `OMP_NUM_THREADS` or by
    `torch.set_num_threads`.
    """
    # Before torch is imported, nobody has chosen its number of threads.
    torch = sys.modules.get("torch")
    available = _available_cores()

    # By default torch uses the number of hardware threads or of cores.
    is_default = torch is None or torch.get_num_threads() in (available, available // 2)
    return flops < SMALL_FLOPS and is_default and "OMP_NUM_THREADS" not in os.environ


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """Limit the products of NumPy and SciPy to one thread if `prefers_one_thread`."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1 if prefers_one_thread(flops) else None, user_api="blas"):
        yield


def prefetch_map(
    executor: Executor, function: Callable[[T], R], items: Iterable[T], *, window: int
) -> Generator[R, None, None]:
    """Yield results in order, with up to `window` calls running or waiting to be consumed.

    Args:
        executor: threads.
        function: called for each item. It may call `check_cancelled` to end once no more results are consumed.
        items: arguments of the calls.
        window: number of calls that run or wait, which bounds memory.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(2) as executor:
        ...     list(prefetch_map(executor, len, ["a", "boat"], window=2))
        [1, 4]
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

    # The consumer may have stopped early, or a call has failed.
    finally:
        is_closed.set()
        for future in waiting:
            future.cancel()


@contextmanager
def cancelled_by(event: threading.Event) -> Iterator[None]:
    """Let `check_cancelled` end the work of this thread in this context once an event is set."""
    token = _IS_CLOSED.set(event)
    try:
        yield
    finally:
        _IS_CLOSED.reset(token)


def check_cancelled() -> None:
    """Raise a `CancelledError` if the result of this call is no longer needed; see `prefetch_map`, `cancelled_by`."""
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
        work: function of a module. The tasks and its results must be picklable.
        tasks: one per process.
        progress: shows the progress of all processes.
        is_shared: whether all processes share the items of each step, so that they are shown as one step. Otherwise
            each process has separate steps, which are shown side by side.

    Returns:
        The results in the order in which processes finished, and the number of processes that died.

    Raises:
        EmbedcacheError, OSError: raised by `work` in one of the processes. The others are terminated.
        RuntimeError: any other exception in a process, with its traceback.
    """
    # A forked process cannot use CUDA.
    context = multiprocessing.get_context("spawn")
    processes = []
    parts: dict[Connection, Progress] = {}
    current: dict[str, str] = {}
    for task in tasks:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_child, args=(work, task, sender, current_trust()), daemon=True)
        process.start()

        # The pipe ends with the process only if nobody else has the sender open.
        sender.close()
        processes.append(process)
        parts[receiver] = _SharedProgress(progress, current) if is_shared else progress.part()

    try:
        return _collect(parts)
    finally:
        progress.finish()
        for process in processes:
            process.terminate()
            process.join()


def _run_child(work: Callable[[T, Progress], R], task: T, pipe: Connection, trust: Trust) -> None:
    """Run in a worker process: send the result of its task, or the error, to the parent process."""
    show_faults()
    adopt_trust(trust)

    # Ctrl-C reaches all processes of a terminal, but the parent process terminates this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    try:
        pipe.send(("result", work(task, _PipeProgress(pipe.send))))
    except EmbedcacheError as error:
        pipe.send(("error", error))
    except BrokenPipeError:  # the parent process was killed
        os._exit(1)

    # An error of a library may not be picklable, so a plain one with the same number is sent.
    except OSError as error:
        pipe.send(("error", OSError(error.errno, error.strerror, error.filename) if error.errno else error))
    except Exception:  # noqa: BLE001 - the parent process raises it
        pipe.send(("bug", traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process as soon as its parent process has ended. A killed parent cannot terminate it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _collect(parts: Mapping[Connection, Progress]) -> tuple[list[Any], int]:
    """Show the progress of processes until all have ended. Return their results and the number of processes that died.

    A message is a kind and its content. The kind is `result`, `error` or `bug` of `_run_child`, or a method of the
    process's progress.
    """
    results = []
    num_died = 0
    pipes = list(parts)
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, *content = pipe.recv()

            # The pipe of a process that died ends without a result.
            except EOFError:
                kind = "died"
                content = []

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
    """Progress whose calls are sent to the parent process. Counts are sent a few times per second."""

    def __init__(self, send: Callable[[Any], object], name: str = "") -> None:
        self._send = send
        self._name = name
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
        self._count = 0
        self._last_s = time.monotonic()


class _SharedProgress(NullProgress):
    """Progress of one of several processes that share the items of each step. The step begun last is shown, once.

    `current` has its name and is one object for all processes. No process ends a step, as others may be in it. The
    total of a process is multiplied by `num_parts`, the number of processes that divide the items among them.
    """

    def __init__(self, progress: Progress, current: dict[str, str], num_parts: int = 1) -> None:
        self._progress = progress
        self._current = current
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
    """Connect to a Ray cluster, or start one without an address. A connection that existed before stays open."""
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield ray
        return

    # These apply to a cluster that is started here. Ray's default niceness is 15.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
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
    """Run `work(task, progress)` as one Ray task each. Ray repeats the tasks of a lost machine.

    Args:
        ray: the module, as `connected` yields it.
        work: function of a module, which may be called twice for one task.
        tasks: equal parts of the same steps.
        progress: shows the progress of all tasks as one.
        num_gpus: number of GPUs that each task needs.

    Returns:
        The results in the order in which tasks finished.

    Raises:
        EmbedcacheError: raised by `work` in one of the tasks. The others are cancelled.
    """
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Progress arrives in a queue on this machine, so that losing another machine does not lose it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=-1, scheduling_strategy="SPREAD")(_run_ray_task)
    current: dict[str, str] = {}
    running = []
    parts = []
    for number, task in enumerate(tasks):
        running.append(remote.remote(work, task, number, mailbox, current_trust(), os.nice(0)))
        parts.append(_SharedProgress(progress, current, len(tasks)))

    results: list[R] = []
    try:
        while running:
            finished, running = ray.wait(running, timeout=_SECONDS_BETWEEN_REPORTS)
            results += map(ray.get, finished)
            for number, (method, *arguments) in mailbox.get_nowait_batch(mailbox.qsize()):
                getattr(parts[number], method)(*arguments)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EmbedcacheError):
            raise error.cause from None
        raise
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        mailbox.shutdown(force=True)
        progress.finish()
    return results


def _run_ray_task(
    work: Callable[[T, Progress], R], task: T, number: int, mailbox: Any, trust: Trust, niceness: int
) -> R:
    adopt_trust(trust)

    # One task warns for all of them.
    if number == 0 and os.nice(0) > niceness:
        line = (
            f"WARNING: Ray's workers run at nice {os.nice(0)} and wait for all other processes of their machine; start "
            "the cluster with RAY_worker_niceness=0 ray start …"
        )
        mailbox.put((number, ("note", line)))
    return work(task, _PipeProgress(lambda message: mailbox.put((number, message))))


def device_setting() -> Any:
    """Return the field `device` of a settings class. It changes no result."""
    return setting(AUTO, DEVICE_HELP, metavar="DEVICE", affects_result=False)


def engine_setting(**options: Any) -> Any:
    """Return the field `engine` of a settings class. It changes no result. Options are the same as in `setting`."""
    return setting(
        "local", "Run on this machine, or on the machines of a Ray cluster.", affects_result=False, **options
    )


def address_setting(**options: Any) -> Any:
    """Return the field `address` of a settings class with an engine. Options are the same as in `setting`."""
    return setting(
        None,
        "Address of a Ray cluster.",
        affects_result=False,
        default_text="start one on this machine",
        metavar="URL",
        **options,
    )


def torch_device(name: str = AUTO, *, needs_float64: bool = False) -> "torch.device":
    """Return a torch device that exists on this machine.

    Args:
        name: `auto`, the first of `cuda`, `mps` and `cpu` that exists, or torch's name of a device.
        needs_float64: whether `auto` leaves out `mps`, which computes in float32 at most.

    Raises:
        SettingError: the device does not exist.

    Example:
        >>> torch_device("cpu")
        device(type='cpu')
    """
    import torch

    if not isinstance(name, str | int | torch.device):
        raise SettingError(f"device: expected the name of a device, such as {AUTO} or cpu, got {name!r}")
    if name == AUTO:
        kinds = _available()
        if needs_float64 and kinds[0] == "mps":
            kinds.remove("mps")
        name = kinds[0]

    # Some devices fail only when they are used.
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).partition("\n")[0]
        reason = "torch knows no such device" if first_line.startswith("Expected one of") else first_line
        devices = [AUTO, *reversed(_available()), *_gpus()]
        raise SettingError(
            f"device {name!r} is not available ({reason}); expected one of: {', '.join(devices)}"
        ) from error
    return device


def all_devices() -> tuple[str, ...]:
    """Return the GPUs of this machine, or its fastest device if there are none."""
    return _gpus() or (_available()[0],)


def _gpus() -> tuple[str, ...]:
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def autocast(device_type: str, precision: str) -> "torch.autocast":
    """Return a context in which matrix products have a precision. float32 and `auto` change nothing."""
    import torch

    is_lower = precision in ("float16", "bfloat16")
    return torch.autocast(device_type, dtype=getattr(torch, precision) if is_lower else None, enabled=is_lower)


def products_on(device: str) -> "Products":
    """Return a function that computes the dot products of rows with rows on a device, in float32."""
    from embedcache.arrays import dot_products

    # Torch takes seconds to import, and the CPU's products do not need it.
    target = "cpu" if device == "cpu" else torch_device(device)
    announce_device(target)
    if str(target) == "cpu":
        return dot_products

    import numpy as np
    import torch

    def to_device(rows: "Floats") -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(target)

    def products(left_QP: "Floats", right_CP: "Floats") -> "Floats":
        products_QC: Floats = (to_device(left_QP) @ to_device(right_CP).T).cpu().numpy()
        return products_QC

    return products


def _available() -> list[str]:
    """Return the kinds of devices that this machine has, the fastest first."""
    import torch

    kinds = ["cpu"]
    if torch.backends.mps.is_available():
        kinds.insert(0, "mps")
    if torch.cuda.is_available():
        kinds.insert(0, "cuda")
    return kinds


def announce_device(device: "torch.device | str") -> None:
    """Log once that this process computes on a device."""
    name = ""
    if str(device).startswith("cuda"):
        import torch

        name = f" ({torch.cuda.get_device_name(device)})"
    announce(f"device: {device}{name}")


@cache
def announce(line: str) -> None:
    """Log a line once in a process, such as the device it uses. The command line prints it once per command."""
    _log.info("%s", line)
