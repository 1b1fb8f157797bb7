import threading

import pytest

from embedcache.extract import outputs as stage
from embedcache.extract.outputs import Turns
from embedcache.processes import num_cores


def waits(turns: Turns) -> bool:
    """Say whether one who decodes has to wait."""
    thread = threading.Thread(target=turns.wait, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread.is_alive()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "num_cores", lambda: 2)


@pytest.mark.usefixtures("few")
def test_decoding_waits_until_the_last_model_is_done() -> None:
    turns = Turns("cpu")
    assert not waits(turns)
    with turns.model():
        with turns.model():
            assert waits(turns)
        assert waits(turns)
    assert not waits(turns)


@pytest.mark.usefixtures("few")
def test_a_model_that_fails_leaves_the_cores() -> None:
    turns = Turns("cpu")
    with pytest.raises(ZeroDivisionError), turns.model():
        raise ZeroDivisionError
    assert not waits(turns)


@pytest.mark.parametrize(("device", "count"), [("cuda:0", 2), ("cpu", 64)])
def test_nobody_waits_where_cores_are_idle(device: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "num_cores", lambda: count)
    turns = Turns(device)
    with turns.model():
        assert not waits(turns)


def test_there_is_a_core() -> None:
    assert num_cores() >= 1
