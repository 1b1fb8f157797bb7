"""The training loop of any task: AdamW with linear warm-up and cosine decay to zero, validation, checkpoints, the log.

Trackers, TensorBoard and Weights & Biases, get the values of the log, too.
"""

import copy
import ctypes
import io
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol, TypeAlias
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedcache.arrays import check_finite
from embedcache.errors import CorruptError, DataError, FingerprintError, SettingError, one_line
from embedcache.files import replacing
from embedcache.processes import announce_device, prefers_one_thread
from embedcache.progress import Progress
from embedcache.registry import require, unknown_name
from embedcache.runs import CHECKPOINT, LAST_WEIGHTS, LOG, read_info, save_weights
from embedcache.train.batches import Batch, read_ahead
from embedcache.train.distributed import broadcast_from_first, gather_objects, num_processes, process_rank, run_on_first
from embedcache.train.initialization import freeze, parts_of
from embedcache.train.settings import FitSettings, OptimizerSettings, TrainSettings

OnEpoch: TypeAlias = Callable[[int, float], None]
"""Called with the epoch and its validation score; an exception that it raises ends the training."""

TRACKERS = ("tensorboard", "wandb")

_GENERATORS = threading.RLock()


class Task(Protocol):
    """What `Trainer` trains.

    A task may have more attributes:

    - `network`: the part of `module` whose weights are saved, if not all are. `module` is first read after the network
      got the weights of the runs that it starts from.
    - `keys`: names of the samples, for the error of a loss that is not finite.
    - `about`: further fields of `TrainReport`.

    The network may have a method `parts`, which names parts for `init_from` and `trainable` (else each submodule and
    each parameter is one); the module may have a method `scalars`, whose values are logged with each step.
    """

    @property
    def module(self) -> nn.Module:
        """The module that is trained. Its method `loss(batch)` returns a scalar, the mean over the batch."""
        ...

    @property
    def num_steps(self) -> int:
        """Batches per epoch."""
        ...

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from a step on; under torchrun over this process's part of each.

        They depend on the seed, the epoch and the step alone, or a resumed run would differ. A thread reads ahead.
        """
        ...

    def measure(self) -> Mapping[str, float]:
        """Compute the validation metrics with `module` in evaluation mode, on the first process only.

        `score` among them is what epochs are compared by; a higher one is better. If all are NaN, the last epoch is
        kept.
        """
        ...


def network_of(task: Task) -> nn.Module:
    """Return the module of a task whose weights are saved."""
    network: nn.Module | None = getattr(task, "network", None)
    return task.module if network is None else network


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Result of the training loop.

    Args:
        best_epoch: epoch whose weights the network has; 0 is the initialization.
        score: what epochs are compared by, at that epoch; None if nothing could be compared.
        measures: the other validation metrics of that epoch.
        samples_per_s: training samples per second, since training started or resumed.
    """

    best_epoch: int
    score: float | None
    measures: dict[str, float]
    samples_per_s: float


class _Loss(nn.Module):
    """The loss of a batch as the forward pass, which `DistributedDataParallel` wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.module.loss(batch)  # type: ignore[operator]
        return loss


@dataclass(kw_only=True)
class Trainer:
    """The training loop of a task, whose module changes in place.

    Deterministic for a seed on one kind of device, also if training resumes from a checkpoint: to the bit with one
    or two processes. With more, PyTorch sums gradients in another order after a resume, which rounds differently.

    The run folder gets `losses.jsonl`, checkpoints and, at the end, the last weights. Only the parts in `trainable` are
    updated (all if None); the others keep their buffers as well.
    """

    task: Task
    settings: FitSettings | TrainSettings
    run_path: Path
    progress: Progress
    trainable: Sequence[str] | None = None
    on_epoch: OnEpoch | None = None

    def __post_init__(self) -> None:
        self._state = _State(run_id=uuid.uuid4().hex)
        self._num_samples = 0  # since training started or resumed
        self._last_checkpoint = time.perf_counter()
        self._device = self.settings.machine.device

    def fit(self) -> FitResult:
        """Train to the end; the network then has the weights of its best validation score, or its initialization.

        Raises:
            DataError: the loss is NaN or infinite; the message names the step and the samples. Or the module cannot be
                measured, such as after the last step of an epoch was too large.
            CorruptError: the checkpoint cannot be read.
        """
        keep_freed_memory()
        announce_device(self._device)

        self._network = network_of(self.task)
        with seeded(self.settings.seed, self._device), _restored_threads():
            if self.settings.machine.threads:
                torch.set_num_threads(self.settings.machine.threads)

            # The optimizer takes the parameters on the device, so the module moves first.
            self._module = self.task.module.to(self._device)
            parts = parts_of(self._network)
            self._frozen = freeze(self._network, parts, parts if self.trainable is None else self.trainable)
            self._adamw = make_optimizer(self._module, self.settings.optimizer)

            device_type = torch.device(self._device).type
            self._scaler = torch.amp.GradScaler(device_type, enabled=self.settings.machine.precision == "float16")

            # A checkpoint has the states of the module, the optimizer and the scaler, which must exist before.
            self._resume()
            seconds = self._train()

        # The last weights are saved before the best ones replace them.
        if process_rank() == 0:
            save_weights(self.run_path / LAST_WEIGHTS, self._network)
        state = self._state
        self._network.load_state_dict(state.best_weights)

        return FitResult(
            best_epoch=state.best_epoch,
            score=None if math.isnan(state.best_score) else state.best_score,
            measures=state.best_measures,
            samples_per_s=round(self._num_samples / seconds, 1) if self._num_samples else 0.0,
        )

    def _train(self) -> float:
        """Run all epochs and return the seconds of training, without validation."""
        num_steps = self.settings.optimizer.epochs * self.task.num_steps
        self.progress.start("training", num_steps - self._state.step, "steps")

        self._log = RunLog(
            self.run_path,
            num_bytes=self._state.log_bytes,
            step=self._state.step,
            report_to=self.settings.machine.report_to,
            run_id=self._state.run_id,
        )
        with self._log:
            # A new run measures its initialization, which is kept if no epoch is better.
            if not self._state.best_weights:
                self._validate()

            loss = _Loss(self._module)
            trained = DistributedDataParallel(loss) if num_processes() > 1 else loss

            seconds = 0.0
            while not self._is_finished():
                started = time.perf_counter()
                self._train_epoch(trained, num_steps)
                seconds += time.perf_counter() - started
                self._state.epoch += 1
                self._validate()

        self.progress.finish()
        return seconds

    def _is_finished(self) -> bool:
        epochs = self.settings.optimizer.epochs
        patience = self.settings.optimizer.patience
        is_stalled = patience is not None and self._state.epoch - self._state.best_epoch >= patience
        return self._state.epoch >= epochs or is_stalled or not self.task.num_steps

    def _train_epoch(self, trained: nn.Module, num_steps: int) -> None:
        # Frozen parts keep their buffers as well, which the training mode would update.
        self._module.train()
        for module in self._frozen:
            module.training = False

        # A resumed epoch begins at the step after its checkpoint.
        optimizer = self.settings.optimizer
        state = self._state
        first_step = state.step - state.epoch * self.task.num_steps
        for batch in read_ahead(self.task.batches(state.epoch, first_step)):
            self._choose_threads(batch)
            loss = trained(batch)
            rate = learning_rate(optimizer, state.step, num_steps)

            # A loss that is not finite is an error here, before it changes the weights.
            self._log_step(loss, rate, batch)
            self._scaler.scale(loss).backward()
            update(self._module, self._adamw, rate, optimizer.max_grad_norm, self._scaler)

            # A checkpoint names the step that comes next, so it follows the count.
            state.step += 1
            self._num_samples += batch.num_samples
            self.progress.advance(1)
            self._checkpoint()

    def _choose_threads(self, batch: Batch) -> None:
        """Use one thread for small steps, by the size of the first one, unless a number of threads was given."""
        if self._state.is_small is not None or self.settings.machine.threads is not None:
            return

        vectors = [values.numel() // values.shape[-1] for values, *_ in batch.inputs.values()]
        num_vectors = sum(vectors) / len(vectors) if vectors else len(batch.samples)
        num_parameters = sum(parameter.numel() for parameter in self._module.parameters())
        self._state.is_small = prefers_one_thread(6 * num_parameters * num_vectors)
        if self._state.is_small:
            torch.set_num_threads(1)

    def _log_step(self, loss: Tensor, rate: float, batch: Batch) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise self._bad_loss(batch, value)

        # Modules need not have `scalars`.
        scalars: Callable[[], Mapping[str, float]] = getattr(self._module, "scalars", dict)
        values = {"epoch": self._state.epoch, "loss": value, **scalars(), "learning_rate": rate}
        state = self._state
        self._log.write({"step": state.step, **values}, state.step, values)

        best = f", best epoch {state.best_epoch}" if state.best_epoch else ""
        self.progress.describe(f"epoch {state.epoch + 1}/{self.settings.optimizer.epochs}, loss {value:.4g}{best}")

    def _bad_loss(self, batch: Batch, loss: float) -> DataError:
        """Return the error of a loss that is not finite; one that names the values is raised if these are not."""
        # Values that are not finite explain the loss better than its samples do.
        for name, (values, _, rows) in batch.inputs.items():
            check_finite(values.float().cpu().numpy(), f"at step {self._state.step}, the {name} feature", rows=rows)

        keys = getattr(self.task, "keys", None)
        samples = [str(sample) if keys is None else keys[sample] for sample in batch.samples[:5].tolist()]
        return DataError(
            f"the loss is {loss} at step {self._state.step}, in the batch of the {len(batch.samples):,} samples "
            f"{', '.join(samples)} …; lower the learning rate, or check the features with: embedcache inspect"
        )

    def _validate(self) -> None:
        self._module.eval()
        state = self._state

        # All processes need the same score, or they would not end in the same epoch.
        measures = broadcast_from_first(run_on_first(self._measure) or {})
        score = measures.pop("score")
        self._log.write({"epoch": state.epoch, "validation": measures}, state.step, measures)

        # While all scores are NaN, each epoch replaces the previous one.
        if not state.best_weights or score > state.best_score or math.isnan(state.best_score):
            state.best_epoch = state.epoch
            state.best_score = score
            state.best_measures = measures
            state.best_weights = copy.deepcopy(self._network.state_dict())

        if self.on_epoch is not None:
            self.on_epoch(state.epoch, score)

    def _measure(self) -> dict[str, float]:
        try:
            return dict(self.task.measure())
        except DataError as error:
            step = self._state.step
            if not step:
                raise
            raise DataError(f"validation after step {step - 1}: {error}; lower --lr if the loss rose") from error

    def _checkpoint(self) -> None:
        # The first process decides by its clock, as all processes must write a checkpoint after the same step.
        seconds = time.perf_counter() - self._last_checkpoint
        if not broadcast_from_first(seconds >= self.settings.machine.checkpoint_s):
            return

        # The log is on the disk before a checkpoint counts its bytes.
        self._state.log_bytes = self._log.flush()
        states = {name: part.state_dict() for name, part in self._kept().items()}
        save_checkpoint(self.run_path, self._device, {**states, "loop": vars(self._state)})
        self._last_checkpoint = time.perf_counter()

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self.run_path, self._device)
        if checkpoint is None:
            return

        for name, part in self._kept().items():
            part.load_state_dict(checkpoint[name])
        self._state = _State(**checkpoint["loop"])

        # Only the first step of a run chooses the threads, so a resumed run repeats the choice here.
        if self._state.is_small and self.settings.machine.threads is None:
            torch.set_num_threads(1)

        self.progress.note(f"resumed from the checkpoint after step {self._state.step:,}")

    def _kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps the state of, by name."""
        return {"module": self._module, "optimizer": self._adamw, "scaler": self._scaler}


@dataclass(kw_only=True)
class _State:
    """Where the loop is, and its best weights.

    Args:
        run_id: of the run in trackers.
        step: step that comes next.
        epoch: epoch that comes next.
        log_bytes: bytes of the log before the checkpoint.
        is_small: whether steps are small enough for one thread; None before the first one.
        best_epoch: epoch with the highest validation score, which the next fields have.
    """

    run_id: str
    step: int = 0
    epoch: int = 0
    log_bytes: int = 0
    is_small: bool | None = None
    best_epoch: int = 0
    best_score: float = -math.inf
    best_measures: dict[str, float] = field(default_factory=dict)
    best_weights: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(run_path: Path, device: str, state: Mapping[str, Any]) -> None:
    """Write the state of a run with the random generators of all processes, which must all call it."""
    rng_states = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        rng_states["cuda"] = torch.cuda.get_rng_state(device)
    if device == "mps":
        rng_states["mps"] = torch.mps.get_rng_state()

    # Each process sends its states, so this comes before the first process writes alone.
    generators = gather_objects(rng_states)
    if process_rank() == 0:
        buffer = io.BytesIO()  # torch.save into a file does not raise OSError when the disk is full
        torch.save({**state, "generators": generators}, buffer)
        with replacing(run_path / CHECKPOINT) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(run_path: Path, device: str) -> dict[str, Any] | None:
    """Read the state of a run and restore this process's random generators; return None without a checkpoint.

    Raises:
        CorruptError: it cannot be read, or has changed since it was written.
        FingerprintError: another number of processes wrote it.
    """
    path = run_path / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with ZipFile(path) as file:  # torch.load does not compare the checksums
            if file.testzip():
                raise ValueError("other bytes than were written")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        generators = state["generators"]
    except Exception as error:  # a damaged file raises any
        reason = "objects that are no tensors" if isinstance(error, UnpicklingError) else f"an error: {one_line(error)}"
        raise CorruptError(f"{path}: expected a checkpoint, got {reason}; delete it to restart training") from error
    if len(generators) != num_processes():
        raise FingerprintError(
            f"{path}: expected {len(generators)} processes, which wrote it, got {num_processes()}; start "
            f"{len(generators)} processes, or delete it to restart training"
        )

    rng_states = generators[process_rank()]
    torch.set_rng_state(rng_states["cpu"].cpu())
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(rng_states["cuda"].cpu(), device)
    if device == "mps":
        torch.mps.set_rng_state(rng_states["mps"].cpu())
    return state


class RunLog:
    """The log of a run: `losses.jsonl`, and trackers if named; of several processes, only the first writes.

    A context manager: it ends with the training. What follows the first `num_bytes`, which were written before the
    checkpoint, is cut off. A log that was deleted begins at the checkpoint.

    Args:
        run_path: folder of the run, as the user named it.
        num_bytes: bytes of the log before the checkpoint.
        step: step that is logged next; above 0, the run resumes.
        report_to: names of trackers.
        run_id: random text that stays the same when the run resumes.

    Raises:
        CorruptError: the log is shorter than that.
        SettingError: a tracker cannot start, such as without a login.
    """

    def __init__(
        self, run_path: Path, *, num_bytes: int, step: int, report_to: Sequence[str] = (), run_id: str = ""
    ) -> None:
        self._file = None
        self._trackers: list[_Tracker] = []
        if process_rank():
            return

        # The user may have deleted the log, as the error below advises.
        path = run_path / LOG
        size = path.stat().st_size if path.is_file() else 0
        if 0 < size < num_bytes:
            raise CorruptError(
                f"{path}: expected the {num_bytes:,} bytes of losses before the checkpoint, got {size:,}; delete it to "
                f"go on without them, or {CHECKPOINT} to restart training"
            )

        # Trackers open first, so that the log stays as it is if one cannot start.
        self._trackers = [_open_tracker(name, run_path, run_id=run_id, first_step=step) for name in report_to]
        self._file = path.open("ab")
        self._file.truncate(min(size, num_bytes))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish(kind is not None)

    def write(self, line: Mapping[str, Any], step: int, scalars: Mapping[str, float]) -> None:
        """Write a line of JSON, and report the scalars of a step to the trackers."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
        for tracker in self._trackers:
            tracker.log(step, scalars)

    def flush(self) -> int:
        """Flush all lines to the disk and return the number of bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


class _Tracker(NamedTuple):
    log: Callable[[int, Mapping[str, float]], object]
    finish: Callable[[bool], object]


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist, and that their libraries are installed.

    Raises:
        UnknownNameError: there is no tracker of a name.
        MissingExtraError: its library is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        require(name, package=name)


def _open_tracker(name: str, run_path: Path, *, run_id: str, first_step: int) -> _Tracker:
    """Open a tracker: event files in the folder `tensorboard` of the run, or a run in the project WANDB_PROJECT.

    Steps that a resumed run repeats are hidden in TensorBoard, and ignored by Weights & Biases.
    """
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_path / name), purge_step=first_step)

            def log(step: int, scalars: Mapping[str, float]) -> None:
                for key, value in scalars.items():
                    writer.add_scalar(key, value, step)

            return _Tracker(log, lambda _: writer.close())

        wandb = require("wandb", package="wandb")

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "embedcache",
            id=run_id,
            name=str(run_path),
            config=dict(read_info(run_path).settings),
            resume="allow",
            reinit="create_new",  # a run that the caller has open stays open
            settings=wandb.Settings(console="off"),  # prints are not copied
        )
        return _Tracker(lambda step, scalars: run.log(dict(scalars), step=step), lambda failed: run.finish(int(failed)))
    except Exception as error:
        raise SettingError(f"report_to: {name} cannot start: {one_line(error)}; check it, or omit it") from error


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Seed torch's generators with the seed and the process's rank, and restore the caller's generators afterwards.

    All threads of a process draw from the same generators, so one thread at a time is within.
    """
    torch_device = torch.device(device)
    with _GENERATORS, torch.random.fork_rng(devices=[torch_device] if torch_device.type == "cuda" else []):
        torch.manual_seed(seed + 1_000_003 * process_rank())
        yield


@contextmanager
def _restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def make_optimizer(trained: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Create fused AdamW; weight decay applies to matrices, not to biases, norms and the temperature."""
    matrices = [parameter for parameter in trained.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in trained.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
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
    # The norm is computed from unscaled gradients.
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
        # These are the numbers of the options in glibc's malloc.h.
        trim_threshold = -1
        mmap_threshold = -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
