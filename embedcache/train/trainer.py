"""The training loop of any task: AdamW with linear warm-up and cosine decay to zero, checkpoints and validation.

A `Task` is what the loop trains: a module, its loss, its batches and its validation, such as
`embedcache.train.pair.PairTask`; a task of your own is any object with its attributes and methods.
"""

import copy
import ctypes
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedcache.devices import announce_device
from embedcache.errors import DataError, EmbedcacheError
from embedcache.progress import Progress
from embedcache.projectors.saved import save_weights
from embedcache.train.checkpoint import RunLog, load_checkpoint, save_checkpoint
from embedcache.train.distributed import broadcast_from_first, num_processes, process_rank, run_on_first
from embedcache.train.parts import freeze
from embedcache.train.settings import MachineSettings, OptimizerSettings

OnEpoch: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Called with the epoch and its validation metrics; an exception that it raises ends the training."""

_GENERATORS = threading.RLock()
_SMALL_STEP_FLOPS = 2e10
"""Below this, threads mostly wait for each other: two were 5 times slower than one on busy cores."""


class TaskLoader(Protocol):
    """The batches of a task. `embedcache.train.batches.Loader` reads them ahead.

    Which items a batch holds must depend on nothing but the number of the epoch, or a resumed run would differ.
    """

    num_samples: int
    """Training samples per epoch."""
    num_steps: int
    """Batches per epoch."""
    waited_s: float
    """Seconds that the training loop has waited for batches."""

    def epoch(self, number: int, *, first_step: int) -> Iterator[Any]:
        """Iterate over the batches of one epoch, from a step on; under torchrun over this process's part of each."""
        ...


class Task(Protocol):
    """What `Trainer` trains. Attributes may be properties; `objective` is first read under the seed of the run."""

    @property
    def module(self) -> nn.Module:
        """The module whose weights are saved; after training it has those of the best epoch."""
        ...

    @property
    def objective(self) -> nn.Module:
        """A module that contains `module` and maps a batch to its loss, a scalar; all its parameters are trained.

        Under torchrun `DistributedDataParallel` wraps it, which averages gradients over the processes.
        """
        ...

    @property
    def loader(self) -> TaskLoader:
        """The training batches."""
        ...

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Name of a part -> names of its submodules and parameters in `module`, for `init_from` and `trainable`."""
        ...

    @property
    def unit(self) -> str:
        """What a sample is called in progress messages, in the plural."""
        ...

    @property
    def forward_flops(self) -> float:
        """Operations of a forward pass of one batch: below 7e9 a step runs on one thread."""
        ...

    def count(self, batch: Any) -> int:
        """Return the number of samples of a batch, over all processes."""
        ...

    def measure(self) -> Mapping[str, float]:
        """Compute the validation metrics with `module` in evaluation mode; called on the first process only."""
        ...

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the number by which epochs are compared; a higher one is better. If all are NaN, the last is kept."""
        ...

    def watch(self) -> Mapping[str, float]:
        """Return values to log with each step, such as a temperature; may be empty."""
        ...

    def explain(self, batch: Any, *, loss: float, step: int) -> EmbedcacheError:
        """Return the error to raise for a loss that is NaN or infinite; it should name the samples of the batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Result of the training loop.

    Args:
        best_epoch: epoch whose weights the module has; 0 is the initialization.
        measures: validation metrics of that epoch.
        samples_per_s: training samples per second, since training started or resumed.
        wait_fraction: fraction of the training time spent waiting for data.
    """

    best_epoch: int
    measures: dict[str, float]
    samples_per_s: float
    wait_fraction: float


@dataclass(kw_only=True)
class Trainer:
    """The training loop of a task, whose module changes in place.

    Deterministic for a seed on one kind of device, also where training resumes from a checkpoint: to the bit.

    The run folder gets `losses.jsonl`, checkpoints and, at the end, the last weights. Of the task's parts only
    `trainable` change, None: all; the others keep their buffers too.
    """

    task: Task
    optimizer: OptimizerSettings
    machine: MachineSettings
    seed: int
    run_path: Path
    progress: Progress
    trainable: Sequence[str] | None = None
    on_epoch: OnEpoch | None = None

    def __post_init__(self) -> None:
        self._best, self._run_id = _BestWeights(), uuid.uuid4().hex
        self._step = self._epoch = 0  # those that come next
        self._num_resumed = self._num_samples = 0  # samples trained on up to the checkpoint, and since
        self._log_bytes = 0
        self._last_checkpoint = time.perf_counter()

    def fit(self) -> FitResult:
        """Train to the end; the module then has the weights of its best validation score, or its initialization.

        Raises:
            DataError: the loss is NaN or infinite; the message names the step and is that of `Task.explain`. Or the
                module cannot be measured, such as after the last step of an epoch was too large.
            CorruptError: the checkpoint cannot be read.
        """
        keep_freed_memory()
        announce_device(self.machine.device)
        with seeded(self.seed, self.machine.device), _threads(self.task.forward_flops, self.machine):
            self._objective = self.task.objective.to(self.machine.device)
            parts = self.task.parts
            self._frozen = freeze(self.task.module, parts, parts if self.trainable is None else self.trainable)
            self._adamw = make_optimizer(self._objective, self.optimizer)
            device_type = torch.device(self.machine.device).type
            self._scaler = torch.amp.GradScaler(device_type, enabled=self.machine.precision == "float16")
            self._resume()
            seconds = self._train()
        if process_rank() == 0:
            save_weights(self.run_path / "last.safetensors", self.task.module)
        self.task.module.load_state_dict(self._best.weights)
        return FitResult(
            best_epoch=self._best.epoch,
            measures=self._best.measures,
            samples_per_s=round(self._num_samples / seconds, 1) if self._num_samples else 0.0,
            wait_fraction=round(self.task.loader.waited_s / seconds, 4) if self._num_samples else 0.0,
        )

    def _train(self) -> float:
        """Run all epochs and return the seconds of training, without validation."""
        total = self.optimizer.epochs * self.task.loader.num_samples
        self.progress.start("training", total - self._num_resumed, self.task.unit)
        self._log = RunLog(
            self.run_path,
            num_bytes=self._log_bytes,
            step=self._step,
            report_to=self.machine.report_to,
            run_id=self._run_id,
        )
        with self._log:
            if not self._best.weights:
                self._validate()
            trained = DistributedDataParallel(self._objective) if num_processes() > 1 else self._objective
            seconds = 0.0
            while not self._is_finished():
                started = time.perf_counter()
                self._train_epoch(trained)
                seconds += time.perf_counter() - started
                self._epoch += 1
                self._validate()
        self.progress.finish()
        return seconds

    def _is_finished(self) -> bool:
        patience = self.optimizer.patience
        is_stalled = patience is not None and self._epoch - self._best.epoch >= patience
        return self._epoch >= self.optimizer.epochs or is_stalled

    def _train_epoch(self, trained: nn.Module) -> None:
        self.task.module.train()
        for module in self._frozen:
            module.training = False
        settings, loader = self.optimizer, self.task.loader
        for batch in loader.epoch(self._epoch, first_step=self._step - self._epoch * loader.num_steps):
            loss = trained(batch)
            rate = learning_rate(settings, self._step, settings.epochs * loader.num_steps)
            self._log_step(loss, rate, batch)
            self._scaler.scale(loss).backward()
            update(self._objective, self._adamw, rate, settings.max_grad_norm, self._scaler)
            self._step += 1
            self._num_samples += self.task.count(batch)
            self.progress.advance(self.task.count(batch))
            self._checkpoint()

    def _log_step(self, loss: Tensor, rate: float, batch: Any) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise self.task.explain(batch, loss=value, step=self._step)
        values = {"epoch": self._epoch, "loss": value, **self.task.watch(), "learning_rate": rate}
        self._log.write({"step": self._step, **values}, self._step, values)
        best = f", best epoch {self._best.epoch}" if self._best.epoch else ""
        self.progress.describe(f"epoch {self._epoch + 1}/{self.optimizer.epochs}, loss {value:.4g}{best}")

    def _validate(self) -> None:
        self.task.module.eval()
        measures = broadcast_from_first(run_on_first(self._measure) or {})
        self._log.write({"epoch": self._epoch, "validation": measures}, self._step, measures)
        self._best.update(self._epoch, self.task.score(measures), measures, self.task.module)
        if self.on_epoch is not None:
            self.on_epoch(self._epoch, measures)

    def _measure(self) -> dict[str, float]:
        try:
            return dict(self.task.measure())
        except DataError as error:
            if not self._step:
                raise
            raise DataError(f"validation after step {self._step - 1}: {error}; lower --lr if the loss rose") from error

    def _checkpoint(self) -> None:
        seconds = time.perf_counter() - self._last_checkpoint
        if not broadcast_from_first(seconds >= self.machine.checkpoint_s):
            return
        log_bytes = self._log.flush()
        save_checkpoint(
            self.run_path,
            self.machine.device,
            {
                "objective": self._objective.state_dict(),
                "optimizer": self._adamw.state_dict(),
                "best": self._best.to_state(),
                "step": self._step,
                "epoch": self._epoch,
                "pairs": self._num_resumed + self._num_samples,
                "log_bytes": log_bytes,
                "scaler": self._scaler.state_dict(),
                "run_id": self._run_id,
            },
        )
        self._last_checkpoint = time.perf_counter()

    def _resume(self) -> None:
        state = load_checkpoint(self.run_path, self.machine.device)
        if state is None:
            return
        self._objective.load_state_dict(state["objective"])
        self._adamw.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._best = _BestWeights.from_state(state["best"])
        self._step, self._epoch = state["step"], state["epoch"]
        self._log_bytes = state["log_bytes"]
        self._num_resumed = state["pairs"]
        self._run_id = state["run_id"]
        self.progress.note(f"resumed from the checkpoint after step {self._step:,}")


@dataclass(kw_only=True)
class _BestWeights:
    """The weights with the highest validation score."""

    epoch: int = 0
    score: float = -math.inf
    measures: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)

    def update(self, epoch: int, score: float, measures: dict[str, float], module: nn.Module) -> None:
        """Copy the weights after an epoch if they are better than all before."""
        if not self.weights or score > self.score or math.isnan(self.score):
            self.epoch, self.score, self.measures = epoch, score, measures
            self.weights = copy.deepcopy(module.state_dict())

    def to_state(self) -> dict[str, Any]:
        """Return the values for a checkpoint."""
        return {"epoch": self.epoch, "score": self.score, "measures": self.measures, "weights": self.weights}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "_BestWeights":
        """Build from the values of `to_state`."""
        return cls(**state)


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Seed torch's generators with the seed and the process's rank, and restore the caller's generators afterwards.

    All threads of a process draw from the same generators, so one thread at a time is within.
    """
    where = torch.device(device)
    with _GENERATORS, torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed + 1_000_003 * process_rank())
        yield


@contextmanager
def _threads(forward_flops: float, machine: MachineSettings) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(machine.threads or (1 if 3 * forward_flops < _SMALL_STEP_FLOPS else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_optimizer(trained: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Create fused AdamW; weight decay applies to matrices, not to biases, norms and the temperature."""
    matrices = [parameter for parameter in trained.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in trained.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then cosine decay to zero.

    Args:
        settings: peak learning rate, and fraction of the steps that warm up.
        step: number of the step.
        num_steps: steps of all epochs.
    """
    warmup = max(1, round(settings.warmup_fraction * num_steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    fraction = (step - warmup) / (num_steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * fraction))


def update(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler,
) -> None:
    """Clip the gradients to an L2 norm, take one step at a learning rate and clear the gradients.

    With float16 the scaler leaves out a step whose gradients overflow, and lowers the scale of the loss.
    """
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(trained.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, for the rest of the process.

    By default it returns large blocks to the system, and each step then waits for the system to clear their pages
    again: see the measurements in docs/about/speed.md. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
