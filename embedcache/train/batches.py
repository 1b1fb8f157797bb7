"""Batches of any task: random batches of rows, and a loader that reads the next ones during a step."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Array, Ints, concatenated_ranges
from embedcache.train.distributed import check_batches

_BUFFER_BLOCKS = 1024
_NUM_PREFETCHED = 2


class BatchPlan(Protocol):
    """Which samples are in which batch: a pure function of the epoch, for any number of processes."""

    num_samples: int
    num_steps: int

    def epoch(self, number: int, *, first_step: int) -> Iterator[Any]:
        """Iterate over descriptions of the batches of one epoch, from a step on."""
        ...


class RowBatches:
    """Random batches of rows: each epoch holds every row once, in a new order, in batches of equal size to within one.

    Blocks of `block_rows` neighboring rows are shuffled, then all rows within 1,024 blocks. Raises `SettingError` if a
    batch has fewer rows than torchrun started processes.
    """

    def __init__(self, rows: Ints, *, batch_size: int, seed: int, block_rows: int = 1) -> None:
        self._rows, self._seed, self._block_rows = rows, seed, block_rows
        self.num_samples, self.num_steps = len(rows), -(-len(rows) // batch_size)
        check_batches(self.num_samples, self.num_steps)

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[Ints]:
        """Iterate over the (B,) rows of each batch of one epoch, from a step on."""
        order = shuffle_blocks(self.num_samples, self._block_rows, np.random.default_rng([self._seed, number]))
        for part in np.array_split(order, self.num_steps)[first_step:]:
            yield self._rows[part]


class Loader:
    """Batches of a plan, loaded in order on one thread, two batches ahead.

    `load` reads a batch and moves it to the device; under torchrun only this process's part, `own_slice`. `waited_s`
    counts the seconds that the training loop waited for a batch.
    """

    def __init__(self, plan: BatchPlan, load: Callable[[Any], Any]) -> None:
        self._plan, self._load = plan, load
        self.num_steps, self.num_samples = plan.num_steps, plan.num_samples
        self.waited_s = 0.0

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[Any]:
        """Iterate over the loaded batches of one epoch, from a step on."""
        with ThreadPoolExecutor(1, "loader") as executor:
            pending: deque[Future[Any]] = deque()
            for batch in self._plan.epoch(number, first_step=first_step):
                pending.append(executor.submit(self._load, batch))
                if len(pending) > _NUM_PREFETCHED:
                    yield self._wait(pending.popleft())
            while pending:
                yield self._wait(pending.popleft())

    def _wait(self, future: "Future[Any]") -> Any:
        started = time.perf_counter()
        loaded = future.result()
        self.waited_s += time.perf_counter() - started
        return loaded


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
