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
    """Run steps in several processes, one thread each; a process that is free takes the next step.

    Args:
        steps: methods of objects with a `folder`, whose end is shown, and their arguments; each takes `progress` too.
        num_processes: processes at once; None: one per core.
    """
    progress, count = open_progress(), min(num_processes or num_cores(), len(steps))
    tasks = [(steps, multiprocessing.get_context("spawn").Value("i", 0))] * count
    if count == 1:
        _run_all(tasks[0], progress)
    elif run_processes(_run_all, tasks, progress)[1]:
        raise EmbedcacheError("a process died; what is finished is kept: rerun the same command")


def _run_all(task: tuple[Sequence[tuple[Any, ...]], Any], progress: Progress) -> None:
    steps, num_taken = task
    torch.set_num_threads(1)
    while True:
        with num_taken.get_lock():
            number, num_taken.value = num_taken.value, num_taken.value + 1
        if number >= len(steps):
            return
        step, *arguments = steps[number]
        shown = [str(argument) for argument in arguments if isinstance(argument, str | int | float)]
        name = " ".join(["/".join(step.__self__.folder.parts[-2:]), step.__name__, *shown])
        step(*arguments, progress=progress.part(name))
        progress.note(f"{name}: done")
