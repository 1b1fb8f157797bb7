"""The training loop: one pair of projectors on rows from caches, from its start or its last checkpoint to its end.

AdamW with a linear warm-up and a cosine to zero.

What the C library does with the memory of tensors that are gone.
"""

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedcache.arrays import check_finite
from embedcache.errors import DataError
from embedcache.progress import Progress
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import save_weights
from embedcache.train.checkpoint import load_checkpoint, save_checkpoint
from embedcache.train.distributed import from_first, num_processes, process_number
from embedcache.train.loader import LoadedBatch, Loader
from embedcache.train.log import RunLog
from embedcache.train.objective import Objective
from embedcache.train.settings import OptimizerSettings, TrainSettings
from embedcache.train.validation import Best, Validation

OnEpoch: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Told an epoch's number and validation recalls; what it raises ends the training."""

_SMALL_STEP_FLOPS = 2e10
"""Below this, threads spend their time waiting for each other: two were 5 times slower than one on busy cores."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training went.

    Args:
        best_epoch: whose weights the pair has now; 0 is the start.
        recalls: on validation, at that epoch.
        pairs_per_s: trained by all processes, since this process began.
        waited_share: of the time of training, spent waiting for data.
    """

    best_epoch: int
    recalls: dict[str, float]
    pairs_per_s: float
    waited_share: float


def fit(
    pair: AlignedPair,
    loader: Loader,
    validation: Validation | None,
    *,
    settings: TrainSettings,
    run_path: Path,
    keys: Sequence[str],
    flops_a_pair: float,
    progress: Progress,
    on_epoch: OnEpoch | None = None,
) -> Outcome:
    """Train a pair in place; it ends as it was at its best validation recall, its start included.

    Deterministic for a seed on one kind of device, and where it goes on from a checkpoint: to the bit.

    Args:
        pair: trained in place.
        loader: of the training pairs.
        validation: of the validation pairs; the first of several processes has it.
        settings: of the run.
        run_path: gets a JSON line a step and one a validation, and checkpoints; the last weights at the end.
        keys: of the samples, for messages.
        flops_a_pair: of the towers, forward.
        progress: told about pairs.
        on_epoch: told about each validation.

    Raises:
        DataError: the loss is no number any more; step, keys and temperature are named.
        CorruptError: the checkpoint cannot be read.
    """
    keep_freed_memory()
    with seeded(settings.seed, settings.machine.device), _threads(flops_a_pair * loader.batch_size, settings):
        return _Run(pair, loader, validation, settings, run_path, keys, progress, on_epoch).to_its_end()


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Draw torch's random numbers from a seed and the process's number, and put the caller's generators back."""
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed + 1_000_003 * process_number())
        yield


@contextmanager
def _threads(forward_flops: float, settings: TrainSettings) -> Iterator[None]:
    """Set torch's threads for the loop, and put the caller's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.machine.threads or (1 if 3 * forward_flops < _SMALL_STEP_FLOPS else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    def __init__(
        self,
        pair: AlignedPair,
        loader: Loader,
        validation: Validation | None,
        settings: TrainSettings,
        run_path: Path,
        keys: Sequence[str],
        progress: Progress,
        on_epoch: OnEpoch | None,
    ) -> None:
        self._pair, self._loader, self._validation = pair, loader, validation
        self._settings, self._run_path, self._keys = settings, run_path, keys
        self._progress, self._on_epoch = progress, on_epoch
        self._objective = Objective(pair, settings.loss, precision=settings.machine.precision)
        self._objective.to(settings.machine.device)
        self._optimizer = make_optimizer(self._objective, settings.optimizer)
        self._best = Best()
        self._learns = any(True for tower in (pair.image, pair.text) for _ in tower.parameters())
        self._step = self._epoch = self._log_bytes = self._num_before = self._num_pairs = 0
        self._checked = self._started = time.perf_counter()

    def to_its_end(self) -> Outcome:
        self._resume()
        total = self._settings.optimizer.epochs * self._loader.num_samples
        self._progress.start("training", total - self._num_before, "pairs")
        with RunLog(
            self._run_path,
            num_bytes=self._log_bytes,
            step=self._step,
            tensorboard=self._settings.machine.tensorboard,
        ) as self._log:
            if self._best.score < 0:
                self._validate()
            trained = DistributedDataParallel(self._objective) if num_processes() > 1 else self._objective
            self._started, validated_s = time.perf_counter(), 0.0
            while not self._is_over():
                self._train_epoch(trained)
                self._epoch += 1
                before = time.perf_counter()
                self._validate()
                validated_s += time.perf_counter() - before
        self._progress.finish()
        return self._outcome(time.perf_counter() - self._started - validated_s)

    def _is_over(self) -> bool:
        optimizer = self._settings.optimizer
        is_patient = optimizer.patience is None or self._epoch - self._best.epoch < optimizer.patience
        return self._epoch >= optimizer.epochs or not is_patient or not self._learns

    def _train_epoch(self, trained: nn.Module) -> None:
        self._pair.train()
        for loaded in self._loader.epoch(self._epoch, first_step=self._step - self._epoch * self._loader.num_steps):
            loss = trained(loaded)
            self._log_step(loss, loaded)
            loss.backward()
            optimizer = self._settings.optimizer
            update(self._objective, self._optimizer, self._rate(), optimizer.max_grad_norm)
            self._step += 1
            self._num_pairs += len(loaded.batch.samples)
            self._progress.advance(len(loaded.batch.samples))
            self._checkpoint()

    def _rate(self) -> float:
        optimizer = self._settings.optimizer
        return lr(optimizer, self._step, optimizer.epochs * self._loader.num_steps)

    def _log_step(self, loss: Tensor, loaded: LoadedBatch) -> None:
        value, temperature = loss.item(), self._pair.temperature.item()
        if not math.isfinite(value):
            self._explain(value, temperature, loaded)
        values = {"epoch": self._epoch, "loss": value, "temperature": temperature, "learning_rate": self._rate()}
        self._log.step(self._step, values)

    def _explain(self, value: float, temperature: float, loaded: LoadedBatch) -> None:
        for name, side in (("image", loaded.image), ("text", loaded.text)):
            check_finite(side.values.float().cpu().numpy(), f"at step {self._step}, the {name} feature", rows=side.rows)
        keys = [self._keys[sample] for sample in loaded.batch.samples[:5].tolist()]
        raise DataError(
            f"the loss is {value} at step {self._step} with temperature {temperature:.4g}, in the batch of the "
            f"{len(loaded.batch.samples):,} keys {', '.join(keys)} …; lower --lr, or look at the features "
            "with: embedcache inspect"
        )

    def _validate(self) -> None:
        recalls = from_first({} if self._validation is None else self._validation.recalls(self._pair))
        self._log.validation(self._step, self._epoch, recalls)
        self._best.offer(self._epoch, recalls, self._pair)
        if self._on_epoch is not None:
            self._on_epoch(self._epoch, recalls)

    def _checkpoint(self) -> None:
        if not from_first(time.perf_counter() - self._checked >= self._settings.machine.checkpoint_s):
            return
        save_checkpoint(
            self._run_path,
            self._settings.machine.device,
            {
                "objective": self._objective.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "best": self._best.state(),
                "step": self._step,
                "epoch": self._epoch,
                "pairs": self._num_before + self._num_pairs,
                "log_bytes": self._log.num_bytes(),
            },
        )
        self._checked = time.perf_counter()

    def _resume(self) -> None:
        state = load_checkpoint(self._run_path, self._settings.machine.device)
        if state is None:
            return
        self._objective.load_state_dict(state["objective"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._best.load_state(state["best"])
        self._step, self._epoch, self._log_bytes = state["step"], state["epoch"], state["log_bytes"]
        self._num_before = state["pairs"]
        self._progress.note(f"going on from the checkpoint after step {self._step:,}")

    def _outcome(self, seconds: float) -> Outcome:
        if process_number() == 0:
            save_weights(self._run_path / "last.safetensors", self._pair)
        self._best.restore(self._pair)
        return Outcome(
            best_epoch=self._best.epoch,
            recalls=self._best.recalls,
            pairs_per_s=round(self._num_pairs / seconds, 1) if self._num_pairs else 0.0,
            waited_share=round(self._loader.waited_s / seconds, 4) if self._num_pairs else 0.0,
        )


def make_optimizer(trained: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Make AdamW, fused; matrices decay, while biases, norms and the temperature do not."""
    matrices = [parameter for parameter in trained.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in trained.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def lr(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Get the learning rate of one of `num_steps` steps, counted from 0."""
    warmup = max(1, round(settings.warmup_fraction * num_steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))


def update(trained: nn.Module, optimizer: torch.optim.Optimizer, rate: float, max_grad_norm: float) -> None:
    """Take one step along the gradients, scaled down to a length of at most `max_grad_norm`, and forget them."""
    nn.utils.clip_grad_norm_(trained.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_TENSOR = 2**30


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, for the rest of the process.

    By default it gives large blocks back to the system, and each step then waits for the system to clear their pages
    again: docs/benchmarks/train.md has the figures. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_TENSOR)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
