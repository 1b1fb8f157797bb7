"""The training loop with the smallest task: its clock, checkpoints, progress, learning rates, seeds and patience."""

import ctypes
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedcache.projectors.pair import AlignedPair
from embedcache.train import trainer
from embedcache.train.settings import MachineSettings, OptimizerSettings
from embedcache.train.trainer import Trainer, keep_freed_memory, learning_rate, make_optimizer, seeded
from tests.recorded import RecordedProgress
from tests.train.runs import log_lines

BATCHES = (3, 2, 2)
"""Samples of each batch."""


class Line(nn.Module):
    """The loss of a line: the mean square of what it maps a batch to."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, batch_B1: Tensor) -> Tensor:
        return self.line(batch_B1).square().mean()  # type: ignore[no-any-return]


class LineTask:
    """A task whose validation scores are given, one after another."""

    unit, forward_flops, parts = "points", 0.0, {"line": ["line"]}
    num_samples, num_steps, waited_s = sum(BATCHES), len(BATCHES), 1.23457

    def __init__(self, scores: Sequence[float]) -> None:
        self.objective = self.module = Line()
        self.loader, self._scores = self, iter(scores)

    def epoch(self, number: int, *, first_step: int) -> Iterator[Tensor]:
        yield from [torch.full((size, 1), 1.0 + number) for size in BATCHES][first_step:]

    def count(self, batch_B1: Tensor) -> int:
        return len(batch_B1)

    def measure(self) -> dict[str, float]:
        return {"score": next(self._scores)}

    def score(self, measures: Mapping[str, float]) -> float:
        return measures["score"]

    def watch(self) -> dict[str, float]:
        return {"slope": 2.0}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later each time that the loop reads it."""
    clock = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def make(
    path: Path, scores: Sequence[float], *, epochs: int = 2, patience: int | None = None, **options: Any
) -> Trainer:
    machine = {name: options.pop(name) for name in ("checkpoint_s", "precision") if name in options}
    return Trainer(
        task=LineTask(scores),  # type: ignore[arg-type]
        optimizer=OptimizerSettings(epochs=epochs, patience=patience, lr=0.5, warmup_fraction=0.5),
        machine=MachineSettings(device="cpu", **machine),
        seed=3,
        run_path=path,
        **{"progress": RecordedProgress(), **options},
    )


def test_log_progress_and_rates_of_a_run(tmp_path: Path, ticking: None) -> None:
    told: list[tuple[int, Mapping[str, float]]] = []
    progress = RecordedProgress()
    training = make(tmp_path, [0.1, 0.3, 0.2], progress=progress, on_epoch=lambda *values: told.append(values))
    result = training.fit()
    assert (result.best_epoch, result.measures) == (1, {"score": 0.3})
    assert (tmp_path / "last.safetensors").is_file()
    assert result.samples_per_s == 1.8  # 14 samples in twice 4 s: the clock is read before, and after each of 3 steps
    assert result.wait_fraction == 0.1543
    assert progress.started == [("training", 14, "points")]
    assert progress.advances == [3, 2, 2] * 2
    lines = log_lines(tmp_path)
    steps = [line for line in lines if "step" in line]
    rates = [learning_rate(training.optimizer, step, 6) for step in range(6)]
    assert [line["learning_rate"] for line in steps] == rates == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0.5, 0.375, 0.125])
    assert [(line["step"], line["epoch"], line["slope"]) for line in steps] == [(n, n // 3, 2.0) for n in range(6)]
    assert progress.states == {"training": f"epoch 2/2, loss {steps[-1]['loss']:.4g}, best epoch 1"}
    scores = [(number, {"score": score}) for number, score in enumerate((0.1, 0.3, 0.2))]
    assert told == scores == [(line["epoch"], line["validation"]) for line in lines if "validation" in line]


def test_progress_names_no_best_epoch_before_there_is_one(tmp_path: Path) -> None:
    training = make(tmp_path, [0.3, 0.2], epochs=1)
    assert training.fit().best_epoch == 0
    loss = log_lines(tmp_path)[-2]["loss"]
    assert training.progress.states == {"training": f"epoch 1/1, loss {loss:.4g}"}  # type: ignore[attr-defined]


def test_without_epochs_there_is_no_speed(tmp_path: Path) -> None:
    result = make(tmp_path, [0.3], epochs=0).fit()
    assert (result.samples_per_s, result.wait_fraction, result.measures) == (0.0, 0.0, {"score": 0.3})


@pytest.mark.parametrize(
    ("scores", "patience", "last"),
    [((0.1, 0.5, 0.2, 0.3, 0.9), 2, 3), ((0.5, 0.2, 0.9, 0.1, 0.1), 2, 4), ((0.5, 0.2), 1, 1), ((0.5,) * 5, None, 4)],
)
def test_training_stops_after_epochs_without_a_better_score(
    tmp_path: Path, scores: Sequence[float], patience: int | None, last: int
) -> None:
    make(tmp_path, scores, epochs=4, patience=patience).fit()
    assert log_lines(tmp_path)[-1]["epoch"] == last


def test_checkpoints_are_seconds_apart(tmp_path: Path, ticking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Mapping[str, Any]] = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, device, state: states.append(state))
    make(tmp_path, [0.1] * 3, checkpoint_s=3.0).fit()
    assert [(state["step"], state["epoch"], state["pairs"]) for state in states] == [(2, 0, 5), (4, 1, 10)]


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
    keys = {"objective", "optimizer", "best", "step", "epoch", "pairs", "log_bytes", "run_id", "scaler"}
    assert states[-1].keys() == keys
    again = make(tmp_path, [0.2], **options)
    assert again.fit().best_epoch == 1
    progress: RecordedProgress = again.progress  # type: ignore[assignment]
    assert progress.notes == ["resumed from the checkpoint after step 4"]
    assert progress.started == [("training", 4, "points")]
    assert progress.advances == [2, 2]
    assert [state["pairs"] for state in states] == [3, 5, 7, 10, 12, 14]
    assert len({state["run_id"] for state in states}) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_average_their_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    wrapped: list[nn.Module] = []
    monkeypatch.setattr(trainer, "num_processes", lambda: processes)
    monkeypatch.setattr(trainer, "DistributedDataParallel", lambda module: wrapped.append(module) or module)
    training = make(tmp_path, [0.1, 0.2], epochs=1)
    training.fit()
    assert wrapped == [training.task.objective] * (processes - 1)


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


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    for library in (SimpleNamespace(mallopt=lambda *values: calls.append(values)), SimpleNamespace()):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: library)
        keep_freed_memory()
    assert calls == [
        (-3, 1_073_741_824),
        (-1, 2_147_483_647),
    ]  # thresholds of mmap and of trimming, in glibc's malloc.h
