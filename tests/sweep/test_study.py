"""Which process gets which trial. Nothing is trained here."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from embedcache.dataset.splits import read_split
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.files import make_folder
from embedcache.sweep.report import get_reason
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, read_space
from embedcache.sweep.study import Study, Trials, open_study, rank_complete, split_path, trial_path, without_password
from embedcache.sweep.trials import top_trials
from embedcache.train.data import open_data
from tests.sweep.conftest import FEATURES, write_space

pytestmark = pytest.mark.slow

COMPLETE, FAIL = TrialState.COMPLETE, TrialState.FAIL
OPENED: list[Trials] = []


def open_trials(path: Path, space: Space, **settings: object) -> Trials:
    """Open the trials as a new process would, after the one before has died."""
    make_folder(path)
    given = SweepSettings(**{"trials": 5, "sampler": "random", **settings})  # type: ignore[arg-type]
    study = Study(space={}, index_digest="", sides={}, sampler=given.sampler, pruner="none", seed=0, storage=None)
    OPENED.append(Trials(path, study, space, given))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def _close_trials() -> Iterator[None]:
    """Close the connections of each test, which Python 3.13 warns of."""
    yield
    while OPENED:
        OPENED.pop().close()


def lease(trials: Trials) -> FrozenTrial:
    """Lease a trial where there is one left."""
    trial = trials.lease_next()
    assert trial is not None
    return trial


def run_all(trials: Trials) -> list[dict[str, object]]:
    """Complete all remaining trials, and return what was tried."""
    while (trial := trials.lease_next()) is not None:
        trials.finish(trial, COMPLETE, 0.5)
    return [trial.params for trial in trials.finished()]


@pytest.fixture
def space(space_path: Path) -> Space:
    return read_space(space_path)


@pytest.fixture
def grid(tmp_path: Path) -> Space:
    return read_space(write_space(tmp_path, "[space]\nprojector = ['linear', 'mlp']\nshared_width = [8, 16]"))


@pytest.mark.parametrize(("sampler", "trials"), [("random", 4), ("tpe", 11)])  # of which tpe draws 10 at random
def test_seed_decides_the_trials(tmp_path: Path, space: Space, sampler: str, trials: int) -> None:
    a, b, c = (
        run_all(
            open_trials(tmp_path / name, space, sampler=sampler, seed=seed, trials=num, storage="sqlite:///:memory:")
        )
        for name, seed, num in (("a", 1, trials), ("b", 1, trials), ("c", 2, 3))
    )
    assert a == b
    assert a[:3] != c
    assert len({params["lr"] for params in a}) == trials


def test_restart_draws_new_trials(tmp_path: Path, space: Space) -> None:
    whole = run_all(open_trials(tmp_path / "50%20? #é", space))
    assert [path.name for path in (tmp_path / "50%20? #é").glob("*.db")] == ["study.db"]  # in a folder of any name
    run_all(open_trials(tmp_path / "parts", space, trials=2))
    assert run_all(open_trials(tmp_path / "parts", space, trials=5)) == whole


def test_trial_of_a_dead_process_is_repeated(tmp_path: Path, space: Space) -> None:
    whole = run_all(open_trials(tmp_path / "whole", space))
    trials = open_trials(tmp_path / "killed", space)
    trials.finish(lease(trials), COMPLETE, 0.5)
    lost = lease(trials)
    make_folder(trial_path(tmp_path / "killed", lost.number))

    again = run_all(open_trials(tmp_path / "killed", space))
    assert sorted(map(str, again)) == sorted(map(str, whole))
    assert not trial_path(tmp_path / "killed", lost.number).exists()


def test_process_killed_between_repeating_and_closing_a_trial(
    tmp_path: Path, grid: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are queued, and the trial is still open: they are not queued a second time."""
    open_trials(tmp_path, grid, sampler="grid").lease_next()
    killed = open_trials(tmp_path, grid, sampler="grid")
    monkeypatch.setattr(killed.optuna, "tell", lambda *_, **__: 1 / 0)
    with pytest.raises(CorruptError, match="division"):
        killed.lease_next()
    tried = run_all(open_trials(tmp_path, grid, sampler="grid", trials=50))
    assert len(tried) == len({str(params) for params in tried}) == 4


def test_trial_finished_during_check_stays_finished(
    tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = open_trials(tmp_path, space, trials=1), open_trials(tmp_path, space, trials=1)
    trial = lease(ours)

    def take(_number: int) -> bool:
        ours.finish(trial, COMPLETE, 0.5)
        return True

    monkeypatch.setattr(theirs._leases, "acquire", take)
    assert theirs.lease_next() is None
    assert [trial.state for trial in theirs.finished()] == [COMPLETE]


def test_trial_of_a_living_process_is_kept(tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = open_trials(tmp_path, space), open_trials(tmp_path, space)
    lease(ours)
    for trials in (ours, theirs):  # as if another process had the first
        monkeypatch.setattr(trials._leases, "acquire", lambda number: number != 0)
    lost, again = lease(ours), lease(theirs)
    assert (lost.number, again.number) == (1, 2)
    assert again.params == lost.params
    states = [trial.state for trial in theirs.optuna.get_trials()]
    assert states == [TrialState.RUNNING, FAIL, TrialState.RUNNING]


def test_third_loss_is_a_failure(tmp_path: Path, space: Space) -> None:
    tried = [lease(open_trials(tmp_path, space, trials=1)).params for _ in range(3)]
    assert tried[0] == tried[1] == tried[2]
    trials = open_trials(tmp_path, space, trials=1)
    assert trials.lease_next() is None
    (failed,) = trials.finished()
    assert failed.state == FAIL
    assert get_reason(failed) == "its process was killed every time"


def test_rank_complete_lists_each_configuration_once(tmp_path: Path) -> None:
    space = read_space(write_space(tmp_path, "[space]\nprojector = ['linear', 'mlp']"))
    trials = open_trials(tmp_path / "a", space, trials=8)
    for score in [0.1, 0.5, 0.3, 0.5, 0.2, 0.4, 0.5, 0.1]:
        trials.finish(lease(trials), COMPLETE, score)
    first, second = rank_complete(trials.finished())
    assert (first.number, first.value) == (1, 0.5)
    others = [trial.value for trial in trials.finished() if trial.params == second.params]
    assert first.params != second.params
    assert second.value == max(value for value in others if value is not None)


def test_storage_errors_are_one_line(tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.sweep.study._SQLITE_TIMEOUT_S", 0.01)
    run_all(open_trials(tmp_path / "a", space, trials=3))
    OPENED.pop().close()
    storage = tmp_path / "a" / "study.db"
    with closing(sqlite3.connect(storage)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(CorruptError, match="locked"):
            open_trials(tmp_path / "a", space).lease_next()

    data = storage.read_bytes()
    for damaged in (data[: len(data) // 2], data.replace(b"CategoricalDistribution", b"CategoricbhDistribution", 1)):
        storage.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"^[^\n]*study.db: [^\n]*or use a new folder$"):
            open_trials(tmp_path / "a", space, trials=3).lease_next()
    for url in ("nonsense://user:secret@host/x", "sqlite:////nowhere/at/all/study.db"):
        with pytest.raises(PathError, match="cannot be opened: .*use a URL such as postgresql") as raised:
            open_trials(tmp_path, space, storage=url)
        assert "secret" not in str(raised.value)
    assert without_password("a://user:secret@host/x") == "a://user:***@host/x"
    assert without_password("sqlite:///study.db") == "sqlite:///study.db"


def test_study_without_complete_trials_raises(tmp_path: Path, space: Space) -> None:
    trials = open_trials(tmp_path, space, trials=1)
    trials.finish(lease(trials), FAIL, reason="too few samples")
    with pytest.raises(SettingError, match="too few samples"):
        top_trials(trials, SweepSettings())


def test_processes_together_open_one_study(cache_path: Path, tmp_path: Path, space: Space) -> None:
    data = open_data(cache_path, FEATURES["feature"], memory_bytes=10**9)
    settings = SweepSettings(storage="sqlite:///elsewhere.db")  # where a study is named by chance
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_study(tmp_path / "study", data, space, settings), range(8)))
    assert len({study.name for study in found}) == 1
    assert len(read_split(split_path(tmp_path / "study"), data.caches).rows("val")) == 30
