"""Processes that are killed, train or encode together, forked from one server that has imported everything already."""

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from torch.distributed import TCPStore

import tests.flushes  # noqa: F401 - in forked processes, too
from embedcache.cli.main import root_command
from embedcache.provenance import owners_of_modules

T = TypeVar("T")

replace = Path.replace
root_command()  # this and the next line are cached for all forked processes: each would take 0.05 and 0.3 s
owners_of_modules(tuple(sys.path))
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("tests.crash", "tests.toy", "torch", "torch._dynamo", "zarr", "pandas", "PIL.PngImagePlugin"),
        *("pydantic.type_adapter", "scipy.sparse.csgraph", "torch.utils.flop_counter"),
        *("embedcache.extract.extract", "embedcache.extract.repair", "embedcache.sources.folder"),
        *("embedcache.search.index", "embedcache.train.train", "faiss"),
    ]
)


def start(arguments: Sequence[str], *, output: Path | None = None) -> BaseProcess:
    """Start a command in a process of its own, with its standard output in a file."""
    process = _CONTEXT.Process(target=_run, args=(list(arguments), output))
    process.start()
    return process


def start_call(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a function of a module in a process of its own."""
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def pause(process: BaseProcess) -> None:
    """Stop a process that was started, until it is killed or gets a SIGCONT; return once it does nothing more."""
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        assert process.is_alive()


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of a module in a process of its own."""
    process = start_call(function, *arguments)
    process.join()
    assert process.exitcode == 0


def call_elsewhere(function: Callable[..., T], *arguments: Any, environment: Mapping[str, str]) -> T:
    """Call a function of a module in a process of its own, with this environment alone, and return what it returns."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = start_call(_send_result, sender, dict(environment), function, arguments)
    sender.close()
    with receiver:
        result: T = receiver.recv()
    process.join()
    assert process.exitcode == 0
    return result


def call_together(num_processes: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of a module in several processes that find each other, as those that torchrun starts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(num_processes)}
    names["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the first process does not open a store of its own
    ranks = [{**names, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    processes = [_CONTEXT.Process(target=_call_as, args=(rank, function, arguments)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num_processes


@contextmanager
def forked_workers() -> Iterator[None]:
    """Fork the worker processes that embedcache would spawn, with this environment: each would import for seconds."""
    fork = _CONTEXT.Process

    def process(*, target: Callable[..., Any], args: Sequence[Any], daemon: bool) -> BaseProcess:
        return fork(target=_call_as, args=(dict(os.environ), target, args), daemon=daemon)

    with (
        mock.patch("multiprocessing.get_context", return_value=_CONTEXT),
        mock.patch.object(_CONTEXT, "Process", process),
    ):
        yield


def running_processes() -> list[int]:
    """Return the ids of the forked processes that run, in the order in which they were started."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    children = map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
    return [child for child in children if Path(f"/proc/{child}/cmdline").read_bytes()]  # that of a dead one is empty


def crash_function(
    function: Callable[..., Any], arguments: Sequence[Any], moment: str, pattern: str, number: int = 1
) -> None:
    """Call a function of a module that is killed with SIGKILL `before` or `after` a file that matches takes its place.

    Every file of a cache takes its place by a rename; the pattern is matched with the end of its path. With a
    `number` above 1, earlier matches are passed over.
    """
    process = _CONTEXT.Process(target=_call_and_die, args=(function, arguments, moment, pattern, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def stopped_at_renames(arguments: Sequence[str]) -> Iterator[Path | None]:
    """Run a command in a process that is stopped before and after each rename: its files are as SIGKILL leaves them.

    Iterates over the path that is renamed next, and None after its rename; the process ends with the iteration.
    """
    connection, other = _CONTEXT.Pipe()
    process = start_call(_run_and_report, other, list(arguments))
    other.close()
    with connection, suppress(EOFError):
        while True:
            path: Path | None = connection.recv()
            pause(process)  # all of its threads
            yield path
            assert process.pid
            os.kill(process.pid, signal.SIGCONT)
            connection.send(None)
    process.join()
    assert process.exitcode == 0


def _run_and_report(connection: Connection, arguments: list[str]) -> None:
    methods = {name: getattr(Path, name) for name in ("replace", "rename")}

    def report(path: Path | None) -> None:
        connection.send(path)
        connection.recv()

    def watched(name: str) -> Callable[[Path, Path], Path]:
        def move(self: Path, target: Path) -> Path:
            report(self)
            path: Path = methods[name](self, target)
            report(None)
            return path

        return move

    with mock.patch.multiple(Path, **{name: watched(name) for name in methods}):
        _run(arguments, None)


def _send_result(
    sender: Connection, environment: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sender.send(function(*arguments))


def _call_as(environment: Mapping[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ.update(environment)
    function(*arguments)


def _run(arguments: list[str], output: Path | None) -> None:
    with (output or Path(os.devnull)).open("w") as sys.stdout, Path(os.devnull).open("w") as sys.stderr:
        root_command()(arguments, standalone_mode=False)


def _call_and_die(
    function: Callable[..., Any], arguments: Sequence[Any], moment: str, pattern: str, number: int
) -> None:
    _crash_at(moment, pattern, number)
    function(*arguments)


def _crash_at(moment: str, pattern: str, number: int) -> None:
    """Kill this process at the rename of the file that matches for the given time, counted from 1."""
    left = [number]

    def replace_or_die(self: Path, target: Path) -> Path:
        if re.search(pattern + "$", str(target)):
            left[0] -= 1
        if left[0] == 0 and moment == "after":
            replace(self, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign, assignment]
