"""The training loop of one pair: AdamW with linear warm-up and cosine decay to zero, checkpoints and validation."""

import copy
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from embedcache.arrays import check_finite
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.errors import DataError
from embedcache.metrics.ranking import best_ranks, recall_at
from embedcache.progress import Progress
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import project, save_weights
from embedcache.train.batches import LoadedBatch, Loader
from embedcache.train.checkpoint import RunLog, load_checkpoint, save_checkpoint
from embedcache.train.distributed import broadcast_from_first, num_processes, process_rank
from embedcache.train.objective import Objective
from embedcache.train.settings import OptimizerSettings, TrainSettings

OnEpoch: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Called with the epoch and its validation recalls; an exception that it raises ends the training."""

_KS = (1, 5, 10)
_MAX_SAMPLES = 5000
_SMALL_STEP_FLOPS = 2e10
"""Below this, threads mostly wait for each other: two were 5 times slower than one on busy cores."""


@dataclass(kw_only=True)
class Trainer:
    """The training loop of one pair, whose weights change in place.

    Deterministic for a seed on one kind of device, also where training resumes from a checkpoint: to the bit.

    `validation` is None on all processes but the first. The run folder gets `losses.jsonl`, checkpoints and, at the
    end, the last weights.
    """

    pair: AlignedPair
    loader: Loader
    validation: "Validation | None"
    settings: TrainSettings
    run_path: Path
    keys: Sequence[str]
    flops_per_pair: float
    progress: Progress
    on_epoch: OnEpoch | None = None

    def __post_init__(self) -> None:
        self._best = _BestWeights()
        self._step = self._epoch = self._log_bytes = self._num_resumed = self._num_pairs = 0
        self._last_checkpoint = time.perf_counter()

    def fit(self) -> dict[str, Any]:
        """Train to the end; the pair then has the weights of its best validation recall, or its initialization.

        Returns:
            `best_epoch`, `recalls`, `pairs_per_s` and `wait_fraction` of `TrainReport`.

        Raises:
            DataError: the loss is NaN or infinite; names step, keys and temperature.
            CorruptError: the checkpoint cannot be read.
        """
        keep_freed_memory()
        forward_flops = self.flops_per_pair * self.loader.batch_size
        with seeded(self.settings.seed, self.settings.machine.device), _threads(forward_flops, self.settings):
            self._objective = Objective(self.pair, self.settings.loss, precision=self.settings.machine.precision)
            self._objective.to(self.settings.machine.device)
            self._optimizer = make_optimizer(self._objective, self.settings.optimizer)
            self._resume()
            seconds = self._train()
        if process_rank() == 0:
            save_weights(self.run_path / "last.safetensors", self.pair)
        self.pair.load_state_dict(self._best.weights)
        return {
            "best_epoch": self._best.epoch,
            "recalls": self._best.recalls,
            "pairs_per_s": round(self._num_pairs / seconds, 1) if self._num_pairs else 0.0,
            "wait_fraction": round(self.loader.waited_s / seconds, 4) if self._num_pairs else 0.0,
        }

    def _train(self) -> float:
        """Run all epochs and return the seconds of training, without validation."""
        total = self.settings.optimizer.epochs * self.loader.num_samples
        self.progress.start("training", total - self._num_resumed, "pairs")
        tensorboard = self.settings.machine.tensorboard
        self._log = RunLog(self.run_path, num_bytes=self._log_bytes, step=self._step, tensorboard=tensorboard)
        with closing(self._log):
            if self._best.score < 0:
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
        optimizer = self.settings.optimizer
        is_stalled = optimizer.patience is not None and self._epoch - self._best.epoch >= optimizer.patience
        has_parameters = any(True for tower in (self.pair.image, self.pair.text) for _ in tower.parameters())
        return self._epoch >= optimizer.epochs or is_stalled or not has_parameters

    def _train_epoch(self, trained: nn.Module) -> None:
        self.pair.train()
        optimizer = self.settings.optimizer
        for loaded in self.loader.epoch(self._epoch, first_step=self._step - self._epoch * self.loader.num_steps):
            loss = trained(loaded)
            rate = learning_rate(optimizer, self._step, optimizer.epochs * self.loader.num_steps)
            self._log_step(loss, rate, loaded)
            loss.backward()
            update(self._objective, self._optimizer, rate, optimizer.max_grad_norm)
            self._step += 1
            self._num_pairs += len(loaded.batch.samples)
            self.progress.advance(len(loaded.batch.samples))
            self._checkpoint()

    def _log_step(self, loss: Tensor, rate: float, loaded: LoadedBatch) -> None:
        value, temperature = loss.item(), self.pair.temperature.item()
        if not math.isfinite(value):
            self._raise_loss_error(value, temperature, loaded)
        values = {"epoch": self._epoch, "loss": value, "temperature": temperature, "learning_rate": rate}
        self._log.write({"step": self._step, **values}, self._step, values)

    def _raise_loss_error(self, value: float, temperature: float, loaded: LoadedBatch) -> None:
        for name, inputs in (("image", loaded.image), ("text", loaded.text)):
            values = inputs.values.float().cpu().numpy()
            check_finite(values, f"at step {self._step}, the {name} feature", rows=inputs.rows)
        keys = [self.keys[sample] for sample in loaded.batch.samples[:5].tolist()]
        raise DataError(
            f"the loss is {value} at step {self._step} with temperature {temperature:.4g}, in the batch of the "
            f"{len(loaded.batch.samples):,} keys {', '.join(keys)} …; lower --lr, or check the features "
            "with: embedcache inspect"
        )

    def _validate(self) -> None:
        recalls = broadcast_from_first({} if self.validation is None else self.validation.recalls(self.pair))
        self._log.write({"epoch": self._epoch, "validation": recalls}, self._step, recalls)
        self._best.update(self._epoch, recalls, self.pair)
        if self.on_epoch is not None:
            self.on_epoch(self._epoch, recalls)

    def _checkpoint(self) -> None:
        seconds = time.perf_counter() - self._last_checkpoint
        if not broadcast_from_first(seconds >= self.settings.machine.checkpoint_s):
            return
        save_checkpoint(
            self.run_path,
            self.settings.machine.device,
            {
                "objective": self._objective.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "best": vars(self._best),
                "step": self._step,
                "epoch": self._epoch,
                "pairs": self._num_resumed + self._num_pairs,
                "log_bytes": self._log.flush(),
            },
        )
        self._last_checkpoint = time.perf_counter()

    def _resume(self) -> None:
        state = load_checkpoint(self.run_path, self.settings.machine.device)
        if state is None:
            return
        self._objective.load_state_dict(state["objective"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._best = _BestWeights(**state["best"])
        self._step, self._epoch, self._log_bytes = state["step"], state["epoch"], state["log_bytes"]
        self._num_resumed = state["pairs"]
        self.progress.note(f"resumed from the checkpoint after step {self._step:,}")


class Validation:
    """Retrieval in both directions on the validation pairs, of at most 5,000 evenly spaced samples."""

    def __init__(self, pairs: Pairs, image: Reader, text: Reader, *, device: str) -> None:
        samples = pairs.samples
        if len(samples) > _MAX_SAMPLES:
            samples = samples[np.linspace(0, len(samples) - 1, _MAX_SAMPLES).astype(np.int64)]
        pairs = pairs.select(samples)
        self._images, self._texts = image(pairs.image.rows), text(pairs.text.rows)
        self._positives = pairs.positives()
        self._device = device

    def recalls(self, pair: AlignedPair) -> dict[str, float]:
        """Compute validation recall, `i2t r@1` to `t2i r@10`, each from 0 to 1."""
        pair.eval()
        images = project(pair.image, self._images, device=self._device)
        texts = project(pair.text, self._texts, device=self._device)
        image, text = self._positives
        ranks = {
            "i2t": best_ranks(images, texts, (image, text)),
            "t2i": best_ranks(texts, images, (text, image)),
        }
        return {f"{direction} r@{k}": recall_at(ranks[direction], k) for direction in ranks for k in _KS}


@dataclass(kw_only=True)
class _BestWeights:
    """The weights with the highest validation recall: the mean of R@1, R@5 and R@10 over both directions."""

    epoch: int = 0
    score: float = -1.0
    recalls: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)

    def update(self, epoch: int, recalls: Mapping[str, float], pair: AlignedPair) -> None:
        """Copy the weights after an epoch if they are better than all before."""
        if fmean(recalls.values()) > self.score:
            self.epoch, self.score, self.recalls = epoch, fmean(recalls.values()), dict(recalls)
            self.weights = copy.deepcopy(pair.state_dict())


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Seed torch's generators with the seed and the process's rank, and restore the caller's generators afterwards."""
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed + 1_000_003 * process_rank())
        yield


@contextmanager
def _threads(forward_flops: float, settings: TrainSettings) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(settings.machine.threads or (1 if 3 * forward_flops < _SMALL_STEP_FLOPS else before))
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
    """Return the learning rate of a step, counted from 0: linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(settings.warmup_fraction * num_steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    fraction = (step - warmup) / max(1, num_steps - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * fraction))


def update(trained: nn.Module, optimizer: torch.optim.Optimizer, rate: float, max_grad_norm: float) -> None:
    """Clip the gradients to an L2 norm, take one step at a learning rate and clear the gradients."""
    nn.utils.clip_grad_norm_(trained.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, for the rest of the process.

    By default it returns large blocks to the system, and each step then waits for the system to clear their pages
    again: see the measurements in docs/benchmarks/train.md. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
