"""Trackers: each library for real, without a network."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import SettingError, UnknownNameError
from embedcache.train.trainer import RunLog
from tests.train.runs import interrupted_after, log_lines, run


def read_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def read_wandb(folder: Path, name: str) -> list[tuple[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 7  # after the header; then checksum, length, kind and bytes of each record
        while place + 7 <= len(data):
            length, kind = struct.unpack_from("<HB", data, place + 4)
            if place + 7 + length > len(data):
                break  # is being written
            assert kind == 1  # whole: the file is smaller than a block
            record = Record.FromString(data[place + 7 : place + 7 + length])
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if name in values:
                found.append((values["_step"], values[name]))
            place += 7 + length
    return found


def read_whole(
    read: Callable[[Path, str], list[tuple[int, float]]], folder: Path, name: str, count: int
) -> list[tuple[int, float]]:
    """Read until there are so many values, for some seconds: the process of wandb writes its file when it can."""
    deadline = time.monotonic() + 20
    while len(found := read(folder, name)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.no_mutants
@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize(("library", "read"), [("tensorboard", read_tensorboard), ("wandb", read_wandb)])
def test_resumed_run_is_tracked_without_a_network(
    library: str,
    read: Callable[[Path, str], list[tuple[int, float]]],
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip(library)
    options = {"report_to": (library,), "checkpoint_s": 0}
    with interrupted_after(3), pytest.raises(InterruptedError):
        run(cache_path, tmp_path / "run", **options)
    time.sleep(1)  # wandb names a folder by the second
    run(cache_path, tmp_path / "run", **options)
    steps, losses = zip(
        *((line["step"], line["loss"]) for line in log_lines(tmp_path / "run") if "loss" in line), strict=True
    )
    found = read_whole(read, tmp_path, "loss", len(losses))
    assert tuple(step for step, _ in found) == steps
    np.testing.assert_allclose([value for _, value in found], losses, rtol=1e-6)
    assert capsys.readouterr().out == ""
    assert run(cache_path, tmp_path / "run").reused  # where a run is reported is not one of its settings


def test_tracker_that_cannot_start_is_one_error(cache_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()
    with pytest.raises(SettingError, match="tensorboard cannot start"):
        RunLog(tmp_path, num_bytes=0, step=0, report_to=["tensorboard"])
    with pytest.raises(UnknownNameError, match="tensorbord"):
        run(cache_path, tmp_path / "other", report_to=("tensorbord",))
    assert not (tmp_path / "other").exists()
