"""The trials of a study in Optuna's storage: which process works on each, and their outcomes."""

import itertools
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from embedcache.errors import CorruptError, EmbedcacheError, PathError, SettingError, one_line
from embedcache.files import remove_folder
from embedcache.locks import Leases, locked
from embedcache.sweep.settings import Pruner, Sampler, SweepSettings
from embedcache.sweep.space import Range, Space, Value
from embedcache.sweep.study import Study, trial_path, without_password

Params: TypeAlias = dict[str, Value]
"""Values of the swept settings, by name, as Optuna has them."""

_MAX_ATTEMPTS = 3
_SQLITE_TIMEOUT_S = 60
_MAX_GRID_POINTS = 100_000
_RESTORE = "restore the storage, or use a new folder"
_SQLITE_STEPS = {
    "BUSY": "another process keeps it locked: end that process, and rerun the same command",
    "FULL": "free some space, and rerun the same command",
    "READONLY": "make the file and its folder writable",
    "CANTOPEN": "make the file and its folder readable and writable",
}
"""What SQLite calls an error -> what to do, where the storage is not damaged."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a complete trial.

    Args:
        recalls: validation recalls of the best epoch.
        best_epoch: epoch whose weights were saved; 0 is the initialization.
        num_pairs: number of pairs seen in training, repetitions included.
    """

    recalls: Mapping[str, float]
    best_epoch: int
    num_parameters: int
    num_pairs: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return asdict(self)


class Trials:
    """Leases the trials of a study and records their outcomes; a killed process loses only its current trial.

    A process leases each trial it works on by a record lock, which ends with the process. A running trial that nobody
    has leased was lost: it is closed, and its settings are tried again under a new number.

    The study's folder must be visible to all processes. A storage that cannot be opened raises a `PathError`.
    """

    def __init__(self, path: Path, study: Study, space: Space, settings: SweepSettings) -> None:
        self._path, self._space, self._settings = path, space, settings
        self._leases = Leases(path)
        self._grid = make_grid_points(space, settings)
        self.total = settings.trials if self._grid is None else min(settings.trials, len(self._grid))
        self.use_pruner = settings.pruner != "none"
        with locked(path):
            self._storage, self.optuna = _open_storage(path, study, space, settings)

    def close(self) -> None:
        """Close the connections to the storage; the next use opens new ones."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def lease_next(self) -> optuna.Trial | None:
        """Lease a trial to work on, waiting for those of other processes; None if all are finished."""
        while True:
            with locked(self._path):
                self._close_lost()
                running = self._running()
                if len(running) + len(self.finished()) < self.total:
                    return self._next()
            if not running:
                return None
            self._leases.acquire(running[0].number, wait=True)
            self._leases.release(running[0].number)

    def complete(self, trial: optuna.Trial, score: float, outcome: Outcome) -> None:
        """Record the score and the outcome of a trial."""
        trial.set_user_attr("outcome", outcome.to_json())
        self._close(trial, TrialState.COMPLETE, score)

    def prune(self, trial: optuna.Trial) -> None:
        """Record that a trial was pruned, and remove its run; the scores it reported stay in the storage."""
        remove_run(self._path, trial.number)
        self._close(trial, TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        """Record why a trial failed, and remove its run."""
        trial.set_user_attr("reason", reason)
        remove_run(self._path, trial.number)
        self._close(trial, TrialState.FAIL)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that are complete, pruned or failed, by number, without lost ones that are repeated."""
        return [trial for trial in self._all() if trial.state.is_finished() and not _is_lost(trial)]

    def _all(self) -> list[FrozenTrial]:
        try:
            trials = self.optuna.get_trials(deepcopy=False)
        except Exception as error:  # of Optuna or SQLAlchemy, about anything in a damaged storage
            raise _storage_error(error, f"study {self._path}: its storage cannot be read: {one_line(error)}") from error
        if [trial.number for trial in trials] != list(range(len(trials))):
            raise CorruptError(
                f"study {self._path}: expected trials numbered from 0 in its storage, got others; {_RESTORE}"
            )
        return trials

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._all() if trial.state == TrialState.RUNNING]

    def _next(self) -> optuna.Trial:
        trials = self._all()
        num_started = sum(not _num_losses(trial) for trial in trials)  # without those that are repeated
        self.optuna.sampler = _make_sampler(self._settings.sampler, seed=self._settings.seed, draw=num_started)
        if self._grid is not None and not any(trial.state == TrialState.WAITING for trial in trials):
            self.optuna.enqueue_trial(self._grid[num_started])
        trial = self.optuna.ask(make_distributions(self._space))
        self._leases.acquire(trial.number)
        return trial

    def _close(self, trial: optuna.Trial, state: TrialState, score: float | None = None) -> None:
        self.optuna.tell(trial, score, state=state)
        self._leases.release(trial.number)

    def _close_lost(self) -> None:
        """Close the running trials of dead processes, which nobody has leased."""
        for number in [trial.number for trial in self._running()]:
            if not self._leases.acquire(number):
                continue
            for trial in self._running():  # read again: it may have finished just before its lease was released
                if trial.number == number:
                    self.optuna.tell(number, state=TrialState.FAIL)
                    remove_run(self._path, number)
                    if _is_repeated(trial):
                        self.optuna.enqueue_trial(trial.params, user_attrs={"deaths": _num_losses(trial) + 1})
            self._leases.release(number)


def remove_run(path: Path, number: int) -> None:
    """Remove the run of a trial if it exists."""
    run_path = trial_path(path, number)
    if run_path.exists():
        remove_folder(run_path)


def rank_complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the complete trials by score, the best first, each configuration once."""
    ranked: list[FrozenTrial] = []
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    for trial in sorted(complete, key=lambda trial: (-get_score(trial), trial.number)):
        if all(trial.params != other.params for other in ranked):
            ranked.append(trial)
    return ranked


def get_score(trial: FrozenTrial) -> float:
    """Return the score of a complete trial, or the last one that a pruned trial reported."""
    assert trial.value is not None
    return trial.value


def get_outcome(trial: FrozenTrial) -> Outcome:
    """Return the outcome of a complete trial."""
    return Outcome(**trial.user_attrs["outcome"])


def get_reason(trial: FrozenTrial) -> str:
    """Return the reason why a trial failed."""
    return str(trial.user_attrs.get("reason", f"its process was killed {_MAX_ATTEMPTS} times"))


def _is_lost(trial: FrozenTrial) -> bool:
    """Return whether a trial ended with its process and its settings are tried again."""
    return trial.state == TrialState.FAIL and "reason" not in trial.user_attrs and _is_repeated(trial)


def _is_repeated(trial: FrozenTrial) -> bool:
    """Return whether a lost trial is repeated; the third loss of the same settings is a failure."""
    return _num_losses(trial) + 1 < _MAX_ATTEMPTS


def _num_losses(trial: FrozenTrial) -> int:
    return int(trial.user_attrs.get("deaths", 0))


def _open_storage(
    path: Path, study: Study, space: Space, settings: SweepSettings
) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = path.resolve() / "study.db"
    url = settings.storage or "sqlite:///study.db"
    engine = _engine_options(url)
    if settings.storage is None:  # by its path: in a URL, `?` and `%` of the name of a folder have a meaning
        engine = {"creator": lambda: sqlite3.connect(file, timeout=_SQLITE_TIMEOUT_S, check_same_thread=False)}
    pruner = _make_pruner(settings.pruner, max_epochs=space.max_epochs())
    with _explained(settings.storage, file):
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine)
        if url.startswith("sqlite"):
            _check_pages(storage)
        return storage, optuna.create_study(
            storage=storage,
            study_name=study.name,
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )


def check_storage(url: str) -> None:
    """Open the storage of a URL, and close it; a `PathError` if it cannot be opened."""
    with _explained(url):
        optuna.storages.RDBStorage(url, engine_kwargs=_engine_options(url)).engine.dispose()


def _engine_options(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": _SQLITE_TIMEOUT_S}} if url.startswith("sqlite") else {}


@contextmanager
def _explained(url: str | None, file: Path | None = None) -> Iterator[None]:
    """Raise an error of opening a storage, by its URL or else from a file, as one with the next step."""
    try:
        yield
    except Exception as error:  # of Optuna or SQLAlchemy, about anything in a damaged storage
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if url is None:
            raise _storage_error(error, f"{file}: expected the trials of a study, got an error: {reason}") from error
        raise PathError(
            f"storage {without_password(url)} cannot be opened: {reason}; use a URL such as "
            "postgresql://user:password@host/database and install its driver, or omit --storage"
        ) from error


def _storage_error(error: BaseException | None, message: str) -> EmbedcacheError:
    """Return the error of a storage with its next step: it is damaged, unless SQLite gives another reason."""
    while error is not None:
        name = getattr(error, "sqlite_errorname", "")  # such as SQLITE_BUSY_RECOVERY
        step = _SQLITE_STEPS.get(name.removeprefix("SQLITE_").partition("_")[0])
        if step is not None:
            return PathError(f"{message}; {step}")
        error = error.__cause__
    return CorruptError(f"{message}; {_RESTORE}")


def _check_pages(storage: optuna.storages.RDBStorage) -> None:
    """Check that the tables of SQLite agree with their indexes, so that no trial has vanished."""
    with storage.engine.connect() as connection:
        found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
    if found != "ok":
        raise SQLAlchemyError(str(found))


def make_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the distribution of each swept setting, by name."""
    return {
        name: _range_distribution(values) if isinstance(values, Range) else CategoricalDistribution(values)
        for name, values in space.ranges.items()
    }


def _range_distribution(values: Range) -> BaseDistribution:
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _make_sampler(name: Sampler, *, seed: int, draw: int) -> BaseSampler:
    """Create the sampler of one trial, seeded so that neither restarts nor the choice of process change the result."""
    draw_seed = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    if name != "tpe":
        return RandomSampler(seed=draw_seed)  # the points of a grid are enqueued, so nothing is sampled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # about `constant_liar` in Optuna 4
        return TPESampler(seed=draw_seed, constant_liar=True)  # takes running trials of other processes into account


def _make_pruner(name: Pruner, *, max_epochs: int) -> BasePruner:
    """Create a pruner; its steps are epochs from 1, since random initializations begin below closed forms."""
    if name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=1 + max_epochs // 5)
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max(1, max_epochs))
    return NopPruner()


def make_grid_points(space: Space, settings: SweepSettings) -> list[Params] | None:
    """Return all points of a grid, shuffled so that the first few are spread out; None for other samplers.

    Raises:
        SettingError: a range without steps has infinitely many values, or there are more than 100,000 points.
    """
    if settings.sampler != "grid":
        return None
    values = {name: _grid_values(name, values) for name, values in space.ranges.items()}
    num_points = int(np.prod([len(values_V) for values_V in values.values()], dtype=np.float64))
    if num_points > _MAX_GRID_POINTS:
        raise SettingError(
            f"grid: expected at most {_MAX_GRID_POINTS:,} points, got {num_points:,}; name fewer values, or use "
            "--sampler tpe"
        )
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    return [points[number] for number in np.random.default_rng(settings.seed).permutation(len(points))]


def _grid_values(name: str, values: Range | tuple[Value, ...]) -> tuple[Value, ...]:
    if not isinstance(values, Range):
        return values
    step = values.step or (1 if values.is_whole and not values.log else None)
    if step is None:
        raise SettingError(
            f"--sampler grid: {name}: expected a range with a step, or choices such as "
            f"{name} = [{values.low}, {values.high}], got a range without a step"
        )
    points = [values.low + number * step for number in range(round((values.high - values.low) / step) + 1)]
    if values.is_whole:
        return tuple(points)
    return tuple(float(f"{point:.12g}") for point in points)  # 0.1 + 2 * 0.1 is above 0.3
