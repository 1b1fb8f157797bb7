"""Trackers: what happens when one fails, and each library for real, without a network."""

import json
import logging
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import SettingError, UnknownNameError
from embedcache.train.trackers import Trackers
from tests.train.runs import log_lines, run


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
def test_library_records_without_a_network(
    library: str,
    read: Callable[[Path, str], list[tuple[int, float]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip(library)
    config = {"optimizer": {"lr": 0.001}, "selection": None}
    for first_step in (0, 2):  # the second resumes the first
        time.sleep(first_step / 2)  # wandb names a folder by the second
        trackers = Trackers([library], Path("run"), run_id="01" * 16, first_step=first_step, config=config)
        for step in range(first_step, first_step + 2):
            trackers.log(step, {"loss": 1 / (step + 1), "i2t r@1": 0.25})
        trackers.finish(failed=first_step == 0)
    for name, expected in (("loss", [1, 1 / 2, 1 / 3, 1 / 4]), ("i2t r@1", [0.25] * 4)):
        steps, values = zip(*read_whole(read, tmp_path, name, 4), strict=True)
        assert steps == (0, 1, 2, 3)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library
def test_run_is_tracked(cache_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(cache_path, tmp_path / "run", report_to=("tensorboard",))
    losses = [(line["step"], line["loss"]) for line in log_lines(tmp_path / "run") if "loss" in line]
    found = read_tensorboard(tmp_path, "loss")
    assert [step for step, _ in found] == [step for step, _ in losses]
    np.testing.assert_allclose([value for _, value in found], [value for _, value in losses], rtol=1e-6)
    assert run(cache_path, tmp_path / "run").reused  # where a run is reported is not one of its settings


def test_failing_tracker_is_dropped_or_one_error(
    cache_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    trackers = Trackers(["tensorboard"], tmp_path, run_id="0", first_step=0, config={})
    with caplog.at_level(logging.WARNING, logger="embedcache"):
        trackers.log(0, {"loss": "many"})  # type: ignore[dict-item]
    assert "tensorboard stopped recording" in caplog.text
    trackers.finish(failed=False)
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="tensorboard cannot start"):
        Trackers(["tensorboard"], tmp_path / "file", run_id="0", first_step=0, config={})
    with pytest.raises(UnknownNameError, match="tensorbord"):
        run(cache_path, tmp_path / "other", report_to=("tensorbord",))
    assert not (tmp_path / "other").exists()
