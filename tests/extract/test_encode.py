"""Encoders as a producer: what they read of the commits of their chunks."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from embedcache.extract import encode
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


@pytest.mark.parametrize(
    ("device", "count", "threads", "cores", "waits"),
    [
        ("cpu", 2, 2, 2, True),
        ("cuda:0", 2, 2, 2, False),
        ("cpu", 64, 64, 64, False),
        ("cpu", 2, 1, 2, False),  # OMP_NUM_THREADS=1
        ("cpu", 2, 1, 1, True),  # one of two worker processes
        ("cpu", 4, 8, 4, True),  # a container with a quota of 4 cores
    ],
)
def test_decoding_waits_for_models_that_use_all_cores(
    device: str, count: int, threads: int, cores: int, *, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "num_cores", lambda: count)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    gate = encode.open_gate(device, cores)
    with gate:
        assert hasattr(gate, "locked") == waits
