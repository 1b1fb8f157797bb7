"""The training loop: the smallest task, any task, its processes, threads, rates, bad losses, and trackers."""

import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from embedcache import processes
from embedcache.dataset.inputs import open_input
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.projectors.pair import AlignedPair
from embedcache.reports.summary import summarize
from embedcache.runs import CHECKPOINT, Run
from embedcache.settings import from_flat
from embedcache.store.cache import Cache
from embedcache.train import distributed, trainer
from embedcache.train.batches import Batch, BatchInput
from embedcache.train.settings import FitSettings, OptimizerSettings
from embedcache.train.train import TrainReport
from embedcache.train.trainer import RunLog, Trainer, learning_rate, make_optimizer, seeded
from tests.recorded import RecordedProgress
from tests.train.places import FEATURE, read_places, train_places
from tests.train.runs import interrupted_after, log_lines, run

BATCHES = (3, 2, 2)
"""Samples of each batch."""


class Line(nn.Module):
    """The loss of a line: the mean square of what it maps a batch to."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def scalars(self) -> dict[str, float]:
        return {"slope": 2.0}

    def loss(self, batch: Batch) -> Tensor:
        return self.line(batch.inputs["x"].values).square().mean()  # type: ignore[no-any-return]


class LineTask:
    """A task whose validation scores are given, one after another."""

    num_steps = len(BATCHES)
    keys = "abcdefg"

    def __init__(self, scores: Sequence[float], *, value: float = 1.0) -> None:
        self.module = Line()
        self._scores, self._value = iter(scores), value

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        for size in BATCHES[first_step:]:
            values = torch.full((size, 1), self._value + epoch)
            yield Batch(samples=np.arange(size), num_samples=size, inputs={"x": BatchInput(values)})

    def measure(self) -> dict[str, float]:
        score = next(self._scores)
        return {"accuracy": score, "score": score}


def make(path: Path, scores: Sequence[float], *, task: LineTask | None = None, **options: Any) -> Trainer:
    given = {name: options.pop(name) for name in ("progress", "on_epoch") if name in options}
    options = {"epochs": 2, "lr": 0.5, "warmup_fraction": 0.5, "seed": 3, "device": "cpu", **options}
    settings = from_flat(FitSettings, options)
    task = task or LineTask(scores)
    return Trainer(task=task, settings=settings, run_path=path, **{"progress": RecordedProgress(), **given})


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later each time that the loop reads it."""
    clock = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def test_log_progress_and_rates_of_a_run(tmp_path: Path, ticking: None) -> None:
    told: list[tuple[int, float]] = []
    progress = RecordedProgress()
    training = make(tmp_path, [0.1, 0.3, 0.2], progress=progress, on_epoch=lambda *values: told.append(values))
    result = training.fit()
    assert (result.best_epoch, result.score, result.measures) == (1, 0.3, {"accuracy": 0.3})
    assert result.samples_per_s > 0
    assert (tmp_path / "last.safetensors").is_file()
    assert progress.started == [("training", 6, "steps")]
    assert progress.advances == [1] * 6
    lines = log_lines(tmp_path)
    steps = [line for line in lines if "step" in line]
    rates = [learning_rate(training.settings.optimizer, step, 6) for step in range(6)]
    assert [line["learning_rate"] for line in steps] == rates == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0.5, 0.375, 0.125])
    assert [(line["step"], line["epoch"], line["slope"]) for line in steps] == [(n, n // 3, 2.0) for n in range(6)]
    assert told == [(0, 0.1), (1, 0.3), (2, 0.2)]
    assert [line["validation"]["accuracy"] for line in lines if "validation" in line] == [0.1, 0.3, 0.2]


@pytest.mark.parametrize(
    ("scores", "patience", "best", "last"),
    [
        ((0.1, 0.5, 0.2, 0.3, 0.9), 2, 1, 3),
        ((0.5, 0.2, 0.9, 0.1, 0.1), 2, 2, 4),
        ((0.5, 0.2), 1, 0, 1),
        ((0.5,) * 5, None, 0, 4),  # the first of equal scores
        ((float("nan"),) * 5, None, 4, 4),  # nothing can be compared
    ],
)
def test_best_epoch_and_patience(
    tmp_path: Path, scores: Sequence[float], patience: int | None, best: int, last: int
) -> None:
    training = make(tmp_path, scores, epochs=4, patience=patience)
    found: list[Tensor] = []
    weight = training.task.module.line.weight  # type: ignore[union-attr]
    training.on_epoch = lambda *_: found.append(weight.detach().clone())
    result = training.fit()
    assert (result.best_epoch, log_lines(tmp_path)[-1]["epoch"]) == (best, last)
    assert torch.equal(weight, found[best])
    assert (result.score is None) == np.isnan(scores[0])


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_run_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    states: list[Mapping[str, Any]] = []
    save = trainer.save_checkpoint

    def save_and_stop(path: Path, device: str, state: Mapping[str, Any]) -> None:
        save(path, device, state)
        states.append(state)
        if len(states) == 4:
            raise InterruptedError

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_stop)
    options: dict[str, Any] = {"checkpoint_s": 0.0, "precision": precision}
    with pytest.raises(InterruptedError):
        make(tmp_path, [0.1, 0.3], **options).fit()
    again = make(tmp_path, [0.2], **options)
    assert again.fit().best_epoch == 1
    progress: RecordedProgress = again.progress  # type: ignore[assignment]
    assert progress.notes == ["resumed from the checkpoint after step 4"]
    assert progress.started == [("training", 2, "steps")]
    assert len({state["loop"]["run_id"] for state in states}) == 1


def test_checkpoints_are_seconds_apart(tmp_path: Path, ticking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, device, state: steps.append(state["loop"]["step"]))
    make(tmp_path, [0.1] * 3, checkpoint_s=2.0).fit()
    assert 1 < len(steps) < 6


@pytest.mark.parametrize(("value", "word"), [(1e30, "samples a, b, c …"), (np.inf, "x feature holds NaN")])
def test_bad_loss_names_step_and_samples_or_feature(tmp_path: Path, value: float, word: str) -> None:
    with pytest.raises(DataError, match=f"at step 0.*{word}"):
        make(tmp_path, [0.1], task=LineTask([0.1], value=value)).fit()


@pytest.mark.parametrize(
    ("threads", "small", "chosen", "expected"),
    [(None, 1e3, 8, 1), (None, 0.0, 8, 8), (3, 1e3, 8, 3), (None, 1e3, 5, 5)],
)
def test_small_steps_use_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, small: float, chosen: int, expected: int
) -> None:
    """Check on a machine of eight cores, unless the settings or the caller of torch have chosen a number."""
    used = [chosen]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(processes, "SMALL_FLOPS", small)
    make(tmp_path, [0.1, 0.2], epochs=1, threads=threads).fit()
    assert used[-1] == chosen  # as it was before
    assert used[-2 if len(used) > 2 else -1] == expected


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_average_their_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    wrapped: list[nn.Module] = []
    monkeypatch.setattr(trainer, "num_processes", lambda: processes)
    monkeypatch.setattr(trainer, "DistributedDataParallel", lambda module: wrapped.append(module) or module)
    training = make(tmp_path, [0.1, 0.2], epochs=1)
    training.fit()
    assert [loss.module for loss in wrapped] == [training.task.module] * (processes - 1)


def test_each_process_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    for rank, expected in ((0, 7), (2, 2_000_013)):
        monkeypatch.setattr(trainer, "process_rank", lambda rank=rank: rank)
        with seeded(7, "cpu"):
            assert torch.initial_seed() == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_only_matrices_decay() -> None:
    pair = AlignedPair("mlp", widths={"image": 8, "text": 6}, shared_width=4)
    optimizer = make_optimizer(pair, OptimizerSettings(weight_decay=0.3))
    decayed, others = ([id(parameter) for parameter in group["params"]] for group in optimizer.param_groups)
    assert decayed == [id(parameter) for parameter in pair.parameters() if parameter.ndim > 1]
    assert others == [id(parameter) for parameter in pair.parameters() if parameter.ndim < 2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = OptimizerSettings(lr=2.0, warmup_fraction=0.25)
    rates = [learning_rate(settings, step, 12) for step in range(12)]
    expected = [2 * (step + 1) / 3 for step in range(3)]
    expected += [1 + np.cos(np.pi * step / 9) for step in range(9)]
    assert rates == pytest.approx(expected)
    assert learning_rate(OptimizerSettings(lr=2.0, warmup_fraction=0), 0, 1) == 2
    assert learning_rate(OptimizerSettings(lr=2.0, warmup_fraction=1), 3, 4) == 2


def test_report_warns_of_a_useless_training_and_of_held_out_samples(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "reused": False,
        "num_samples": {"train": 1000, "val": 20},
        "num_parameters": 5000,
        "best_epoch": 2,
        "score": 0.25,
        "measures": {"i2t r@1": 0.25},
        "samples_per_s": 9.0,
    }
    warned = ({"num_held_out": 1234}, {"best_epoch": 0})
    silent = ({}, {"num_held_out": 0}, {"best_epoch": 0, "samples_per_s": 0.0})
    for changed in (*warned, *silent):
        report = TrainReport(**{**values, **changed})
        assert ("WARNING" in report.line(tmp_path)) == (changed in warned)
        assert TrainReport.model_validate(report.to_json()) == report


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of a single process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_group_of_one_process_changes_nothing(one_process: None) -> None:
    rows = torch.randn(5, 3, requires_grad=True)
    gathered = distributed.gather_rows(rows, 5)
    assert torch.equal(gathered, rows)
    (gathered * torch.arange(15.0).reshape(5, 3)).sum().backward()
    assert torch.equal(rows.grad, torch.arange(15.0).reshape(5, 3))  # type: ignore[arg-type]
    logs = torch.tensor([0.5, -30.0, 100.0])
    torch.testing.assert_close(distributed.log_sum_over_processes(logs), logs)
    assert distributed.broadcast_from_first("x") == "x"
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.run_on_first(lambda: 3) == 3
    with distributed.process_group("cpu") as device:
        assert device == "cpu"
    assert dist.is_initialized()  # it was there before

    def fail() -> None:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        distributed.run_on_first(fail)


@pytest.mark.parametrize(("count", "processes"), list(itertools.product((0, 1, 7, 12), (1, 2, 3, 5))))
def test_slices_of_processes_are_consecutive_and_of_one_size(
    monkeypatch: pytest.MonkeyPatch, count: int, processes: int
) -> None:
    monkeypatch.setattr(distributed, "num_processes", lambda: processes)
    slices = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "process_rank", lambda rank=rank: rank)
        slices.append(distributed.own_slice(count))
    assert [row for part in slices for row in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) <= 1


SAME = ("model.safetensors", "last.safetensors", "losses.jsonl")


def fit(cache_path: Path, run_path: Path, **options: Any) -> TrainReport:
    scale = options.pop("scale", 1.0)
    return train_places(cache_path, run_path, from_flat(FitSettings, {"epochs": 3, "lr": 0.01, **options}), scale=scale)


@pytest.fixture(scope="module")
def finished(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    path = tmp_path_factory.mktemp("places") / "run"
    fit(cache_path, path, epochs=25, seed=1)
    return path


def test_second_task_learns(cache_path: Path, finished: Path) -> None:
    run = Run.open(finished)
    feature = open_input(Cache(cache_path), "image", FEATURE)
    rows = np.arange(0, 300, 5)
    with torch.inference_mode():
        scores = run.module(torch.from_numpy(feature.read(rows).values))
    accuracy = float((scores.argmax(dim=1).numpy() == read_places(cache_path)[rows]).mean())
    assert accuracy == pytest.approx(run.info.report["measures"]["accuracy"])
    assert accuracy > 0.45  # chance is 0.25, with a standard error of 0.06
    assert run.input("image").feature == FEATURE
    assert summarize(finished).sections[0].table[1] == [["image", FEATURE, "3", "tests.toy:open_toy"]]
    assert fit(cache_path, finished, epochs=25, seed=1).reused
    with pytest.raises(FingerprintError, match=r"settings\.optimizer\.lr: stored 0.01, requested 0.1"):
        fit(cache_path, finished, epochs=25, seed=1, lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_resume_of_any_task_is_identical(cache_path: Path, tmp_path: Path, num_steps: int) -> None:
    options = {"checkpoint_s": 0, "batch_size": 60, "precision": "bfloat16"}
    with interrupted_after(num_steps), pytest.raises(InterruptedError):
        fit(cache_path, tmp_path / "run", **options)
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    torch.manual_seed(99)
    fit(cache_path, tmp_path / "run", **options)
    fit(cache_path, tmp_path / "whole", **options)
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_bad_loss_is_one_error(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at step 0, the image feature holds NaN"):
        fit(cache_path, tmp_path / "bad", scale=float("nan"))


@pytest.mark.parametrize(("trainable", "frozen"), [("head", "body."), ("body", "head.")])
def test_frozen_part_is_equal_to_the_bit(
    cache_path: Path, finished: Path, tmp_path: Path, trainable: str, frozen: str
) -> None:
    report = fit(cache_path, tmp_path / "run", init_from=(str(finished),), trainable=trainable, seed=2)
    after, start = load_file(tmp_path / "run/last.safetensors"), load_file(finished / "model.safetensors")
    assert {"body.0.running_mean", "body.0.num_batches_tracked", "head.bias"} < after.keys()
    for name, value in after.items():
        assert torch.equal(value, start[name]) == name.startswith(frozen), name
    run = Run.open(tmp_path / "run")
    trained = [value.numel() for name, value in run.module.named_parameters() if frozen not in name]
    assert report.num_parameters == sum(trained)
    assert run.info.digests == {"init_from *": Run.open(finished).info.weights}
    assert f"trained parts: {trainable}" in summarize(tmp_path / "run").lines[1]


def test_one_part_starts_from_a_run(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    fit(cache_path, tmp_path / "run", init_from=(f"body={finished}",), epochs=0, seed=3)
    found, start = load_file(tmp_path / "run/model.safetensors"), load_file(finished / "model.safetensors")
    assert {name for name in found if torch.equal(found[name], start[name])} == {
        name for name in start if name.startswith("body.")
    }


def test_start_run_is_whole_or_refused(cache_path: Path, finished: Path, run_path: Path, tmp_path: Path) -> None:
    for words, error, word in (
        ((str(run_path),), DataError, "part body"),  # a pair
        ((f"neck={finished}",), UnknownNameError, "neck"),
        ((str(finished), str(finished)), SettingError, "one run"),
        ((str(tmp_path / "nothing"),), PathError, "nothing does not exist"),
    ):
        with pytest.raises(error, match=word):
            fit(cache_path, tmp_path / "run", init_from=words)
    with pytest.raises(UnknownNameError, match="neck"):
        fit(cache_path, tmp_path / "run", trainable="head+neck")


def test_changed_start_run_is_another_run(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    fit(cache_path, tmp_path / "first", seed=5, epochs=0)
    fit(cache_path, tmp_path / "run", init_from=(str(tmp_path / "first"),), epochs=1)
    weights = tmp_path / "first/model.safetensors"
    weights.write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(CorruptError, match=r"model\.safetensors: expected checksum"):
        fit(cache_path, tmp_path / "other", init_from=(str(tmp_path / "first"),), epochs=1)
    (tmp_path / "first/run.json").write_bytes((finished / "run.json").read_bytes())
    with pytest.raises(FingerprintError, match=r"digests\.init_from \*"):
        fit(cache_path, tmp_path / "run", init_from=(str(tmp_path / "first"),), epochs=1)
    assert log_lines(tmp_path / "run")


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
