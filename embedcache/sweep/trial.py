"""One trial of a study: a training run on open data, reported to the study epoch by epoch."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import optuna
import torch

from embedcache.errors import DiskFullError, EmbedcacheError
from embedcache.sweep.space import Space, Value
from embedcache.sweep.study import split_path, trial_path
from embedcache.sweep.trials import Outcome, Trials, remove_trial
from embedcache.train.data import TrainData
from embedcache.train.settings import TrainSettings
from embedcache.train.train import TrainReport, train_on
from embedcache.train.trainer import OnEpoch


def settings_in(path: Path, space: Space, params: Mapping[str, Value]) -> TrainSettings:
    """Make the settings of a run of a study, which takes the study's split.

    Raises:
        SettingError: they contradict each other.
    """
    settings = space.settings(params)
    return replace(settings, split=replace(settings.split, kind=str(split_path(path.resolve()))))


def try_to_train(
    data: TrainData, run_path: Path, settings: TrainSettings, *, on_epoch: OnEpoch | None = None
) -> TrainReport | str:
    """Train, or say why these settings cannot be trained: they contradict each other, or want too much memory.

    Raises:
        DiskFullError: which is no fault of the settings.
    """
    try:
        return train_on(data, run_path, settings, on_epoch=on_epoch)
    except DiskFullError:
        raise
    except (EmbedcacheError, MemoryError, torch.OutOfMemoryError) as error:
        return str(error) or "not enough memory"


def run_trial(path: Path, data: TrainData, space: Space, trials: Trials, trial: optuna.Trial) -> str:
    """Train what a trial tries, and tell the study.

    Its score is the best validation recall, the mean of R@1, R@5 and R@10 of both directions, as training keeps it.

    Args:
        path: the study's folder.
        data: to train on.
        space: that the trial was drawn from.
        trials: of the study.
        trial: taken from them.

    Returns:
        What came of it, in some words.

    Raises:
        DiskFullError: which is no fault of the trial.
    """
    reports = _Reports(trial, are_told=trials.are_pruned)
    started = time.perf_counter()
    remove_trial(path, trial.number)  # of a storage that is no more
    try:
        report = _train(path, data, space, trial, reports)
    except optuna.TrialPruned:
        trials.prune(trial)
        return f"pruned after epoch {reports.epoch}"
    if isinstance(report, str):
        trials.fail(trial, report)
        return f"failed: {report}"
    score = fmean(report.recalls.values())
    trials.complete(trial, score, _outcome(report, reports.epoch, time.perf_counter() - started))
    return f"score {score:.4f}"


def _train(path: Path, data: TrainData, space: Space, trial: optuna.Trial, on_epoch: OnEpoch) -> TrainReport | str:
    try:
        settings = settings_in(path, space, trial.params)
    except EmbedcacheError as error:
        return str(error)
    return try_to_train(data, trial_path(path, trial.number), settings, on_epoch=on_epoch)


class _Reports:
    """Counts epochs. Where trials are pruned, it tells the study each validation after the start, and hears the answer.

    Elsewhere it does not: a commit to SQLite takes 10 ms, as long as an epoch of a small cache.
    """

    def __init__(self, trial: optuna.Trial, *, are_told: bool) -> None:
        self._trial, self._are_told = trial, are_told
        self.epoch = 0

    def __call__(self, epoch: int, recalls: Mapping[str, float]) -> None:
        self.epoch = epoch
        if not (self._are_told and epoch):
            return
        self._trial.report(fmean(recalls.values()), epoch)
        if self._trial.should_prune():
            raise optuna.TrialPruned


def _outcome(report: TrainReport, num_epochs: int, seconds: float) -> Outcome:
    return Outcome(
        recalls=report.recalls,
        best_epoch=report.best_epoch,
        num_parameters=report.num_parameters,
        flops_a_pair=report.flops_per_pair,
        num_pairs=num_epochs * report.num_samples["train"],
        seconds=round(seconds, 3),
    )
