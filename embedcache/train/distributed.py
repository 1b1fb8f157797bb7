"""Training one pair with several processes, as started by torchrun: negatives come from all processes.

Each process projects its part of every batch and holds all embeddings; the tiles of the loss are divided among them.
"""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedcache.errors import EmbedcacheError, SettingError

T = TypeVar("T")

_GROUP_NUMBERS = itertools.count()


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if any, and yield this process's device: of `cuda` its own GPU."""
    if num_started() == 1 or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    store, rank, world_size = _join_store()
    prefix = f"group {next(_GROUP_NUMBERS)}"  # without it, processes would find the addresses of the earlier groups
    own_store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=own_store, rank=rank, world_size=world_size)
    try:
        yield device
        dist.barrier()  # the first process, which the others connect to, must not exit before them
    finally:
        gc.collect()  # DistributedDataParallel's cycles hold the group; freed at exit, its threads abort the process
        dist.destroy_process_group()


@cache
def _join_store() -> tuple[Any, int, int]:
    """Return the store through which the processes find each other, this one's rank, and their number.

    The store of the first process must exist as long as others use it: it is kept for the next group.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    return store, rank, world_size


def num_started() -> int:
    """Return the number of processes that torchrun started, by its environment, before a process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_process() -> bool:
    """Return whether this process has rank 0 by torchrun's environment, before a process group exists."""
    return os.environ.get("RANK", "0") == "0"


def broadcast_from_first(value: T) -> T:
    """Return the first process's value on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def run_on_first(call: Callable[[], T]) -> T | None:
    """Call a function on the first process only; an EmbedcacheError raised there is re-raised on every rank."""
    outcome, error = None, None
    if process_rank() == 0:
        try:
            outcome = call()
        except EmbedcacheError as raised:
            error = raised
    error = broadcast_from_first(error)
    if error is not None:
        raise error
    return outcome


def gather_objects(value: Any) -> list[Any]:
    """Return one value per process, in order of rank."""
    values = [value] * num_processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def own_slice(count: int) -> slice:
    """Return this process's part of `count` items: consecutive, of equal size to within one."""
    rank, processes = process_rank(), num_processes()
    return slice(count * rank // processes, count * (rank + 1) // processes)


def check_batches(num_items: int, num_batches: int = 1, *, least: int = 1) -> None:
    """Check that batches, which are of equal size to within one, have enough items for all processes.

    Args:
        num_items: items of all batches.
        num_batches: number of batches.
        least: items that each process must have: 2 for batch normalization.

    Raises:
        SettingError: some have fewer.
    """
    if num_items < num_batches * num_processes() * least:
        needed = "one item" if least == 1 else f"{least} items, for batch normalization,"
        raise SettingError(
            f"batch_size: expected at least {needed} per process in each batch, got {num_items // num_batches} for "
            f"{num_processes()} processes; raise --batch-size, or start fewer processes"
        )


def gather_rows(own_BD: Tensor, num_rows: int) -> Tensor:
    """Collect the rows of all processes: (own, D) -> (num_rows, D), differentiable.

    The gradient, averaged over processes by DistributedDataParallel, is that of one process with all rows.
    """
    if not dist.is_initialized():
        return own_BD
    gathered: Tensor = _GatherRows.apply(own_BD, num_rows)  # type: ignore[no-untyped-call]
    return gathered


def divided(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Call a function that computes this process's part of sums; the gradients of its inputs are those of all parts."""
    if not dist.is_initialized():
        return function(*inputs)
    outputs: tuple[Tensor, ...] = _Divided.apply(function, *inputs)  # type: ignore[no-untyped-call]
    return outputs


def sum_over_processes(part: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; each process has the gradient of all of it."""
    if not dist.is_initialized():
        return part
    total: Tensor = _Sum.apply(part)  # type: ignore[no-untyped-call]
    return total


def log_sum_over_processes(logs: Tensor) -> Tensor:
    """Return the elementwise log of the sum of e^logs over all processes; -inf adds nothing."""
    if not dist.is_initialized():
        return logs
    highest = logs.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return sum_over_processes((logs - highest).exp()).log() + highest


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Divided(torch.autograd.Function):
    # One node for all inputs: the collective calls of processes, of which some may have no part, come in one order.
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.inputs = [each.detach().requires_grad_() for each in inputs]
            ctx.outputs = function(*ctx.inputs)
        return tuple(each.detach() for each in ctx.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        results = [torch.zeros_like(each) for each in ctx.inputs]
        if ctx.outputs[0].requires_grad:  # this process has a part
            results = list(torch.autograd.grad(ctx.outputs, ctx.inputs, gradients))
        for each in results:
            dist.all_reduce(each)
        return None, *results


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, num_rows: int) -> Tensor:
        ctx.num_rows = num_rows
        rows = own.new_zeros(num_rows, *own.shape[1:])
        rows[own_slice(num_rows)] = own
        dist.all_reduce(rows)  # parts differ by a row, which all_gather does not allow
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[own_slice(ctx.num_rows)] * num_processes(), None
