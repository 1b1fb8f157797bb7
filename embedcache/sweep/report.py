"""What a sweep found, and as JSON."""

import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from embedcache.artifact import digest_file, write_json
from embedcache.evaluate.report import retrieval_json
from embedcache.paths import is_remote
from embedcache.sweep.best import Best
from embedcache.sweep.study import Study
from embedcache.sweep.trials import Trials, outcome_of, reason_of
from embedcache.train.data import TrainData
from embedcache.train.options import options_of

_FEWEST_FOR_IMPORTANCE = 4


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a sweep found.

    Args:
        study: what it asked.
        trials: finished: complete, pruned or failed, by number.
        best: the best configurations; first comes what validation picks.
        left_out: trials that would be among them, but fail with another seed -> why.
        importance: swept setting -> its share of what makes scores differ, the largest first; empty where too few
            trials tell.
        command: trains the winner again, to the same weights.
        weights: SHA-256 of the winner's weights.
    """

    study: Study
    trials: Sequence[FrozenTrial]
    best: Sequence[Best]
    left_out: Mapping[int, str]
    importance: Mapping[str, float]
    command: str
    weights: str

    @property
    def winner(self) -> Best:
        """The configuration that validation picks."""
        return self.best[0]

    def of(self, state: TrialState) -> list[FrozenTrial]:
        """List the trials that ended in one way."""
        return [trial for trial in self.trials if trial.state == state]

    def counts(self) -> dict[str, int]:
        """Count the trials by how they ended."""
        return {
            "complete": len(self.of(TrialState.COMPLETE)),
            "pruned": len(self.of(TrialState.PRUNED)),
            "failed": len(self.of(TrialState.FAIL)),
        }


def find(
    path: Path, study: Study, data: TrainData, trials: Trials, best: Sequence[Best], left_out: Mapping[int, str]
) -> Findings:
    """Put together what a sweep found."""
    return Findings(
        study=study,
        trials=trials.finished(),
        best=best,
        left_out=left_out,
        importance=_importance(trials),
        command=_command(path, data, best[0]),
        weights=digest_file(best[0].run_paths[0] / "model.safetensors"),
    )


def write_figures(path: Path, findings: Findings) -> None:
    """Write all figures of the page as JSON."""
    write_json(
        path,
        {
            "study": asdict(findings.study),
            "counts": findings.counts(),
            "winner": {
                "trial": findings.winner.number,
                "run": str(findings.winner.run_paths[0]),
                "weights": findings.weights,
                "command": findings.command,
            },
            "best": [_best_json(best) for best in findings.best],
            "left_out": {str(number): reason for number, reason in findings.left_out.items()},
            "importance": {name: round(share, 5) for name, share in findings.importance.items()},
            "trials": [_trial_json(trial) for trial in findings.trials],
        },
    )


def _importance(trials: Trials) -> dict[str, float]:
    """Share out the variance of scores by fANOVA, which orders settings better than Optuna's default on 60 trials."""
    complete = [trial for trial in trials.finished() if trial.state == TrialState.COMPLETE]
    if len(complete) < _FEWEST_FOR_IMPORTANCE or len({trial.value for trial in complete}) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = get_param_importances(trials.optuna, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in shares.items()}


def _command(path: Path, data: TrainData, winner: Best) -> str:
    caches = [str(cache.path if is_remote(cache.path) else cache.path.resolve()) for cache in data.caches]
    sides = ["--image", data.image.feature, "--text", data.text.feature]
    run = str(path.resolve() / "winner")
    return shlex.join(["embedcache", "train", *caches, run, *sides, *options_of(winner.settings)])


def _best_json(best: Best) -> dict[str, Any]:
    return {
        "trial": best.number,
        "params": dict(best.params),
        "score": round(best.score, 5),
        "validation": {
            "mean": round(best.mean_score, 5),
            "lowest": round(min(best.scores), 5),
            "highest": round(max(best.scores), 5),
            "scores": [round(score, 5) for score in best.scores],
        },
        "num_parameters": best.outcome.num_parameters,
        "flops_a_pair": best.outcome.flops_a_pair,
        "num_pairs": best.outcome.num_pairs,
        "runs": [str(run_path) for run_path in best.run_paths],
        "test": {cache: retrieval_json(report) for cache, report in best.test.items()},
    }


def _trial_json(trial: FrozenTrial) -> dict[str, Any]:
    values: dict[str, Any] = {
        "trial": trial.number,
        "state": {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(trial.state, "failed"),
        "score": None if trial.value is None else round(trial.value, 5),
        "params": trial.params,
    }
    if trial.state == TrialState.COMPLETE:
        return {**values, **asdict(outcome_of(trial))}
    return {**values, "reason": reason_of(trial)} if trial.state == TrialState.FAIL else values
