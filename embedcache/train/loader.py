"""Reads the next batches while the present one trains."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from embedcache.arrays import Ints
from embedcache.dataset.inputs import Reader
from embedcache.train.batches import Batch, Batches
from embedcache.train.distributed import own_share
from embedcache.train.losses import Related

_NUM_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class LoadedSide:
    """One side of a batch on the device.

    Args:
        values: of this process's items, (b, D) or (b, T, D), of the dtype on disk.
        lengths: (b,) int64 tokens of each, or None.
        rows: (b,) int64, where they come from.
        count: items of all processes.
    """

    values: Tensor
    lengths: Tensor | None
    rows: Ints
    count: int


@dataclass(frozen=True, kw_only=True)
class LoadedBatch:
    """What one training step takes.

    Args:
        batch: which rows.
        image: this process's images; where there is mixup, its share of the first half, then that of the second.
        text: its texts, alike.
        related: of the whole batch.
    """

    batch: Batch
    image: LoadedSide
    text: LoadedSide
    related: Related


class Loader:
    """Reads batches on one thread, two ahead, in order.

    Args:
        batches: which rows.
        image: gathers rows of the image side.
        text: gathers rows of the text side.
        device: where tensors go; to a GPU through pinned memory.

    `waited_s` counts the seconds for which a batch was not there when it was asked for.
    """

    def __init__(self, batches: Batches, *, image: Reader, text: Reader, device: str) -> None:
        self._batches, self._image, self._text = batches, image, text
        self._device = torch.device(device)
        self.num_steps, self.num_samples, self.batch_size = batches.num_steps, batches.num_samples, batches.batch_size
        self.waited_s = 0.0

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[LoadedBatch]:
        """Go through one epoch, from one of its batches on."""
        with ThreadPoolExecutor(1, "loader") as executor:
            ahead: deque[Future[LoadedBatch]] = deque()
            for batch in self._batches.epoch(number, first_step=first_step):
                ahead.append(executor.submit(self._load, batch))
                if len(ahead) > _NUM_AHEAD:
                    yield self._wait(ahead.popleft())
            while ahead:
                yield self._wait(ahead.popleft())

    def _wait(self, future: "Future[LoadedBatch]") -> LoadedBatch:
        started = time.perf_counter()
        loaded = future.result()
        self.waited_s += time.perf_counter() - started
        return loaded

    def _load(self, batch: Batch) -> LoadedBatch:
        images, texts = (torch.from_numpy(positions) for positions in batch.related)
        return LoadedBatch(
            batch=batch,
            image=self._side(self._image, batch.image_rows, halves=batch.share is not None),
            text=self._side(self._text, batch.text_rows, halves=batch.share is not None),
            related=Related(images=self._to_device(images), texts=self._to_device(texts)),
        )

    def _side(self, read: Reader, rows: Ints, *, halves: bool) -> LoadedSide:
        parts = rows.reshape(2, -1) if halves else rows[None]
        own = parts[:, own_share(parts.shape[1])].ravel()
        inputs = read(own)
        return LoadedSide(
            values=self._to_device(torch.from_numpy(inputs.values)),
            lengths=None if inputs.lengths is None else self._to_device(torch.from_numpy(inputs.lengths)),
            rows=own,
            count=parts.shape[1],
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
