"""Work on a study, in this process or several: run trials, then retrain the top configurations with several seeds."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from embedcache.errors import DiskFullError, EmbedcacheError, SettingError, UnfinishedError, is_out_of_memory
from embedcache.locks import Leases
from embedcache.processes import run_processes
from embedcache.progress import Progress
from embedcache.projectors.base import split_names
from embedcache.registry import mark_as_read
from embedcache.settings import replace_fields
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, Value
from embedcache.sweep.study import Study, retrained_path, split_path, trial_path
from embedcache.sweep.trials import Outcome, Trials, get_reason, get_score, rank_complete, remove_run
from embedcache.train.data import TrainData, open_data
from embedcache.train.settings import TrainSettings
from embedcache.train.train import TrainReport, train_on
from embedcache.train.trainer import OnEpoch

_AFTER_TRIALS = 2**40


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """Everything a process needs to work on a study in the folder `path`."""

    caches: tuple[str, ...]
    path: Path
    study: Study
    space: Space
    settings: SweepSettings

    def trials(self) -> Trials:
        """Open the trials of the study."""
        return Trials(self.path, self.study, self.space, self.settings)

    def mapped_data(self) -> TrainData:
        """Open the data memory-mapped, so that the processes of a machine share the pages that were read.

        Forked processes would share loaded features as well, but forking is unsafe after CUDA or OpenMP were used.
        """
        return open_data(
            self.caches,
            {modality: side["feature"] for modality, side in self.study.sides.items()},
            memory_bytes=0,
        )

    def run_settings(self, params: Mapping[str, Value]) -> TrainSettings:
        """Return the training settings of a trial's parameters, with the study's split."""
        settings = self.space.settings(params)
        mark_as_read(self.path, [*split_names(settings.model.projector), settings.loss.name])
        return replace_fields(settings, split=replace_fields(settings.split, kind=str(split_path(self.path.resolve()))))

    def retrained_runs(self, trial: FrozenTrial) -> Iterator[tuple[Path, TrainSettings]]:
        """Iterate over the runs that retrain a trial's configuration, one per seed, the trial's own seed first."""
        first = self.run_settings(trial.params)
        for seed in range(first.seed, first.seed + self.settings.seeds_per_config):
            yield retrained_path(self.path, trial.number, seed), replace_fields(first, seed=seed)


def run_workers(job: StudyJob, progress: Progress) -> None:
    """Run the trials of a study in several processes until it is finished; if one dies, another repeats its trial.

    Raises:
        UnfinishedError: all processes died.
        EmbedcacheError: raised in one of them; the others are terminated.
    """
    count = job.settings.workers
    _, num_died = run_processes(_run_worker, [job] * count, progress)
    if num_died == count:
        raise UnfinishedError(f"all {count} workers died; finished trials are stored; run the same command again")
    if num_died:
        progress.note(f"{num_died} of {count} workers died; the others ran their trials")


def _run_worker(job: StudyJob, progress: Progress) -> None:
    with closing(job.trials()) as trials:
        work(job, job.mapped_data(), trials, progress)


def work(job: StudyJob, data: TrainData, trials: Trials, progress: Progress) -> None:
    """Run trials until all are finished, then retrain the top configurations; other processes may do the same."""
    while (trial := trials.lease_next()) is not None:
        result = _run_trial(job, data, trials, trial)
        progress.note(_summary(trials, result))
    retrain(job, data, top_trials(trials, job.settings))


def top_trials(trials: Trials, settings: SweepSettings) -> list[FrozenTrial]:
    """Return the best trials, each configuration once; if no trial is complete, a `SettingError` says why."""
    top = rank_complete(trials.finished())[: settings.top_configs]
    if not top:
        failed = [trial for trial in trials.finished() if trial.state == TrialState.FAIL]
        reason = f"trial {failed[0].number} failed: {get_reason(failed[0])}" if failed else "all were pruned"
        raise SettingError(f"none of {len(trials.finished())} trials is complete; {reason}; try another space")
    return top


def retrain(job: StudyJob, data: TrainData, trials: Sequence[FrozenTrial]) -> list[list[TrainReport | str]]:
    """Retrain the configurations of some trials with several seeds each; existing runs are reused.

    Processes that do so together share the runs: each first trains those that are free, then waits for the others.

    Returns:
        For each trial one report per seed, or the reason why that seed cannot be trained.
    """
    leases = Leases(job.path)
    reports: dict[Path, TrainReport | str] = {}
    for wait in (False, True):
        for trial in trials:
            for position, (run_path, settings) in enumerate(job.retrained_runs(trial)):
                number = _AFTER_TRIALS + trial.number * 2**16 + position
                if run_path not in reports and leases.acquire(number, wait=wait):
                    reports[run_path] = _try_to_train(data, run_path, settings)
                    leases.release(number)
    return [[reports[run_path] for run_path, _ in job.retrained_runs(trial)] for trial in trials]


def _run_trial(job: StudyJob, data: TrainData, trials: Trials, trial: optuna.Trial) -> str:
    """Train one trial and record its outcome: its best mean of R@1, R@5 and R@10 of both directions is the score."""
    started, last_epoch = time.perf_counter(), 0

    def on_epoch(epoch: int, score: float) -> None:
        nonlocal last_epoch
        last_epoch = epoch
        if trials.use_pruner and epoch:  # a commit to SQLite takes 10 ms, as long as an epoch of a small cache
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

    remove_run(job.path, trial.number)  # left by a storage that was deleted
    try:
        settings = job.run_settings(trial.params)
        report = _try_to_train(data, trial_path(job.path, trial.number), settings, on_epoch=on_epoch)
    except SettingError as error:
        report = str(error)
    except optuna.TrialPruned:
        trials.prune(trial)
        return f"pruned after epoch {last_epoch}"
    if isinstance(report, str):
        trials.fail(trial, report)
        return f"failed: {report}"
    assert report.score is not None
    outcome = Outcome(
        recalls=report.measures,
        best_epoch=report.best_epoch,
        num_parameters=report.num_parameters,
        num_pairs=last_epoch * report.num_samples["train"],
        seconds=round(time.perf_counter() - started, 3),
    )
    trials.complete(trial, report.score, outcome)
    return f"validation recall {report.score:.3f}"


def _try_to_train(
    data: TrainData, run_path: Path, settings: TrainSettings, *, on_epoch: OnEpoch | None = None
) -> TrainReport | str:
    """Train, or return the reason why these settings cannot be trained, such as too little memory."""
    try:
        return train_on(data, run_path, settings, on_epoch=on_epoch)
    except DiskFullError:  # not the fault of the settings
        raise
    except (EmbedcacheError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, EmbedcacheError) or is_out_of_memory(error)):
            raise
        return str(error) or "not enough memory"


def _summary(trials: Trials, result: str) -> str:
    """Return one line such as `trial 12 of 50: validation recall 0.412 (best 0.431 in trials/00007)`."""
    finished = trials.finished()
    best = rank_complete(finished)[:1]
    record = f" (best {get_score(best[0]):.3f} in trials/{best[0].number:05d})" if best else ""
    return f"trial {len(finished)} of {trials.total}: {result}{record}"
