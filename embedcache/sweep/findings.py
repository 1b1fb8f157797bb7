"""The findings of a sweep: top configurations on the test part, the importance of settings, and the report as JSON."""

import shlex
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from embedcache.dataset.splits import read_split
from embedcache.errors import SettingError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.files import is_remote
from embedcache.reports.retrieval import retrieval_json
from embedcache.reports.sweep import State, SweepConfig, SweepFindings, SweepParameter, SweepTrial
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.sweep.study import split_path
from embedcache.sweep.trials import Trials, get_outcome, get_reason, get_score
from embedcache.sweep.worker import StudyJob, retrain, top_trials
from embedcache.train.data import TrainData
from embedcache.train.settings import command_line
from embedcache.train.train import TrainReport

_MIN_TRIALS_FOR_IMPORTANCE = 4
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def collect_findings(job: StudyJob, data: TrainData, trials: Trials) -> SweepFindings:
    """Retrain and evaluate the top configurations, and collect the results of a sweep.

    Raises:
        SettingError: no trial is complete, or every top configuration fails with another seed.
    """
    best, left_out = _evaluate_top(job, data, top_trials(trials, job.settings))
    return SweepFindings(
        features={modality: feature.name for modality, feature in data.features.items()},
        sampler=job.study.sampler,
        pruner=job.study.pruner,
        seed=job.study.seed,
        parameters=_parameters(trials.finished()),
        trials=[_trial(trial) for trial in trials.finished()],
        best=best,
        left_out=left_out,
        importance=_importance(trials),
        command=_command(job, data, best[0].number, trials),
    )


def _evaluate_top(
    job: StudyJob, data: TrainData, top: Sequence[FrozenTrial]
) -> tuple[list[SweepConfig], dict[int, str]]:
    """Evaluate retrained configurations on the test part; also return trial number -> reason why another seed fails."""
    best: list[SweepConfig] = []
    left_out: dict[int, str] = {}
    caches = [str(cache.path) for cache in _caches_with_test(job, data)]
    for trial, reports in zip(top, retrain(job, data, top), strict=True):
        trained = [report for report in reports if isinstance(report, TrainReport)]
        if len(trained) < len(reports):
            left_out[trial.number] = next(report for report in reports if isinstance(report, str))
            continue
        run_paths, outcome = [run_path for run_path, _ in job.retrained_runs(trial)], get_outcome(trial)
        best.append(
            SweepConfig(
                number=trial.number,
                params=trial.params,
                score=get_score(trial),
                num_parameters=outcome.num_parameters,
                num_pairs=outcome.num_pairs,
                scores=[report.score for report in trained if report.score is not None],
                run_paths=run_paths,
                test={cache: evaluate_retrieval(cache, run_paths) for cache in caches},
                kept_initialization=outcome.num_pairs > 0 and not any(report.best_epoch for report in trained),
            )
        )
    if not best:
        number, reason = next(iter(left_out.items()))
        raise SettingError(
            f"none of the top {len(left_out)} configurations can be trained with {job.settings.seeds_per_config} "
            f"seeds; trial {number} failed: {reason}; use a larger --top-configs or a smaller --seeds-per-config"
        )
    return sorted(best, key=lambda config: (-config.mean_score, config.number)), left_out


def _caches_with_test(job: StudyJob, data: TrainData) -> Iterator[Cache]:
    parts, start = read_split(split_path(job.path), data.caches).parts, 0
    for cache in data.caches:
        stop = start + cache.info.num_samples
        if "test" in parts[start:stop]:
            yield cache
        start = stop


def _parameters(trials: Sequence[FrozenTrial]) -> list[SweepParameter]:
    complete = next(trial for trial in trials if trial.state == TrialState.COMPLETE)
    distributions = complete.distributions
    return [
        SweepParameter(
            name=name,
            choices=distribution.choices if isinstance(distribution, CategoricalDistribution) else None,
            is_log=bool(getattr(distribution, "log", False)),
        )
        for name, distribution in distributions.items()
    ]


def _trial(trial: FrozenTrial) -> SweepTrial:
    outcome = get_outcome(trial) if trial.state == TrialState.COMPLETE else None
    return SweepTrial(
        number=trial.number,
        state=_STATES[trial.state],
        score=trial.value,
        params=trial.params,
        num_parameters=outcome.num_parameters if outcome else 0,
        num_pairs=outcome.num_pairs if outcome else 0,
        reason=get_reason(trial) if trial.state == TrialState.FAIL else "",
    )


def _importance(trials: Trials) -> dict[str, float]:
    """Split the variance of scores by fANOVA, which ranks settings better than Optuna's default on 60 trials."""
    complete = [trial for trial in trials.finished() if trial.state == TrialState.COMPLETE]
    if len(complete) < _MIN_TRIALS_FOR_IMPORTANCE or len({trial.value for trial in complete}) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fractions = get_param_importances(trials.optuna, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(fraction) for name, fraction in fractions.items()}


def _command(job: StudyJob, data: TrainData, winner: int, trials: Trials) -> str:
    """Return the command that trains the winner again, to the same weights."""
    trial = next(trial for trial in trials.finished() if trial.number == winner)
    caches = [str(cache.path if is_remote(cache.path) else cache.path.resolve()) for cache in data.caches]
    run = str(job.path.resolve() / "winner")
    settings = job.run_settings(trial.params)
    return shlex.join(["embedcache", "train", *caches, run, *_feature_options(data), *command_line(settings)])


def _feature_options(data: TrainData) -> list[str]:
    names = {modality: feature.name for modality, feature in data.features.items()}
    return [word for modality, name in names.items() for word in ("--feature", f"{modality}={name}")]


def findings_json(job: StudyJob, trials: Trials, findings: SweepFindings) -> dict[str, Any]:
    """Return everything the page shows as JSON values."""
    winner, by_number = findings.winner, {trial.number: trial for trial in trials.finished()}
    return {
        "study": job.study.to_json(),
        "counts": findings.counts(),
        "winner": {
            "trial": winner.number,
            "run": str(winner.run_paths[0]),
            "weights": Run.open(winner.run_paths[0]).info.weights,
            "command": findings.command,
        },
        "best": [_config_json(config, by_number[config.number]) for config in findings.best],
        "left_out": {str(number): reason for number, reason in findings.left_out.items()},
        "importance": {name: round(fraction, 5) for name, fraction in findings.importance.items()},
        "trials": [_trial_json(trial) for trial in by_number.values()],
    }


def _config_json(config: SweepConfig, trial: FrozenTrial) -> dict[str, Any]:
    outcome = get_outcome(trial).to_json()
    return {
        "trial": config.number,
        "params": dict(trial.params),
        "score": round(config.score, 5),
        "validation": {
            "mean": round(config.mean_score, 5),
            "lowest": round(min(config.scores), 5),
            "highest": round(max(config.scores), 5),
            "scores": [round(score, 5) for score in config.scores],
        },
        **{name: outcome[name] for name in ("num_parameters", "num_pairs")},
        "runs": [str(run_path) for run_path in config.run_paths],
        "test": {cache: retrieval_json(report) for cache, report in config.test.items()},
    }


def _trial_json(trial: FrozenTrial) -> dict[str, Any]:
    values: dict[str, Any] = {
        "trial": trial.number,
        "state": _STATES[trial.state],
        "score": None if trial.value is None else round(trial.value, 5),
        "params": trial.params,
    }
    if trial.state == TrialState.COMPLETE:
        return {**values, **get_outcome(trial).to_json()}
    return {**values, "reason": get_reason(trial)} if trial.state == TrialState.FAIL else values
