"""The folder of a study: its description, the split that all trials share, and the trials in Optuna's storage."""

import itertools
import math
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from embedcache.dataset.pairs import choose_language
from embedcache.dataset.splits import check_split, write_split
from embedcache.errors import CorruptError, EmbedcacheError, PathError, SettingError, one_line
from embedcache.files import LOCK, Leases, locked, remove_folder
from embedcache.progress import Progress
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    Manifest,
    check_same,
    construct,
    digest_file,
    prepare_folder,
    read_study,
    write_record,
)
from embedcache.settings import replace_fields
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, Value
from embedcache.train.data import TrainData, failed_digests

_FILES = (LOCK, ".claims", "best", "report.*", "split.parquet", "study.*", "trials", "winner")
_MAX_ATTEMPTS = 3
_SQLITE_TIMEOUT_S = 60
_MAX_GRID_POINTS = 100_000


class Study(Manifest):
    """The content of `study.json`: everything that decides the trials of a study.

    Args:
        space: fixed and swept settings, by name.
        sides: modality -> `feature` and its `fingerprint`, in the order of `order_pair`.
        digests: SHA-256 of the rows that lack a feature, by `failed MODALITY`.
        storage: URL of the storage without its password. If None, it is the file `study.db` in the folder.
        name: name of the study in the storage.
        split_digest: SHA-256 of `split.parquet`.
    """

    format: int = FORMAT
    space: Mapping[str, Any]
    index_digest: str
    sides: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str] = {}
    sampler: str
    pruner: str
    seed: int
    storage: str | None
    name: str = "sweep"
    split_digest: str = ""


def open_study(
    path: Path, data: TrainData, space: Space, settings: SweepSettings, *, progress: Progress | None = None
) -> Study:
    """Create a study in a folder, or open the existing one. Processes that start together wait for each other.

    The split is made once and written, because all trials are compared on it and `strict` compares all pairs of items.

    Raises:
        FingerprintError: the folder's study has another space, other features, another sampler, pruner or storage, or
            samples were appended to the cache since.
        PathError: the folder contains other files.
    """
    sides = {}
    for modality, feature in data.features.items():
        sides[modality] = {"feature": feature.name, "fingerprint": feature.fingerprint}

    # Studies in one storage need different names.
    requested = Study(
        space=space.to_json(),
        index_digest=data.index_digest,
        sides=sides,
        digests=failed_digests(data),
        sampler=settings.sampler,
        pruner=settings.pruner,
        seed=settings.seed,
        storage=None if settings.storage is None else without_password(settings.storage),
        name="sweep" if settings.storage is None else f"sweep-{uuid4().hex[:12]}",
    )

    # No lock file is written into a folder that is not a study.
    if not (path / LOCK).is_file():
        prepare_folder(path, kind="a study", marker=LOCK, allowed=_FILES)
    with locked(path):
        prepare_folder(path, kind="a study", marker=LOCK, allowed=_FILES)
        if manifest_path(path).is_file():
            return _reopen_study(path, requested)

        fixed = space.settings({})
        language = choose_language(data.caches, data.sides, fixed.language, progress)
        pairs = data.pairs(language, where=fixed.where, progress=progress)
        split = data.split(pairs, fixed.split, progress=progress)

        # A process that was killed before it wrote the manifest may have left a split.
        split_path(path).unlink(missing_ok=True)
        write_split(split_path(path), data.caches, split)
        study = replace_fields(requested, split_digest=digest_file(split_path(path)))
        write_record(manifest_path(path), study.to_json())
    return study


def _reopen_study(path: Path, requested: Study) -> Study:
    """Read the study in a folder, and check that it matches the requested one."""
    values = read_study(path)
    values.pop(DIGEST, None)
    stored = construct(manifest_path(path), lambda: Study.model_validate(values))

    # The name is random, and the split is written only once.
    expected = replace_fields(requested, name=stored.name, split_digest=stored.split_digest)
    next_step = "use a new folder, or request the same"
    check_same(f"study {path}", stored.to_json(), expected.to_json(), next_step=next_step)
    check_split(split_path(path))
    return stored


def manifest_path(path: Path) -> Path:
    """Return the path of the description, which is written last when a study is created."""
    return path / "study.json"


def split_path(path: Path) -> Path:
    """Return the path of the split that all trials of a study share."""
    return path / "split.parquet"


def trial_path(path: Path, number: int) -> Path:
    """Return the path of a trial's run."""
    return path / "trials" / f"{number:05d}"


class Trials:
    """The trials of a study in Optuna's storage. A killed process loses only its current trial.

    A process leases each trial that it works on by a record lock, which ends with the process. A running trial without
    a lease was lost. Its settings are tried again under a new number, three times at most.

    The study's folder must be visible to all processes. Errors of the storage are a `CorruptError`, or a `PathError`
    if the storage was given as a URL.
    """

    def __init__(self, path: Path, study: Study, space: Space, settings: SweepSettings) -> None:
        self._path = path
        self._space = space
        self._settings = settings
        self._leases = Leases(path)
        self._grid = make_grid_points(space, settings)
        self.total = settings.trials if self._grid is None else min(settings.trials, len(self._grid))
        self.use_pruner = settings.pruner != "none"

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._repeat = RetryHeartbeatStaleTrialCallback(max_retry=_MAX_ATTEMPTS - 1)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with locked(path), storage_errors(settings.storage, path):
            self._storage = _open_storage(settings.storage, path)
            self.optuna = optuna.create_study(
                storage=self._storage,
                study_name=study.name,
                direction="maximize",
                pruner=_make_pruner(settings.pruner, max_epochs=space.max_epochs()),
                load_if_exists=True,
            )

    def close(self) -> None:
        """Close the connections to the storage. The next use opens new ones."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def lease_next(self) -> optuna.Trial | None:
        """Lease a trial to work on, or return None if all are finished. Wait for trials that other processes lease."""
        while True:
            with locked(self._path), storage_errors(self._settings.storage, self._path):
                self._repeat_lost()
                trials = self._all()
                states = [trial.state for trial in trials]
                is_waiting = TrialState.WAITING in states
                if is_waiting or len(trials) < self.total:
                    return self._start(trials, is_waiting=is_waiting)

            # A running trial may still be lost and repeated, so this process waits for it.
            if TrialState.RUNNING not in states:
                return None
            number = trials[states.index(TrialState.RUNNING)].number
            self._leases.acquire(number, wait=True)
            self._leases.release(number)

    def finish(self, trial: optuna.Trial, state: TrialState, score: float | None = None, **attributes: Any) -> None:
        """Record the state, score and attributes of a trial. Only a complete one keeps its run."""
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        if state != TrialState.COMPLETE:
            remove_run(self._path, trial.number)

        # The lease is released last: a running trial without one would be repeated.
        self.optuna.tell(trial, score, state=state)
        self._leases.release(trial.number)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that are complete, pruned or failed, by number, without lost trials that are repeated."""
        with storage_errors(self._settings.storage, self._path):
            return [trial for trial in self._all() if trial.state.is_finished()]

    def _all(self) -> list[FrozenTrial]:
        """Return all trials except lost trials that are repeated."""
        trials = self.optuna.get_trials(deepcopy=False)
        repeated = _repeated_numbers(trials)
        return [trial for trial in trials if trial.number not in repeated]

    def _start(self, trials: Sequence[FrozenTrial], *, is_waiting: bool) -> optuna.Trial:
        # A lost trial is not counted once it is repeated, as the repetition has the same settings.
        draw = len(trials)
        self.optuna.sampler = _make_sampler(self._settings.sampler, seed=self._settings.seed, draw=draw)
        if self._grid is not None and not is_waiting:
            self.optuna.enqueue_trial(self._grid[draw])

        trial = self.optuna.ask(dict(self._space.ranges))
        self._leases.acquire(trial.number)
        return trial

    def _repeat_lost(self) -> None:
        """Queue the settings of lost trials again."""
        for candidate in self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if not self._leases.acquire(candidate.number):
                continue

            # The states are read again: the trial may have finished before its lease was released.
            trials = self.optuna.get_trials(deepcopy=False)
            trial = next(trial for trial in trials if trial.number == candidate.number)
            if trial.state == TrialState.RUNNING:
                # Queued before it is closed, or a kill in between would lose its settings.
                if trial.number not in _repeated_numbers(trials):
                    self._repeat(self.optuna, trial)
                remove_run(self._path, trial.number)
                self.optuna.tell(trial.number, state=TrialState.FAIL)
            self._leases.release(trial.number)


def _repeated_numbers(trials: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of lost trials whose settings other trials repeat."""
    numbers: set[int] = set()
    for trial in trials:
        numbers.update(trial.system_attrs.get("retry_history", ()))
    return numbers


def remove_run(path: Path, number: int) -> None:
    """Remove the run of a trial if it exists."""
    run_path = trial_path(path, number)
    if run_path.exists():
        remove_folder(run_path)


def rank_complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the complete trials by score, the best first, each configuration once."""
    ranked: list[FrozenTrial] = []
    configurations: list[Mapping[str, Any]] = []
    for trial in sorted(trials, key=lambda trial: (-(trial.value or 0), trial.number)):
        if trial.state == TrialState.COMPLETE and trial.params not in configurations:
            ranked.append(trial)
            configurations.append(trial.params)
    return ranked


def check_storage(url: str) -> None:
    """Check that the storage of a URL can be opened, or raise a `PathError`."""
    with storage_errors(url):
        _open_storage(url, Path()).engine.dispose()


def _open_storage(url: str | None, path: Path) -> RDBStorage:
    if url is not None:
        is_sqlite = url.startswith("sqlite")
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _SQLITE_TIMEOUT_S}} if is_sqlite else {})

    # Opened by its path: in a URL, `?` and `%` in a folder's name have a meaning.
    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path.resolve() / "study.db", timeout=_SQLITE_TIMEOUT_S, check_same_thread=False)

    return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})


@contextmanager
def storage_errors(url: str | None, path: Path = Path()) -> Iterator[None]:
    """Raise errors of a storage, a URL or else a file in a study's folder, as ones that name the next step."""
    try:
        yield
    except EmbedcacheError:
        raise
    # A damaged storage raises any error of Optuna or SQLAlchemy.
    except Exception as error:
        if url is None:
            raise CorruptError(
                f"{path / 'study.db'}: expected the trials of a study, got an error: {one_line(error)}; end a process "
                "that keeps it locked, restore it, or use a new folder"
            ) from error

        raise PathError(
            f"storage {without_password(url)} cannot be opened: {one_line(error)}; use a URL such as "
            "postgresql://user:password@host/database and install its driver, or omit --storage"
        ) from error


def without_password(url: str) -> str:
    """Return a URL with its password replaced by stars."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))


def _make_sampler(name: str, *, seed: int, draw: int) -> BaseSampler:
    """Create the sampler of one trial, seeded so that neither restarts nor the choice of process change the result."""
    draw_seed = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    # The points of a grid are enqueued, so this sampler draws none of their values.
    if name != "tpe":
        return RandomSampler(seed=draw_seed)

    # `constant_liar` accounts for running trials of other processes. Optuna 4 calls it experimental.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=draw_seed, constant_liar=True)


def _make_pruner(name: str, *, max_epochs: int) -> BasePruner:
    """Create a pruner. Its steps are epochs from 1, since random initializations begin below closed forms."""
    if name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=1 + max_epochs // 5)
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max(1, max_epochs))
    return NopPruner()


def make_grid_points(space: Space, settings: SweepSettings) -> list[dict[str, Value]] | None:
    """Return all points of a grid, shuffled so that the first few are spread out, or None for other samplers.

    Optuna's `GridSampler` may try a point twice if several processes work on a study. These points are tried once.

    Raises:
        SettingError: a range without steps has infinitely many values, or there are more than 100,000 points.
    """
    if settings.sampler != "grid":
        return None

    values = {name: _grid_values(name, distribution) for name, distribution in space.ranges.items()}
    num_points = math.prod(map(len, values.values()))
    if num_points > _MAX_GRID_POINTS:
        raise SettingError(
            f"grid: expected at most {_MAX_GRID_POINTS:,} points, got {num_points:,}; name fewer values, or use "
            "--sampler tpe"
        )

    points = list(itertools.product(*values.values()))
    order = np.random.default_rng(settings.seed).permutation(num_points)
    return [dict(zip(values, points[number], strict=True)) for number in order]


def _grid_values(name: str, values: BaseDistribution) -> Sequence[Value]:
    if isinstance(values, CategoricalDistribution):
        return values.choices  # type: ignore[return-value]
    assert isinstance(values, IntDistribution | FloatDistribution)
    if values.log or values.step is None:
        raise SettingError(
            f"--sampler grid: {name}: expected a range with a step, or choices such as "
            f"{name} = [{values.low}, {values.high}], got a range without a step"
        )
    if isinstance(values, IntDistribution):
        return range(values.low, values.high + 1, values.step)

    # Without rounding, 0.1 + 2 * 0.1 would be above a `high` of 0.3.
    num_steps = round((values.high - values.low) / values.step)
    points = values.low + values.step * np.arange(num_steps + 1)
    return [float(f"{point:.12g}") for point in points]
