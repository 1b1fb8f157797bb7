"""Steps of a pipeline in several processes."""

import multiprocessing
from collections.abc import Sequence
from typing import Any

import torch

from embedcache.cli.console import open_progress
from embedcache.errors import EmbedcacheError
from embedcache.processes import num_cores, run_processes
from embedcache.progress import Progress


def run_parallel(steps: Sequence[tuple[Any, ...]], *, num_processes: int | None = None) -> None:
    """Run steps in several processes, one thread each. A free process gets the next step.

    Args:
        steps: tuples of a method and its arguments. The method's object has a `folder`, whose end is shown, and the
            method also accepts `progress`.
        num_processes: number of processes (one per core if None).
    """
    progress = open_progress()
    count = min(num_processes or num_cores(), len(steps))

    # A shared counter hands out the steps.
    tasks = [(steps, multiprocessing.get_context("spawn").Value("i", 0))] * count
    if count == 1:
        _run_all(tasks[0], progress)
    elif run_processes(_run_all, tasks, progress)[1]:
        raise EmbedcacheError("a process died; finished steps are kept: rerun the same command")


def _run_all(task: tuple[Sequence[tuple[Any, ...]], Any], progress: Progress) -> None:
    steps, next_step = task
    torch.set_num_threads(1)

    while True:
        with next_step.get_lock():
            number = next_step.value
            next_step.value += 1
        if number >= len(steps):
            return

        step, *arguments = steps[number]
        words = [str(argument) for argument in arguments if isinstance(argument, str | int | float)]
        name = " ".join(["/".join(step.__self__.folder.parts[-2:]), step.__name__, *words])
        step(*arguments, progress=progress.part(name))
        progress.note(f"{name}: done")
        progress.note(f"{name}: done")
