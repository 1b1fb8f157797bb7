"""Feature writers: what they read of the commits of their chunks, and the gate between decoding and models."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from embedcache.extract import feature_writer
from embedcache.extract.feature_writer import CpuGate
from embedcache.store import group
from tests.extract.cases import FEATURES, run
from tests.images import write_images


def test_commits_are_read_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read_commit = group.read_commit

    def count_read(folder: Path, chunk: int) -> Any:
        reads[f"{folder.parent.name}/{chunk}"] += 1
        return read_commit(folder, chunk)

    monkeypatch.setattr(group, "read_commit", count_read)
    source = write_images(tmp_path / "source", 24)
    run(source, tmp_path / "c", features=FEATURES, chunk_size=8)
    assert set(reads.values()) == {4}  # to list missing chunks, with the lease, to commit, and for the report
    reads.clear()
    run(source, tmp_path / "c", features=FEATURES)
    assert set(reads.values()) == {2}


def is_closed(gate: CpuGate) -> bool:
    """Return whether a thread that wants to decode has to wait."""
    return _waits(gate, 0.05)


def is_open(gate: CpuGate) -> bool:
    """Return whether a thread that wants to decode does not wait; on a busy machine, it takes a while to start."""
    return not _waits(gate, 20)


def _waits(gate: CpuGate, timeout_s: float) -> bool:
    thread = threading.Thread(target=gate.wait, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return thread.is_alive()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> CpuGate:
    monkeypatch.setattr(feature_writer, "num_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return CpuGate("cpu")


def test_gate_opens_after_the_last_model(gate: CpuGate) -> None:
    assert is_open(gate)
    with gate.inference():
        with gate.inference():
            assert is_closed(gate)
        assert is_closed(gate)
    assert is_open(gate)


def test_gate_opens_after_an_error(gate: CpuGate) -> None:
    with pytest.raises(ZeroDivisionError), gate.inference():
        raise ZeroDivisionError
    assert is_open(gate)


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
        assert (is_closed if closed else is_open)(gate)
