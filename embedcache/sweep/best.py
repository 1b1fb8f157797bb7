"""The best configurations, trained again with several seeds: validation picks one of them, test says how good it is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from optuna.trial import FrozenTrial

from embedcache.dataset.splits import read_split
from embedcache.errors import SettingError
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.files import Leases
from embedcache.store.cache import Cache
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, Value
from embedcache.sweep.study import best_path, split_path
from embedcache.sweep.trial import settings_in, try_to_train
from embedcache.sweep.trials import Outcome, outcome_of, score_of
from embedcache.train.data import TrainData
from embedcache.train.settings import TrainSettings
from embedcache.train.train import TrainReport

_AFTER_TRIALS = 2**40


@dataclass(frozen=True, kw_only=True)
class Best:
    """One of the best configurations.

    Args:
        number: of its trial.
        params: what the trial tried.
        score: of the trial.
        outcome: of the trial.
        scores: best validation recall of each seed, the trial's own first.
        settings: of the run with the first seed.
        run_paths: one run a seed.
        test: cache -> what its held-out items give, over all seeds.
    """

    number: int
    params: Mapping[str, Value]
    score: float
    outcome: Outcome
    scores: Sequence[float]
    settings: TrainSettings
    run_paths: Sequence[Path]
    test: Mapping[str, RetrievalReport]

    @property
    def mean_score(self) -> float:
        """Mean validation recall over the seeds."""
        return fmean(self.scores)


def train_best(
    path: Path, data: TrainData, space: Space, trials: Sequence[FrozenTrial], settings: SweepSettings
) -> list[list[TrainReport | str]]:
    """Train the configurations of some trials again, with several seeds each; what is trained already is used.

    Processes that do so at once share the runs: each first takes those that nobody is at, and then waits for the rest.

    Returns:
        For each trial a report a seed, or why the seed cannot be trained.
    """
    claims = Leases(path)
    reports: dict[Path, TrainReport | str] = {}
    for waits in (False, True):
        for trial in trials:
            for place, (run_path, run) in enumerate(_runs(path, space, trial, settings)):
                claim = _AFTER_TRIALS + trial.number * 2**16 + place
                if run_path not in reports and claims.acquire(claim, wait=waits):
                    reports[run_path] = try_to_train(data, run_path, run)
                    claims.release(claim)
    return [[reports[run_path] for run_path, _ in _runs(path, space, trial, settings)] for trial in trials]


def measure_best(
    path: Path, data: TrainData, space: Space, trials: Sequence[FrozenTrial], settings: SweepSettings
) -> tuple[list[Best], dict[int, str]]:
    """Train the best trials again and measure them on the test part.

    Returns:
        The configurations, first what validation picks; and of each trial that another seed fails on: why.

    Raises:
        SettingError: there is no other.
    """
    found: list[Best] = []
    left_out: dict[int, str] = {}
    caches = list(_with_test(path, data))
    for trial, reports in zip(trials, train_best(path, data, space, trials, settings), strict=True):
        trained = [report for report in reports if isinstance(report, TrainReport)]
        if len(trained) == len(reports):
            scores = [fmean(report.recalls.values()) for report in trained]
            found.append(_measure(list(_runs(path, space, trial, settings)), trial, scores, caches))
        else:
            left_out[trial.number] = next(report for report in reports if isinstance(report, str))
    if not found:
        number, reason = next(iter(left_out.items()))
        raise SettingError(
            f"none of the best {len(left_out)} configurations can be trained with {settings.num_seeds} seeds; trial "
            f"{number} failed: {reason}; give a larger --top or fewer --seeds"
        )
    return sorted(found, key=lambda best: (-best.mean_score, best.number)), left_out


def _runs(
    path: Path, space: Space, trial: FrozenTrial, settings: SweepSettings
) -> Iterator[tuple[Path, TrainSettings]]:
    """Give each seed's run and its settings, those of the trial's own seed first."""
    first = settings_in(path, space, trial.params)
    for seed in range(first.seed, first.seed + settings.num_seeds):
        yield best_path(path, trial.number, seed), replace(first, seed=seed)


def _measure(
    runs: Sequence[tuple[Path, TrainSettings]], trial: FrozenTrial, scores: Sequence[float], caches: Sequence[Cache]
) -> Best:
    run_paths = [run_path for run_path, _ in runs]
    return Best(
        number=trial.number,
        params=trial.params,
        score=score_of(trial),
        outcome=outcome_of(trial),
        scores=scores,
        settings=runs[0][1],
        run_paths=run_paths,
        test={str(cache.path): evaluate_retrieval(str(cache.path), run_paths) for cache in caches},
    )


def _with_test(path: Path, data: TrainData) -> Iterator[Cache]:
    """Give the caches that have samples in the test part."""
    parts, start = read_split(split_path(path), data.caches).parts, 0
    for cache in data.caches:
        stop = start + cache.info.num_samples
        if "test" in parts[start:stop]:
            yield cache
        start = stop
