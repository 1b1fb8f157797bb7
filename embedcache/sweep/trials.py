"""The trials of a study, in Optuna's storage: handed out to one process each, and what became of them.

Optuna's words for a space, and its samplers and pruners by name.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from embedcache.errors import PathError, SettingError
from embedcache.files import Leases, locked, remove_folder
from embedcache.sweep.settings import Pruner, Sampler, SweepSettings
from embedcache.sweep.space import Range, Space, Value
from embedcache.sweep.study import Study, trial_path, without_password

_MOST_DEATHS = 3
_SQLITE_WAIT_S = 60


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished trial gave.

    Args:
        recalls: on validation, at the best epoch.
        best_epoch: whose weights were kept; 0 is the start.
        num_parameters: trained.
        flops_a_pair: of both towers, forward.
        num_pairs: seen in training.
        seconds: of the trial.
    """

    recalls: Mapping[str, float]
    best_epoch: int
    num_parameters: int
    flops_a_pair: int
    num_pairs: int
    seconds: float


class Trials:
    """Hands out a study's trials, and keeps what became of them. Killed processes lose what they were at, and no more.

    A process claims each trial it takes by a record lock, which ends with it. A trial that is running and claimed by
    nobody was lost: it is closed, and what it tried is tried again under a new number.

    Args:
        path: the study's folder, which all processes see.
        study: what is asked.
        space: that trials are drawn from.
        settings: of the search.

    Raises:
        PathError: the storage cannot be opened.
    """

    def __init__(self, path: Path, study: Study, space: Space, settings: SweepSettings) -> None:
        self._path, self._space, self._settings = path, space, settings
        self._claims = Leases(path)
        self._grid = grid_points(space, settings)
        self.total = settings.num_trials if self._grid is None else min(settings.num_trials, len(self._grid))
        self.are_pruned = settings.pruner != "none"
        with locked(path):
            self.optuna = _open(path, study, space, settings)

    def take(self) -> optuna.Trial | None:
        """Get a trial to work on, or None when all are finished. Waits for those that others work on."""
        while True:
            with locked(self._path):
                self._close_lost()
                running = self._running()
                if len(running) + len(self.finished()) < self.total:
                    return self._next()
            if not running:
                return None
            self._wait_for(running[0])

    def complete(self, trial: optuna.Trial, score: float, outcome: Outcome) -> None:
        """Keep what a trial reached."""
        trial.set_user_attr("outcome", asdict(outcome))
        self._close(trial, TrialState.COMPLETE, score)

    def prune(self, trial: optuna.Trial) -> None:
        """Keep that a trial was ended as it lay behind. Its folder goes; the scores it had are in the storage."""
        remove_trial(self._path, trial.number)
        self._close(trial, TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """Keep why a trial came to nothing. Its folder goes."""
        trial.set_user_attr("reason", reason)
        remove_trial(self._path, trial.number)
        self._close(trial, TrialState.FAIL)

    def finished(self) -> list[FrozenTrial]:
        """List the trials that ended by themselves: complete, pruned or failed, by number."""
        return [trial for trial in self._all() if trial.state.is_finished() and not _is_lost(trial)]

    def _all(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._all() if trial.state == TrialState.RUNNING]

    def _next(self) -> optuna.Trial:
        trials = self._all()
        num_drawn = sum(not _num_deaths(trial) for trial in trials)  # without those that are tried again
        self.optuna.sampler = make_sampler(self._settings.sampler, seed=self._settings.seed, draw=num_drawn)
        if self._grid is not None and not any(trial.state == TrialState.WAITING for trial in trials):
            self.optuna.enqueue_trial(self._grid[num_drawn])
        trial = self.optuna.ask(distributions(self._space))
        self._claims.acquire(trial.number)
        return trial

    def _close(self, trial: optuna.Trial, state: TrialState, score: float | None = None) -> None:
        self.optuna.tell(trial, score, state=state)
        self._claims.release(trial.number)

    def _wait_for(self, trial: FrozenTrial) -> None:
        self._claims.acquire(trial.number, wait=True)
        self._claims.release(trial.number)

    def _close_lost(self) -> None:
        """Close the trials of dead processes, whose claims nobody holds."""
        for number in [trial.number for trial in self._running()]:
            if not self._claims.acquire(number):
                continue
            for trial in self._running():  # read again: it may have been finished before its claim was free
                if trial.number == number:
                    self._close_as_lost(trial)
            self._claims.release(number)

    def _close_as_lost(self, trial: FrozenTrial) -> None:
        self.optuna.tell(trial.number, state=TrialState.FAIL)
        remove_trial(self._path, trial.number)
        if _is_tried_again(trial):
            self.optuna.enqueue_trial(trial.params, user_attrs={"deaths": _num_deaths(trial) + 1})


def remove_trial(path: Path, number: int) -> None:
    """Remove the run of a trial, if there is one."""
    run_path = trial_path(path, number)
    if run_path.exists():
        remove_folder(run_path)


def complete_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """List complete trials by their score, the best first, each configuration once."""
    ranked: list[FrozenTrial] = []
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for trial in sorted(complete, key=lambda trial: (-score_of(trial), trial.number)):
        if all(trial.params != other.params for other in ranked):
            ranked.append(trial)
    return ranked


def score_of(trial: FrozenTrial) -> float:
    """Get a trial's score; of a pruned one, the last it reported."""
    assert trial.value is not None
    return trial.value


def outcome_of(trial: FrozenTrial) -> Outcome:
    """Get what a complete trial gave."""
    return Outcome(**trial.user_attrs["outcome"])


def reason_of(trial: FrozenTrial) -> str:
    """Say why a failed trial failed."""
    return str(trial.user_attrs.get("reason", f"its process was killed, {_MOST_DEATHS} times"))


def _is_lost(trial: FrozenTrial) -> bool:
    """Say whether a trial ended with its process, and what it tried is tried again."""
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs and _is_tried_again(trial)


def _is_tried_again(trial: FrozenTrial) -> bool:
    """Say whether what a trial tries may kill another process; after the third it has failed."""
    return _num_deaths(trial) + 1 < _MOST_DEATHS


def _num_deaths(trial: FrozenTrial) -> int:
    """Count how often what a trial tries was lost before."""
    return int(trial.user_attrs.get("deaths", 0))


def _open(path: Path, study: Study, space: Space, settings: SweepSettings) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = settings.storage or f"sqlite:///{path.resolve() / 'study.db'}"
    engine: dict[str, Any] = {"connect_args": {"timeout": _SQLITE_WAIT_S}} if url.startswith("sqlite") else {}
    try:
        return optuna.create_study(
            storage=optuna.storages.RDBStorage(url, engine_kwargs=engine),
            study_name=study.name,
            direction="maximize",
            pruner=make_pruner(settings.pruner, most_epochs=space.most_epochs()),
            load_if_exists=True,
        )
    except (SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise PathError(
            f"storage {without_password(url)} cannot be opened: {reason}; give a URL such as "
            "postgresql://user:password@host/database and install its driver, or leave --storage out"
        ) from error


Params: TypeAlias = dict[str, Value]

_MOST_POINTS = 100_000


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Give each swept setting's distribution."""
    return {
        name: _of_range(over) if isinstance(over, Range) else CategoricalDistribution(over)
        for name, over in space.ranges.items()
    }


def _of_range(over: Range) -> BaseDistribution:
    if over.is_whole:
        return IntDistribution(int(over.low), int(over.high), log=over.log, step=int(over.step or 1))
    return FloatDistribution(over.low, over.high, log=over.log, step=over.step)


def make_sampler(name: Sampler, *, seed: int, draw: int) -> BaseSampler:
    """Make the sampler of one draw.

    It is seeded by the study's seed and the draw's number, so that the same is drawn whichever process asks, and after
    however many restarts.

    Args:
        name: of the sampler.
        seed: of the study.
        draw: how many were drawn before.
    """
    of_draw = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    if name != "tpe":
        return RandomSampler(seed=of_draw)  # which draws nothing of a grid: its points are given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # as Optuna 4 calls `constant_liar`
        return TPESampler(seed=of_draw, constant_liar=True)  # which counts in what other processes are at


def make_pruner(name: Pruner, *, most_epochs: int) -> BasePruner:
    """Make a pruner; the steps of trials are epochs, from 1. The start counts for nothing: random ones begin below."""
    if name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=1 + most_epochs // 5)
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max(1, most_epochs))
    return NopPruner()


def grid_points(space: Space, settings: SweepSettings) -> list[Params] | None:
    """List all that a space holds, shuffled, so that the first few are spread over it; None for another sampler.

    Raises:
        SettingError: a range without steps has no end of values, or there are more than 100,000 points.
    """
    if settings.sampler != "grid":
        return None
    values = {name: _values(name, over) for name, over in space.ranges.items()}
    num_points = int(np.prod([len(values_V) for values_V in values.values()], dtype=np.float64))
    if num_points > _MOST_POINTS:
        raise SettingError(
            f"the grid has {num_points:,} points, of at most {_MOST_POINTS:,}; name fewer values, or use --sampler tpe"
        )
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    return [points[place] for place in np.random.default_rng(settings.seed).permutation(len(points))]


def _values(name: str, over: Range | tuple[Value, ...]) -> tuple[Value, ...]:
    if not isinstance(over, Range):
        return over
    step = over.step or (1 if over.is_whole and not over.log else None)
    if step is None:
        raise SettingError(
            f"--sampler grid: {name} is a range without steps; give it a step, or choices such as "
            f"{name} = [{over.low}, {over.high}]"
        )
    return tuple(over.low + number * step for number in range(round((over.high - over.low) / step) + 1))
