"""Several processes that train one pair, as torchrun starts them. Embeddings are gathered: negatives cross them.

Each process projects its share of every batch and holds all embeddings; the loss's tiles are shared out as well.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedcache.errors import EmbedcacheError

T = TypeVar("T")


@contextmanager
def joined_processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started; alone, do nothing.

    Args:
        device: asked for; `cuda` becomes this process's own.

    Yields:
        The device of this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
        dist.barrier()  # or the first process, which the others meet at, may be gone before them
    finally:
        gc.collect()  # DistributedDataParallel's cycles hold the group; freed at exit, its threads abort the process
        dist.destroy_process_group()


def num_processes() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_process() -> bool:
    """Say whether this is the process that prints, by what torchrun told it; before any of them joined."""
    return os.environ.get("RANK", "0") == "0"


def process_number() -> int:
    """Get this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(value: T) -> T:
    """Give every process what the first one has."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def on_first(call: Callable[[], T]) -> T | None:
    """Call on the first process alone; a mistake of the user's that it meets is raised on all."""
    outcome, error = None, None
    if process_number() == 0:
        try:
            outcome = call()
        except EmbedcacheError as found:
            error = found
    error = from_first(error)
    if error is not None:
        raise error
    return outcome


def of_all(value: Any) -> list[Any]:
    """Collect one value of each process, in their order."""
    values = [value] * num_processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def own_share(count: int) -> slice:
    """Get this process's part of `count` things: equal parts, to one."""
    number, processes = process_number(), num_processes()
    return slice(count * number // processes, count * (number + 1) // processes)


def gather_rows(own_BD: Tensor, count: int) -> Tensor:
    """Collect the rows of all processes: (own, D) -> (count, D), differentiable.

    The gradient of a mean over processes, as DistributedDataParallel takes it, is that of one process with all rows.

    Args:
        own_BD: the rows of `own_share(count)`.
        count: of all rows.
    """
    if not dist.is_initialized():
        return own_BD
    gathered: Tensor = _GatherRows.apply(own_BD, count)  # type: ignore[no-untyped-call]
    return gathered


def sum_over_processes(*tensors: Tensor) -> None:
    """Add up each tensor over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def log_sum_over_processes(logs: Tensor) -> Tensor:
    """Get the log of the sum over all processes of e^logs, place by place; -inf adds nothing."""
    if not dist.is_initialized():
        return logs
    highest = logs.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    sums = (logs - highest).exp()
    dist.all_reduce(sums)
    return sums.log() + highest


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int) -> Tensor:
        ctx.count = count
        rows = own.new_zeros(count, *own.shape[1:])
        rows[own_share(count)] = own
        dist.all_reduce(rows)  # as shares differ by a row, which all_gather cannot
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[own_share(ctx.count)] * num_processes(), None
