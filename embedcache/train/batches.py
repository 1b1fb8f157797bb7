"""Batches of any task: what a step reads, random batches of rows, and reading ahead during a step."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Array, Ints, concatenated_ranges
from embedcache.train.distributed import check_batches

_BUFFER_BLOCKS = 1024
_NUM_PREFETCHED = 3
T = TypeVar("T")


class BatchInput(NamedTuple):
    """Items of one input on the device.

    Args:
        values: (B, D) or (B, T, D), in the dtype on disk.
        lengths: (B,) int64 number of tokens of each item; None: T tokens each.
        rows: (B,) rows of the feature, to name those that are not finite.
    """

    values: Tensor
    lengths: Tensor | None = None
    rows: Ints | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step of this process reads, on the device.

    Args:
        samples: numbers of its samples, to name them if the loss is not finite.
        num_samples: number of samples of all processes.
        inputs: name of an input, such as its modality -> items.
        targets: what the outputs are compared with, as the loss of the task has it.
    """

    samples: Ints
    num_samples: int
    inputs: Mapping[str, BatchInput] = field(default_factory=dict)
    targets: Any = None


class RowBatches:
    """Random batches of rows: each epoch holds every row once, in a new order, in batches of equal size to within one.

    Blocks of `block_rows` neighboring rows are shuffled, then all rows within 1,024 blocks. Raises `SettingError` if a
    batch has fewer rows than torchrun started processes.
    """

    def __init__(self, rows: Ints, *, batch_size: int, seed: int, block_rows: int = 1) -> None:
        self._rows, self._seed, self._block_rows = rows, seed, block_rows
        self.num_samples = len(rows)
        self.num_steps = -(-len(rows) // batch_size)
        check_batches(self.num_samples, self.num_steps)

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[Ints]:
        """Iterate over the (B,) rows of each batch of one epoch, from a step on."""
        order = shuffle_blocks(self.num_samples, self._block_rows, np.random.default_rng([self._seed, number]))
        for part in np.array_split(order, self.num_steps)[first_step:]:
            yield self._rows[part]


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Iterate over batches that a thread makes in order, a few ahead of the one that is used."""
    with ThreadPoolExecutor(1, "loader") as executor:
        pending: deque[Future[T | None]] = deque()
        for _ in range(_NUM_PREFETCHED):
            pending.append(executor.submit(next, batches, None))
        while (batch := pending.popleft().result()) is not None:
            pending.append(executor.submit(next, batches, None))
            yield batch


def to_device(array: Array, device: str) -> Tensor:
    """Return an array as a tensor on a device; to a GPU it is copied through pinned memory."""
    tensor, where = torch.from_numpy(array), torch.device(device)
    if where.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(where, non_blocking=True)


def shuffle_blocks(count: int, block_rows: int, rng: np.random.Generator) -> Ints:
    """Return 0 … count - 1 in a random order in which numbers stay near those of 1,024 neighboring blocks."""
    if block_rows == 1:
        return rng.permutation(count)
    starts = rng.permutation(-(-count // block_rows)) * block_rows
    _, order = concatenated_ranges(starts, np.minimum(block_rows, count - starts))
    size = block_rows * _BUFFER_BLOCKS
    return np.concatenate([rng.permutation(order[start : start + size]) for start in range(0, count, size)])
