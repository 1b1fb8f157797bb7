"""The training loop: one pair of projectors on rows from a cache."""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.errors import DataError
from embedcache.progress import Progress
from embedcache.projectors.pair import AlignedPair
from embedcache.train.batches import Batch, Batches, Reader
from embedcache.train.losses.contract import LOSSES, Loss, Related
from embedcache.train.recalls import Validation
from embedcache.train.settings import OptimizerSettings, TrainSettings

_SMALL_STEP_FLOPS = 2e10
"""Below this, threads spend their time waiting for each other: two were 5 times slower than one on busy cores."""


def fit(
    pair: AlignedPair,
    batches: Batches,
    *,
    image: Reader,
    text: Reader,
    validation: Validation,
    settings: TrainSettings,
    log_path: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train a pair in place; it ends as it was at its best validation recall, its start included.

    Deterministic for a seed on one kind of device.

    Args:
        pair: trained in place.
        batches: of the training pairs.
        image: gathers rows of the image feature.
        text: gathers rows of the text feature.
        validation: of the validation pairs.
        settings: of the run.
        log_path: gets a JSON line a step and one a validation.
        progress: told about pairs.

    Returns:
        `best_epoch`, and `recalls` on validation at that epoch. Epoch 0 is the start.

    Raises:
        DataError: the loss is no number any more; step and temperature are named.
    """
    with log_path.open("w") as log, seeded(settings.seed, settings.device), _threads(pair, settings):
        best = _Best(pair, validation, log)
        loss_function = LOSSES.load(settings.loss)().to(settings.device)
        trained = nn.ModuleList([pair, loss_function])
        optimizer, schedule = _optimizer(trained, settings.optimizer, batches.num_steps)
        for epoch in range(settings.optimizer.epochs):
            pair.train()
            for number, batch in enumerate(batches.epoch(epoch)):
                step = epoch * batches.num_steps + number
                loss = _loss(pair, loss_function, batch, image, text, settings)
                _write(
                    log,
                    {
                        "step": step,
                        "epoch": epoch,
                        "loss": loss.item(),
                        "temperature": pair.temperature.item(),
                    },
                )
                _check(loss, step, pair)
                _step(loss, trained, optimizer, settings.optimizer.gradient_norm)
                schedule.step()
                progress.advance(len(batch.image_rows))
            best.update(epoch + 1)
    return best.restore()


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Draw torch's random numbers from a seed, and put the caller's generators back afterwards."""
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(pair: AlignedPair, settings: TrainSettings) -> Iterator[None]:
    """Set torch's threads for the loop, and put the caller's number back."""
    before = torch.get_num_threads()
    step_flops = 6 * settings.optimizer.batch_size * sum(parameter.numel() for parameter in pair.parameters())
    torch.set_num_threads(settings.threads or (1 if step_flops < _SMALL_STEP_FLOPS else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loss(
    pair: AlignedPair, loss_function: Loss, batch: Batch, image: Reader, text: Reader, settings: TrainSettings
) -> Tensor:
    device = settings.device
    with _autocast(settings):  # the towers only: similarities and the softmax need float32
        images = pair.image(_to_device(image, batch.image_rows, device))
        texts = pair.text(_to_device(text, batch.text_rows, device))
    related_images, related_texts = (torch.from_numpy(positions).to(device) for positions in batch.related)
    return loss_function(
        normalize(images.float(), dim=-1),
        normalize(texts.float(), dim=-1),
        pair.scale,
        Related(images=related_images, texts=related_texts),
    )


def _to_device(read: Reader, rows: Any, device: str) -> Tensor:
    vectors = torch.from_numpy(read(rows))
    if torch.device(device).type == "cuda":
        vectors = vectors.pin_memory()
    return vectors.to(device, non_blocking=True)


@contextmanager
def _autocast(settings: TrainSettings) -> Iterator[None]:
    kind = torch.device(settings.device).type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
        yield


def _check(loss: Tensor, step: int, pair: AlignedPair) -> None:
    if not math.isfinite(loss.item()):
        raise DataError(
            f"the loss is {loss.item()} at step {step} with temperature {pair.temperature.item():.4g}; "
            "lower --learning-rate, or look at the features with: embedcache inspect"
        )


def _step(loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer, gradient_norm: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trained.parameters(), gradient_norm)
    optimizer.step()


def _optimizer(
    trained: nn.Module, settings: OptimizerSettings, steps_per_epoch: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    matrices = [parameter for parameter in trained.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in trained.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    num_steps = settings.epochs * steps_per_epoch
    warmup = max(1, round(settings.warmup_share * num_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _write(log: TextIO, line: Mapping[str, Any]) -> None:
    log.write(json.dumps(line) + "\n")


class _Best:
    """Keeps the weights of the best validation recall: the mean of R@1, R@5 and R@10 of both directions."""

    def __init__(self, pair: AlignedPair, validation: Validation, log: TextIO) -> None:
        self._pair, self._validation, self._log = pair, validation, log
        self._score = -1.0
        self.update(0)

    def update(self, epoch: int) -> None:
        recalls = self._validation.recalls(self._pair)
        _write(self._log, {"epoch": epoch, "validation": recalls})
        self._log.flush()
        if fmean(recalls.values()) > self._score:
            self._score = fmean(recalls.values())
            self._outcome = {"best_epoch": epoch, "recalls": recalls}
            self._state = copy.deepcopy(self._pair.state_dict())

    def restore(self) -> dict[str, Any]:
        self._pair.load_state_dict(self._state)
        return self._outcome
