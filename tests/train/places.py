"""A second task, of its own module: where the bar of an image is, from the tokens of the image."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from embedcache.arrays import Floats, Ints
from embedcache.dataset.inputs import open_input
from embedcache.runs import RunInfo
from embedcache.settings import from_flat
from embedcache.store.cache import Cache
from embedcache.train.batches import Batch, BatchInput, RowBatches, to_device
from embedcache.train.data import describe_input
from embedcache.train.distributed import own_slice
from embedcache.train.settings import FitSettings
from embedcache.train.train import TrainReport, train_task
from embedcache.train.trainer import OnEpoch
from tests.images import PLACES

FEATURE = "open_toy/patches"


class PlaceClassifier(nn.Module):
    """Normalized tokens, dropout, a hidden layer and a head."""

    def __init__(self, num_tokens: int, width: int, *, hidden: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm1d(num_tokens * width), nn.Dropout(0.1), nn.Linear(num_tokens * width, hidden), nn.GELU()
        )
        self.head = nn.Linear(hidden, len(PLACES))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(tokens_BTD.float().flatten(1)))
        return scores


class PlaceLoss(nn.Module):
    """Cross-entropy of a batch."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        super().__init__()
        self.network = network
        self._bfloat16 = precision == "bfloat16"

    def loss(self, batch: Batch) -> Tensor:
        tokens = batch.inputs["image"].values
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            scores = self.network(tokens)
        return cross_entropy(scores.float(), batch.targets)


class PlaceTask:
    """The task: every fifth image is for validation."""

    def __init__(self, tokens_NTD: Floats, labels_N: Ints, settings: FitSettings, device: str) -> None:
        self._tokens, self._labels, self._device = tokens_NTD, labels_N, device
        is_val = np.arange(len(labels_N)) % 5 == 0
        self._val = np.flatnonzero(is_val)
        self.network = PlaceClassifier(*tokens_NTD.shape[1:])
        self.module = PlaceLoss(self.network, settings.machine.precision)
        batch_size = settings.optimizer.batch_size or 64
        self._plan = RowBatches(np.flatnonzero(~is_val), batch_size=batch_size, seed=settings.seed)
        self.num_steps = self._plan.num_steps

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        for rows in self._plan.epoch(epoch, first_step=first_step):
            own = rows[own_slice(len(rows))]
            tokens = BatchInput(to_device(self._tokens[own], self._device))
            labels = to_device(self._labels[own], self._device)
            yield Batch(samples=own, num_samples=len(rows), inputs={"image": tokens}, targets=labels)

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        scores = self.network(to_device(self._tokens[self._val], self._device))
        labels = to_device(self._labels[self._val], self._device)
        loss = cross_entropy(scores, labels).item()
        return {"accuracy": (scores.argmax(dim=1) == labels).float().mean().item(), "loss": loss, "score": -loss}


def train_places(
    cache_path: Path, run_path: Path, settings: FitSettings, *, scale: float = 1.0, on_epoch: OnEpoch | None = None
) -> TrainReport:
    """Train the classifier on the shared cache."""
    feature = open_input(Cache(cache_path), "image", FEATURE)
    tokens = scale * np.asarray(feature.load()(np.arange(feature.num_items)).values, np.float32)
    info = RunInfo(
        kind="tests.train.places:PlaceClassifier",
        arguments={"num_tokens": tokens.shape[1], "width": tokens.shape[2]},
        inputs={"image": describe_input(feature)},
        index_digest=Cache(cache_path).info.index_digest,
    )
    return train_task(
        lambda device: PlaceTask(tokens, read_places(cache_path), settings, device),
        run_path,
        info,
        settings,
        on_epoch=on_epoch,
    )


def read_places(cache_path: Path) -> Ints:
    """Return the number of the place that each caption names: (N,) int64."""
    texts: list[Any] = Cache(cache_path).items("text")["text"].to_pylist()
    return np.array([list(PLACES).index(text.split()[2]) for text in texts])


def main(cache_path: str, run_path: str, options: str) -> None:
    """Train with options in JSON, alone or as one of several processes."""
    train_places(Path(cache_path), Path(run_path), from_flat(FitSettings, json.loads(options)))
