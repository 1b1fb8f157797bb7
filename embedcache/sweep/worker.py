"""One trial: a training run on data that is open already, told to the study epoch by epoch.

The processes that work on a study: this one, or several that it starts.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

from optuna.trial import FrozenTrial, TrialState

from embedcache.errors import EmbedcacheError, SettingError, UnfinishedError
from embedcache.progress import Progress
from embedcache.sweep.best import train_best
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space
from embedcache.sweep.study import Study
from embedcache.sweep.trial import run_trial
from embedcache.sweep.trials import Trials, complete_first, reason_of, score_of
from embedcache.train.data import TrainData, open_data

Tell: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to work on a study.

    Args:
        caches: paths or URLs.
        path: the study's folder.
        study: what it asks.
        space: that trials are drawn from.
        settings: of the search.
    """

    caches: tuple[str, ...]
    path: Path
    study: Study
    space: Space
    settings: SweepSettings

    def trials(self) -> Trials:
        """Open the study's trials."""
        return Trials(self.path, self.study, self.space, self.settings)

    def mapped_data(self) -> TrainData:
        """Open the data so that its features are mapped: processes of a machine share what it has read of a file.

        A fork of a process that has read them would share them as well, but is unsafe after CUDA or OpenMP were used.
        """
        return open_data(self.caches, image=self.study.image["feature"], text=self.study.text["feature"], memory_gb=0.0)


def work(job: Job, data: TrainData, trials: Trials, tell: Tell) -> None:
    """Take trials until all are finished, then train the best again with several seeds; others may do the same.

    Raises:
        SettingError: no trial was complete.
    """
    while (trial := trials.take()) is not None:
        came_of_it = run_trial(job.path, data, job.space, trials, trial)
        tell(_line(trials, came_of_it))
    train_best(job.path, data, job.space, best_trials(trials, job.settings), job.settings)


def best_trials(trials: Trials, settings: SweepSettings) -> list[FrozenTrial]:
    """List the best trials, each configuration once.

    Raises:
        SettingError: no trial was complete; it says why the first failed.
    """
    best = complete_first(trials.finished())[: settings.top]
    if not best:
        failed = [trial for trial in trials.finished() if trial.state == TrialState.FAIL]
        why = f"trial {failed[0].number} failed: {reason_of(failed[0])}" if failed else "all were pruned"
        raise SettingError(f"none of {len(trials.finished())} trials was complete; {why}; try another space")
    return best


def run_workers(job: Job, progress: Progress) -> None:
    """Start processes that work on a study, and wait for them. What one that dies was at, the others do.

    Raises:
        UnfinishedError: all of them died.
        EmbedcacheError: what went wrong in one of them; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes: dict[Connection, Any] = {}
    for _ in range(job.settings.num_workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_be_worker, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process
    try:
        num_died = _listen(list(processes), progress)
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    if num_died == len(processes):
        raise UnfinishedError(f"all {num_died} workers died; finished trials are kept: run the same command again")
    if num_died:
        progress.note(f"{num_died} of {len(processes)} workers died; the others did their trials")


def _listen(pipes: list[Connection], progress: Progress) -> int:
    """Pass on what the processes say until each has ended; give how many just died."""
    num_died = 0
    while pipes:
        for pipe in wait(pipes):
            assert isinstance(pipe, Connection)
            try:
                kind, content = pipe.recv()
            except EOFError:
                pipes.remove(pipe)
                num_died += 1
                continue
            if kind == "error":
                raise content
            if kind == "bug":
                raise RuntimeError(f"a worker of the sweep failed:\n{content}")
            if kind == "done":
                pipes.remove(pipe)
            else:
                progress.note(content)
    return num_died


def _be_worker(job: Job, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started us ends us
    try:
        work(job, job.mapped_data(), job.trials(), lambda line: pipe.send(("note", line)))
        pipe.send(("done", None))
    except EmbedcacheError as error:
        pipe.send(("error", error))
    except BrokenPipeError:  # the process that started us was killed
        os._exit(1)
    except Exception:  # noqa: BLE001 - it is raised by the process that started us
        pipe.send(("bug", traceback.format_exc()))


def _line(trials: Trials, came_of_it: str) -> str:
    """Say how far the study is: `trial 12 of 50: score 0.4120 (best 0.4310 in trials/00007)`."""
    finished = trials.finished()
    best = complete_first(finished)[:1]
    record = f" (best {score_of(best[0]):.4f} in trials/{best[0].number:05d})" if best else ""
    return f"trial {len(finished)} of {trials.total}: {came_of_it}{record}"
