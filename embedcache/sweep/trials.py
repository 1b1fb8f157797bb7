"""The work of a sweep: run trials, retrain the top configurations with several seeds, and collect the results."""

import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from matplotlib import pyplot, rc_context
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization.matplotlib import plot_optimization_history, plot_parallel_coordinate

from embedcache.dataset.splits import read_split
from embedcache.errors import DiskFullError, EmbedcacheError, SettingError, UnfinishedError, is_out_of_memory
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.files import Leases, is_remote
from embedcache.processes import run_processes
from embedcache.progress import Progress
from embedcache.projectors.base import split_names
from embedcache.registry import mark_as_read
from embedcache.reports.figures import svg
from embedcache.settings import replace_fields
from embedcache.sweep.report import SweepConfig, SweepReport, get_reason
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, Value
from embedcache.sweep.study import Study, Trials, rank_complete, remove_run, split_path, trial_path
from embedcache.train.data import TrainData, open_data
from embedcache.train.settings import TrainSettings, command_line
from embedcache.train.train import TrainReport, train_on
from embedcache.train.trainer import OnEpoch

_AFTER_TRIALS = 2**40
_MIN_TRIALS_FOR_IMPORTANCE = 4


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
        features = {modality: side["feature"] for modality, side in self.study.sides.items()}
        return open_data(self.caches, features, memory_bytes=0)

    def run_settings(self, params: Mapping[str, Value]) -> TrainSettings:
        """Return the training settings of a trial's parameters, with the study's split."""
        settings = self.space.settings(params)
        mark_as_read(self.path, [*split_names(settings.model.projector), settings.loss.name])
        return replace_fields(settings, split=replace_fields(settings.split, kind=str(split_path(self.path.resolve()))))

    def retrained_runs(self, trial: FrozenTrial) -> Iterator[tuple[Path, TrainSettings]]:
        """Iterate over the runs that retrain a trial's configuration, one per seed, the trial's own seed first."""
        first = self.run_settings(trial.params)
        for seed in range(first.seed, first.seed + self.settings.seeds_per_config):
            yield self.path / "best" / f"{trial.number:05d}" / f"seed-{seed}", replace_fields(first, seed=seed)


def run_workers(job: StudyJob, progress: Progress) -> None:
    """Run the trials of a study in several processes until it is finished. If one dies, another repeats its trial.

    Raises:
        UnfinishedError: all processes died.
        EmbedcacheError: raised in one of them. The others are terminated.
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
    """Run trials until all are finished, then retrain the top configurations. Other processes may do the same."""
    while (trial := trials.lease_next()) is not None:
        result = _run_trial(job, data, trials, trial)

        finished = trials.finished()
        best = rank_complete(finished)[:1]
        record = f" (best {best[0].value:.3f} in trials/{best[0].number:05d})" if best else ""
        progress.note(f"trial {len(finished)} of {trials.total}: {result}{record}")
    retrain(job, data, top_trials(trials, job.settings))


def _run_trial(job: StudyJob, data: TrainData, trials: Trials, trial: optuna.Trial) -> str:
    """Train one trial, and record its outcome. Its score is the best mean of R@1, R@5 and R@10 of both directions."""
    started = time.perf_counter()
    last_epoch = 0

    def on_epoch(epoch: int, score: float) -> None:
        nonlocal last_epoch
        last_epoch = epoch

        # Scores are stored only for a pruner: a commit to SQLite costs 10 ms, as much as an epoch of a small cache.
        if trials.use_pruner and epoch:
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

    # If the storage was deleted, its runs are still in the folder.
    remove_run(job.path, trial.number)
    try:
        settings = job.run_settings(trial.params)
        report = _try_to_train(data, trial_path(job.path, trial.number), settings, on_epoch=on_epoch)
    except SettingError as error:
        report = str(error)
    except optuna.TrialPruned:
        trials.finish(trial, TrialState.PRUNED)
        return f"pruned after epoch {last_epoch}"

    if isinstance(report, str):
        trials.finish(trial, TrialState.FAIL, reason=report)
        return f"failed: {report}"

    trials.finish(
        trial,
        TrialState.COMPLETE,
        report.score,
        recalls=report.measures,
        best_epoch=report.best_epoch,
        num_parameters=report.num_parameters,
        num_pairs=last_epoch * report.num_samples["train"],  # seen in training, repetitions included
        seconds=round(time.perf_counter() - started, 3),
    )
    return f"validation recall {report.score:.3f}"


def _try_to_train(
    data: TrainData, run_path: Path, settings: TrainSettings, *, on_epoch: OnEpoch | None = None
) -> TrainReport | str:
    """Train, or return the reason why these settings cannot be trained, such as too little memory."""
    try:
        return train_on(data, run_path, settings, on_epoch=on_epoch)
    # Other settings would not help.
    except DiskFullError:
        raise
    except (EmbedcacheError, MemoryError, RuntimeError) as error:
        if not (isinstance(error, EmbedcacheError) or is_out_of_memory(error)):
            raise
        return str(error) or "not enough memory"


def top_trials(trials: Trials, settings: SweepSettings) -> list[FrozenTrial]:
    """Return the best trials, each configuration once. Raise a `SettingError` if no trial is complete."""
    finished = trials.finished()
    top = rank_complete(finished)[: settings.top_configs]
    if not top:
        failures = [trial for trial in finished if trial.state == TrialState.FAIL]
        reason = f"trial {failures[0].number} failed: {get_reason(failures[0])}" if failures else "all were pruned"
        raise SettingError(f"none of {len(finished)} trials is complete; {reason}; try another space")
    return top


def retrain(job: StudyJob, data: TrainData, trials: Sequence[FrozenTrial]) -> list[list[TrainReport | str]]:
    """Retrain the configurations of some trials with several seeds each. Existing runs are reused.

    Processes that do so together share the runs. Each first trains the runs that no other leases, then waits for the
    rest.

    Returns:
        For each trial one report per seed, or the reason why that seed cannot be trained.
    """
    leases = Leases(job.path)
    reports: dict[Path, TrainReport | str] = {}
    for wait in (False, True):
        for trial in trials:
            for position, (run_path, settings) in enumerate(job.retrained_runs(trial)):
                # Leases of retrained runs have other numbers than leases of trials.
                number = _AFTER_TRIALS + trial.number * 2**16 + position
                if run_path not in reports and leases.acquire(number, wait=wait):
                    reports[run_path] = _try_to_train(data, run_path, settings)
                    leases.release(number)

    results = []
    for trial in trials:
        results.append([reports[run_path] for run_path, _ in job.retrained_runs(trial)])
    return results


def collect_report(job: StudyJob, data: TrainData, trials: Trials) -> SweepReport:
    """Retrain and evaluate the top configurations, and collect the results of a sweep.

    Raises:
        SettingError: no trial is complete, or every top configuration fails with another seed.
    """
    finished = trials.finished()
    best, left_out = _evaluate_top(job, data, top_trials(trials, job.settings))
    return SweepReport(
        path=job.path,
        study=job.study.to_json(),
        trials=finished,
        best=best,
        left_out=left_out,
        importance=_importance(trials),
        command=_command(job, data, best[0].params),
    )


def _evaluate_top(
    job: StudyJob, data: TrainData, top: Sequence[FrozenTrial]
) -> tuple[list[SweepConfig], dict[int, str]]:
    """Evaluate retrained configurations on the test part.

    Returns:
        The configurations, the best one on validation first, and trial number -> reason why another seed fails.
    """
    best: list[SweepConfig] = []
    left_out: dict[int, str] = {}
    split = split_path(job.path)
    caches = []
    for cache in data.caches:
        if "test" in read_split(split, [cache]).parts:
            caches.append(str(cache.path))

    for trial, results in zip(top, retrain(job, data, top), strict=True):
        reports = []
        reasons = []
        for result in results:
            if isinstance(result, TrainReport):
                reports.append(result)
            else:
                reasons.append(result)
        if reasons:
            left_out[trial.number] = reasons[0]
            continue

        attributes = trial.user_attrs
        run_paths, _ = zip(*job.retrained_runs(trial), strict=True)
        scores = [report.score for report in reports if report.score is not None]
        is_improved = any(report.best_epoch for report in reports)
        test = {}
        for path in caches:
            test[path] = evaluate_retrieval(path, run_paths)
        best.append(
            SweepConfig(
                number=trial.number,
                params=trial.params,
                score=trial.value or 0.0,
                num_parameters=attributes["num_parameters"],
                num_pairs=attributes["num_pairs"],
                scores=scores,
                run_paths=run_paths,
                test=test,
                kept_initialization=attributes["num_pairs"] > 0 and not is_improved,
            )
        )

    if not best:
        number, reason = next(iter(left_out.items()))
        raise SettingError(
            f"none of the top {len(left_out)} configurations can be trained with {job.settings.seeds_per_config} "
            f"seeds; trial {number} failed: {reason}; use a larger --top-configs or a smaller --seeds-per-config"
        )

    return sorted(best, key=lambda config: (-config.mean_score, config.number)), left_out


def _importance(trials: Trials) -> dict[str, float]:
    """Split the variance of scores by fANOVA, which ranks settings better than Optuna's default on 60 trials."""
    scores = [trial.value for trial in trials.finished() if trial.state == TrialState.COMPLETE]
    if len(scores) < _MIN_TRIALS_FOR_IMPORTANCE or len(set(scores)) == 1:
        return {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(trials.optuna, evaluator=FanovaImportanceEvaluator(seed=0))


def draw_study(study: optuna.Study) -> list[str]:
    """Draw the scores of all trials, and the settings of the complete ones, as SVG elements."""
    figures = []
    for draw in (plot_optimization_history, plot_parallel_coordinate):
        # Optuna sets a style for all later figures, and warns that its plots are experimental.
        with rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes: Any = draw(study, target_name="validation recall")
            axes.set_title("")
            axes.figure.set_size_inches(9, 4)
            figures.append(svg(axes.figure))
            pyplot.close(axes.figure)
    return figures


def _command(job: StudyJob, data: TrainData, params: Mapping[str, Value]) -> str:
    """Return the command that trains a configuration again, to the same weights."""
    # Absolute paths, so that the command runs in any folder.
    words = ["embedcache", "train"]
    for cache in data.caches:
        words.append(str(cache.path if is_remote(cache.path) else cache.path.resolve()))
    words.append(str(job.path.resolve() / "winner"))

    for modality, feature in data.features.items():
        words += ["--feature", f"{modality}={feature.name}"]
    words += command_line(job.run_settings(params))
    return shlex.join(words)
