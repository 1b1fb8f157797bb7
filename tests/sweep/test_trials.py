"""Which process gets which trial. Nothing is trained here."""

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from optuna.trial import TrialState

from embedcache.dataset.splits import read_split
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.files import make_folder
from embedcache.reports.sweep import pareto_front
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, read_space
from embedcache.sweep.study import Study, open_study, split_path, trial_path, without_password
from embedcache.sweep.trials import Outcome, Trials, get_reason, rank_complete
from embedcache.sweep.worker import top_trials
from embedcache.train.data import open_data
from tests.sweep.conftest import FEATURES

pytestmark = pytest.mark.slow

OUTCOME = Outcome(recalls={}, best_epoch=1, num_parameters=1, num_pairs=1, seconds=1.0)
OPENED: list[Trials] = []


def open_trials(path: Path, space: Space, **settings: object) -> Trials:
    """Open the trials as a new process would, after the one before has died."""
    make_folder(path)
    given = SweepSettings(**{"trials": 5, "sampler": "random", **settings})  # type: ignore[arg-type]
    study = Study(
        space={},
        index_digest="",
        sides={},
        sampler=given.sampler,
        pruner="none",
        seed=given.seed,
        storage=None,
    )
    OPENED.append(Trials(path, study, space, given))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def _close_trials() -> Iterator[None]:
    """Close the connections of each test, which Python 3.13 warns of."""
    yield
    while OPENED:
        OPENED.pop().close()


def run_all(trials: Trials) -> list[dict[str, object]]:
    """Complete all remaining trials, and return what was tried."""
    while (trial := trials.lease_next()) is not None:
        trials.complete(trial, 0.5, OUTCOME)
    return [trial.params for trial in trials.finished()]


@pytest.fixture
def space(space_path: Path) -> Space:
    return read_space(space_path)


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
    whole = run_all(open_trials(tmp_path / "whole", space))
    run_all(open_trials(tmp_path / "parts", space, trials=2))
    assert run_all(open_trials(tmp_path / "parts", space, trials=5)) == whole


def test_storage_is_in_a_folder_of_any_name(tmp_path: Path, space: Space) -> None:
    run_all(open_trials(tmp_path / "50%20? #é", space, trials=1))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.db")] == [Path("50%20? #é/study.db")]
    assert {path.name for path in tmp_path.iterdir()} == {"50%20? #é", "space.toml"}


def test_trial_of_a_dead_process_is_repeated(tmp_path: Path, space: Space) -> None:
    whole = run_all(open_trials(tmp_path / "whole", space))
    trials = open_trials(tmp_path / "killed", space)
    done = trials.lease_next()
    assert done is not None
    trials.complete(done, 0.5, OUTCOME)
    lost = trials.lease_next()
    assert lost is not None
    make_folder(trial_path(tmp_path / "killed", lost.number))
    again = run_all(open_trials(tmp_path / "killed", space))
    assert sorted(map(str, again)) == sorted(map(str, whole))
    assert not trial_path(tmp_path / "killed", lost.number).exists()


def test_trial_finished_during_check_stays_finished(
    tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = open_trials(tmp_path, space, trials=1), open_trials(tmp_path, space, trials=1)
    trial = ours.lease_next()
    assert trial is not None

    def take(_number: int) -> bool:
        ours.complete(trial, 0.5, OUTCOME)
        return True

    monkeypatch.setattr(theirs._leases, "acquire", take)
    assert theirs.lease_next() is None
    assert [trial.state for trial in theirs.finished()] == [TrialState.COMPLETE]


def test_trial_of_a_living_process_is_kept(tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = open_trials(tmp_path, space), open_trials(tmp_path, space)
    alive = ours.lease_next()
    monkeypatch.setattr(ours._leases, "acquire", lambda number: number != 0)  # as if another process had it
    monkeypatch.setattr(theirs._leases, "acquire", lambda number: number != 0)
    lost, again = ours.lease_next(), theirs.lease_next()
    assert alive is not None
    assert lost is not None
    assert again is not None
    assert (lost.number, again.number) == (1, 2)
    assert again.params == lost.params
    states = [trial.state for trial in theirs.optuna.get_trials()]
    assert states == [TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]


def test_third_loss_is_a_failure(tmp_path: Path, space: Space) -> None:
    tried = []
    for _ in range(3):
        trial = open_trials(tmp_path, space, trials=1).lease_next()
        assert trial is not None
        tried.append(trial.params)
    assert tried[0] == tried[1] == tried[2]
    trials = open_trials(tmp_path, space, trials=1)
    assert trials.lease_next() is None
    (failed,) = trials.finished()
    assert failed.state == TrialState.FAIL
    assert get_reason(failed) == "its process was killed 3 times"


def test_grid_ends_with_its_points_after_a_loss(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("[space]\nprojector = ['linear', 'mlp']\nshared_width = [8, 16]")
    space = read_space(tmp_path / "space.toml")
    open_trials(tmp_path / "a", space, sampler="grid").lease_next()
    trials = open_trials(tmp_path / "a", space, sampler="grid", trials=50)
    assert trials.total == 4
    tried = run_all(trials)
    assert {(params["projector"], params["shared_width"]) for params in tried} == {
        (projector, width) for projector in ("linear", "mlp") for width in (8, 16)
    }
    assert len(tried) == 4


def test_rank_complete_lists_each_configuration_once(tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text("[space]\nprojector = ['linear', 'mlp']")
    trials = open_trials(tmp_path / "a", read_space(tmp_path / "space.toml"), trials=8)
    scores = [0.1, 0.5, 0.3, 0.5, 0.2, 0.4, 0.5, 0.1]
    for score in scores:
        trial = trials.lease_next()
        assert trial is not None
        trials.complete(trial, score, OUTCOME)
    first, second = rank_complete(trials.finished())
    assert (first.number, first.value) == (1, 0.5)
    others = [trial.value for trial in trials.finished() if trial.params == second.params]
    assert first.params != second.params
    assert second.value == max(value for value in others if value is not None)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: data[:40_000] + bytes(30_000) + data[70_000:],
    "kind of a range": lambda data: data.replace(b"CategoricalDistribution", b"CategoricbhDistribution", 1),
    "name of the study": lambda data: data.replace(b"sweep", b"sweeq", 1),
    "text": lambda data: data.replace(b"too wide", b"too wid\xff"),
}


def test_damaged_storage_is_one_line(tmp_path: Path, space: Space) -> None:
    trials = open_trials(tmp_path / "a", space, trials=3)
    for number in range(3):
        trial = trials.lease_next()
        assert trial is not None
        trial.report(0.1875, 1)
        if number == 0:
            trials.fail(trial, "too wide")
        else:
            trials.prune(trial) if number == 1 else trials.complete(trial, 0.5, OUTCOME)
    trials.close()
    storage = tmp_path / "a" / "study.db"
    data = storage.read_bytes()
    for name, damage in DAMAGES.items():
        damaged = damage(data)
        assert damaged != data, name
        storage.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"^[^\n]*; restore the storage, or use a new folder$"):
            open_trials(tmp_path / "a", space, trials=3).lease_next()
    storage.write_bytes(data)
    assert open_trials(tmp_path / "a", space, trials=3).lease_next() is None


def test_locked_storage_is_not_called_damaged(tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.sweep.trials._SQLITE_TIMEOUT_S", 0.01)
    open_trials(tmp_path / "a", space, trials=1).close()
    with closing(sqlite3.connect(tmp_path / "a" / "study.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(PathError, match="locked"):
            open_trials(tmp_path / "a", space, trials=1).lease_next()


def test_study_without_complete_trials_raises(tmp_path: Path, space: Space) -> None:
    trials = open_trials(tmp_path, space, trials=1)
    trial = trials.lease_next()
    assert trial is not None
    trials.fail(trial, "too few samples")
    with pytest.raises(SettingError, match="too few samples"):
        top_trials(trials, SweepSettings())


def test_storage_error_hides_the_password(tmp_path: Path, space: Space) -> None:
    for url in ("nonsense://user:secret@host/x", "sqlite:////nowhere/at/all/study.db"):
        with pytest.raises(PathError, match="cannot be opened: .*use a URL such as postgresql") as raised:
            open_trials(tmp_path, space, storage=url)
        assert "secret" not in str(raised.value)
    assert without_password("a://user:secret@host/x") == "a://user:***@host/x"
    assert without_password("sqlite:///study.db") == "sqlite:///study.db"


def test_pareto_front() -> None:
    points = [(5, 0.5), (1, 0.2), (1, 0.3), (2, 0.3), (9, 0.9), (7, 0.4)]
    assert pareto_front(points) == [(1, 0.3), (5, 0.5), (9, 0.9)]


def test_processes_together_open_one_study(cache_path: Path, tmp_path: Path, space: Space) -> None:
    data = open_data(cache_path, FEATURES["feature"], memory_bytes=10**9)
    settings = SweepSettings(storage="sqlite:///elsewhere.db")  # where a study is named by chance
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_study(tmp_path / "study", data, space, settings), range(8)))
    assert len({study.name for study in found}) == 1
    assert len(read_split(split_path(tmp_path / "study"), data.caches).rows("val")) == 30
