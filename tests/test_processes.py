"""Worker processes: results, errors, deaths and their common progress; and the number of cores."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context
from pathlib import Path
from threading import Event

import pytest

from embedcache.errors import SettingError
from embedcache.processes import (
    _collect,
    _PipeProgress,
    cgroup_cores,
    check_cancelled,
    prefetch_map,
    run_processes,
)
from embedcache.progress import NullProgress, Progress
from tests.recorded import RecordedProgress


def work(task: str, progress: Progress) -> str:
    """Do what the task names, in a worker process."""
    if task == "die":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGBUS)  # as a disk that fails below a mapped file
    if task == "error":
        raise SettingError("a mistake of the user")
    if task == "bug":
        raise ZeroDivisionError("a bug")
    progress.start("counting", 3, "things")
    progress.advance(3)
    progress.finish()
    progress.note("counted")
    return task.upper()


@pytest.mark.slow
def test_dead_process_leaves_others_running(capfd: pytest.CaptureFixture[str]) -> None:
    progress = RecordedProgress()
    assert run_processes(work, ["count", "die"], progress, is_shared=True) == (["COUNT"], 1)
    assert progress.started == [("counting", 3, "things")]
    assert progress.counts == {"counting": 3}
    assert progress.notes == ["counted"]
    printed = capfd.readouterr().err
    assert "Fatal Python error: Bus error" in printed
    assert "in work" in printed


def stay(fifo: str, _: Progress) -> None:
    """Say so, and work for a minute without a word."""
    with Path(fifo).open("w") as file:
        print("here", file=file, flush=True)
        time.sleep(60)


def run_stay(fifo: str) -> None:
    run_processes(stay, [fifo], NullProgress())


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    parent = get_context("spawn").Process(target=run_stay, args=(str(tmp_path / "fifo"),))
    parent.start()
    with (tmp_path / "fifo").open() as file:
        assert file.readline() == "here\n"
        parent.kill()
        killed = time.monotonic()
        assert file.read() == "", "until the worker process has ended"
    assert time.monotonic() - killed < 30
    parent.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ("error", SettingError, "a mistake of the user"),
        ("bug", RuntimeError, r"(?s)in work\n.*ZeroDivisionError: a bug"),
    ],
)
def test_error_is_raised_as_it_was(task: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_processes(work, [task], RecordedProgress())


def test_processes_with_steps_of_their_own_are_parts() -> None:
    shown = RecordedProgress()
    pipes = [Pipe(duplex=False) for _ in range(2)]
    for (_, sender), name in zip(pipes, ("sound", "lips"), strict=True):
        progress = _PipeProgress(sender.send)
        step = progress.part(name)
        step.start("training", 3, "utterances")
        step.describe(f"loss of {name}")
        step.advance(1)
        step.advance(2)
        step.finish()
        progress.note(f"{name}: done")
        sender.send(("result", name))
    receivers = [receiver for receiver, _ in pipes]
    assert _collect({receiver: shown.part() for receiver in receivers}) == (["sound", "lips"], 0)
    assert [part.started for part in shown.parts] == [
        [("sound: training", 3, "utterances")],
        [("lips: training", 3, "utterances")],
    ]
    assert [part.counts for part in shown.parts] == [{"sound: training": 3}, {"lips: training": 3}]
    assert [part.states for part in shown.parts] == [
        {"sound: training": "loss of sound"},
        {"lips: training": "loss of lips"},
    ]
    assert [part.notes for part in shown.parts] == [["sound: done"], ["lips: done"]]


def test_results_of_threads_are_in_order() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(6):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as executor:
        found = prefetch_map(executor, lambda number: number**2, items(), window=3)
        assert next(found) == 0
        assert taken == [0, 1, 2]
        assert list(found) == [1, 4, 9, 16, 25]


def test_calls_end_when_their_results_are_not_needed() -> None:
    begun, closed, finished = Event(), Event(), list[int]()

    def work(number: int) -> int:
        if number:
            begun.set()
            assert closed.wait(10)
        check_cancelled()
        finished.append(number)
        return number

    with ThreadPoolExecutor(2) as executor:
        found = prefetch_map(executor, work, range(9), window=2)
        assert next(found) == 0
        assert begun.wait(10)
        found.close()
        closed.set()
    assert finished == [0]
    check_cancelled()  # outside of a call it does nothing


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 2),
    ],
)
def test_cpu_quota_of_a_container(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cgroup_cores(tmp_path) == cores
