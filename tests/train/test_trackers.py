"""Trackers: what they are told, what happens when they fail, and each library for real, without a network."""

import json
import logging
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import DataError, MissingExtraError, SettingError, UnknownNameError
from embedcache.train.trackers import TrackedRun, Trackers, check_trackers
from tests.train.runs import log_lines, run

NOTES: list[Any] = []
"""What `Notebook` was told, in order."""


class Notebook:
    """A tracker that remembers."""

    def __init__(self, run: TrackedRun) -> None:
        NOTES.append(run)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        NOTES.append((step, dict(scalars)))

    def finish(self, *, failed: bool) -> None:
        NOTES.append(failed)


class Broken(Notebook):
    """A tracker whose server goes away."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        raise ConnectionError("the server\nis gone")


def refuse(run: TrackedRun) -> None:
    """Stand for a tracker that cannot start."""
    raise RuntimeError("no key")


@pytest.fixture
def notes() -> Iterator[list[Any]]:
    """Return what `Notebook` was told in this test."""
    NOTES.clear()
    yield NOTES
    NOTES.clear()


OWN = ("tests.train.test_trackers:Notebook",)


def test_tracker_gets_what_the_log_has(cache_path: Path, tmp_path: Path, notes: list[Any]) -> None:
    run(cache_path, tmp_path / "run", report_to=OWN)
    first, *told, failed = notes
    assert (first.path, first.first_step, failed) == (tmp_path / "run", 0, False)
    assert first.config["training"] == json.loads((tmp_path / "run/config.json").read_text())["training"]
    logged = [line.get("validation") or {**line} for line in log_lines(tmp_path / "run")]
    assert [scalars for _, scalars in told] == [
        {name: value for name, value in line.items() if name != "step"} for line in logged
    ]
    steps = [step for step, _ in told]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_resumed_run_keeps_its_id(
    cache_path: Path, tmp_path: Path, notes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"report_to": OWN, "checkpoint_s": 0.0}

    def log_then_die(self: Notebook, step: int, scalars: Mapping[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt
        NOTES.append((step, dict(scalars)))

    with monkeypatch.context() as patch:
        patch.setattr(Notebook, "log", log_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(cache_path, tmp_path / "run", **options)
    assert notes[-1] is True  # failed
    interrupted = len(notes)
    run(cache_path, tmp_path / "run", **options)
    first, second = notes[0], notes[interrupted]
    assert (second.id, second.first_step) == (first.id, 4)
    assert notes[interrupted + 1][0] == 4
    run(cache_path, tmp_path / "other", **options)
    assert len({note.id for note in notes if isinstance(note, TrackedRun)}) == 2


def test_failing_tracker_does_not_end_the_training(
    cache_path: Path, tmp_path: Path, notes: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="embedcache"):
        run(cache_path, tmp_path / "run", report_to=("tests.train.test_trackers:Broken", *OWN), epochs=1)
    assert [record.getMessage() for record in caplog.records] == [
        "tests.train.test_trackers:Broken stopped recording: the server is gone; losses.jsonl has all values"
    ]
    assert notes[-1] is False  # the other one was told everything
    assert (tmp_path / "run/config.json").is_file()


def test_error_of_a_run_reaches_the_tracker(cache_path: Path, tmp_path: Path, notes: list[Any]) -> None:
    with pytest.raises(DataError):
        run(cache_path, tmp_path / "run", report_to=OWN, lr=1e30, epochs=5)
    assert notes[-1] is True


def test_tracker_that_cannot_start_is_one_error(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no key"):
        run(cache_path, tmp_path / "run", report_to=("tests.train.test_trackers:refuse",))
    with pytest.raises(UnknownNameError, match="tensorbord"):
        run(cache_path, tmp_path / "other", report_to=("tensorbord",))
    assert not (tmp_path / "other").exists()


def test_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install wandb"):
        check_trackers(["wandb"])


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
    config = {"training": {"optimizer": {"lr": 0.001}, "selection": None}}
    for first_step in (0, 2):  # the second resumes the first
        time.sleep(first_step / 2)  # wandb names a folder by the second
        run = TrackedRun(path=Path("run"), id="0123456789abcdef" * 2, first_step=first_step, config=config)
        trackers = Trackers([library], run)
        for step in range(first_step, first_step + 2):
            trackers.log(step, {"loss": 1 / (step + 1), "i2t r@1": 0.25})
        trackers.finish(failed=first_step == 0)
    for name, expected in (("loss", [1, 1 / 2, 1 / 3, 1 / 4]), ("i2t r@1", [0.25] * 4)):
        steps, values = zip(*read_whole(read, tmp_path, name, 4), strict=True)
        assert steps == (0, 1, 2, 3)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert capsys.readouterr().out == ""
