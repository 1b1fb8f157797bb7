"""The gate between decoding and models on few cores."""

import threading

import pytest
import torch

from embedcache.extract import feature_writer
from embedcache.extract.feature_writer import CpuGate


def is_closed(gate: CpuGate) -> bool:
    """Return whether a thread that wants to decode has to wait."""
    thread = threading.Thread(target=gate.wait, daemon=True)
    thread.start()
    thread.join(0.05)
    return thread.is_alive()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> CpuGate:
    monkeypatch.setattr(feature_writer, "num_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return CpuGate("cpu")


def test_gate_opens_after_the_last_model(gate: CpuGate) -> None:
    assert not is_closed(gate)
    with gate.inference():
        with gate.inference():
            assert is_closed(gate)
        assert is_closed(gate)
    assert not is_closed(gate)


def test_gate_opens_after_an_error(gate: CpuGate) -> None:
    with pytest.raises(ZeroDivisionError), gate.inference():
        raise ZeroDivisionError
    assert not is_closed(gate)


@pytest.mark.parametrize(
    ("device", "count", "threads", "cores", "closed"),
    [
        ("cuda:0", 2, 2, None, False),
        ("cpu", 64, 64, None, False),
        ("cpu", 2, 1, None, False),  # OMP_NUM_THREADS=1
        ("cpu", 2, 1, 1, True),  # one of two worker processes
        ("cpu", 4, 8, None, True),  # a container with a quota of 4 cores
    ],
)
def test_gate_stays_open_with_idle_cores(
    device: str, count: int, threads: int, cores: int | None, *, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_writer, "num_cores", lambda: count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    gate = CpuGate(device, cores=cores)
    with gate.inference():
        assert is_closed(gate) == closed
