"""Sums over all pairs of a batch, a tile of rows at a time: exact, and no (B, N) matrix is ever held.

Backward makes each tile again. Processes that train together share the tiles out. Memory: two tiles of
`TILE_ROWS` × N.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from embedcache.train.distributed import log_sum_over_processes, num_processes, process_number, sum_over_processes

TILE_ROWS = 256

_MOST_SAFE_SCALE = math.log(torch.finfo(torch.float32).max) / 2 - 4
"""Below it, e^(logit - scale) neither vanishes nor overflows in float32, as logits of unit vectors lie in ± scale."""


def log_sum_exp(
    left_BP: Tensor, right_NP: Tensor, scale: Tensor, hidden: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Get log Σ exp of all logits, over each row and over each column.

    Args:
        left_BP: (B, P) rows of length 1.
        right_NP: (N, P) rows of length 1.
        scale: scalar; logits are scale · left · right'.
        hidden: (E,) rows, ascending, and (E,) columns of logits that are left out; every row and column keeps one.

    Returns:
        (B,) and (N,), differentiable in both sides and the scale.
    """
    rows, columns = hidden or (torch.empty(0, dtype=torch.int64, device=left_BP.device),) * 2
    result: tuple[Tensor, Tensor] = _LogSumExp.apply(left_BP, right_NP, scale, rows, columns)  # type: ignore[no-untyped-call]
    return result


def softplus_sum(left_BP: Tensor, right_NP: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Get Σ log(1 + exp(logit + bias)) over all pairs, a scalar; the arguments are those of `log_sum_exp`."""
    result: Tensor = _SoftplusSum.apply(left_BP, right_NP, scale, bias)  # type: ignore[no-untyped-call]
    return result


def logits_of(left_BP: Tensor, right_NP: Tensor, scale: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Get the logits of some pairs: (E,). Memory: E × P."""
    rows, columns = pairs
    return scale * (left_BP[rows] * right_NP[columns]).sum(dim=1)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, scale: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        over_rows = left.new_zeros(len(left))
        over_columns = left.new_full((len(right),), 0.0 if _is_safe(scale) else -math.inf)
        for tile, logits in _tiles(left, right, scale, rows, columns):
            if _is_safe(scale):
                powers = logits.sub_(scale).exp_()
                over_rows[tile] = powers.sum(dim=1)
                over_columns += powers.sum(dim=0)
            else:
                over_rows[tile] = logits.logsumexp(dim=1)
                over_columns = torch.logaddexp(over_columns, logits.logsumexp(dim=0))
        sum_over_processes(over_rows)
        if _is_safe(scale):
            sum_over_processes(over_columns)
            over_rows, over_columns = (sums.log_().add_(scale) for sums in (over_rows, over_columns))
        else:
            over_columns = log_sum_over_processes(over_columns)
        ctx.save_for_backward(left, right, scale, rows, columns, over_rows, over_columns)
        return over_rows, over_columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, rows, columns, over_rows, over_columns = ctx.saved_tensors
        gradients = _Gradients(left, right)
        if _is_safe(scale):
            by_row = row_gradient * (scale - over_rows).exp()
            by_column = column_gradient * (scale - over_columns).exp()
        for tile, logits in _tiles(left, right, scale, rows, columns):
            if _is_safe(scale):
                weights = logits.sub_(scale).exp_().mul_(by_row[tile, None] + by_column)
            else:
                weights = (logits - over_rows[tile, None]).exp_().mul_(row_gradient[tile, None])
                weights += logits.sub_(over_columns).exp_().mul_(column_gradient)
            gradients.add(tile, weights)
        return (*gradients.result(scale), None, None)


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(left, right, scale, bias)
        total = left.new_zeros(())
        for _, logits in _tiles(left, right, scale):
            total += softplus(logits.add_(bias)).sum()
        sum_over_processes(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        left, right, scale, bias = ctx.saved_tensors
        gradients, bias_gradient = _Gradients(left, right), torch.zeros_like(bias)
        for tile, logits in _tiles(left, right, scale):
            weights = logits.add_(bias).sigmoid_().mul_(gradient)
            bias_gradient += weights.sum()
            gradients.add(tile, weights)
        sum_over_processes(bias_gradient)
        return (*gradients.result(scale), bias_gradient)


class _Gradients:
    """Adds up what the gradient of each logit gives to both sides and the scale."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right
        self._left_sum, self._right_sum = torch.zeros_like(left), torch.zeros_like(right)

    def add(self, tile: slice, weights_TN: Tensor) -> None:
        torch.mm(weights_TN, self._right, out=self._left_sum[tile])
        self._right_sum.addmm_(weights_TN.T, self._left[tile])

    def result(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sum_over_processes(self._left_sum, self._right_sum)
        scale_gradient = (self._left_sum * self._left).sum()
        return self._left_sum.mul_(scale), self._right_sum.mul_(scale), scale_gradient


def _tiles(
    left: Tensor, right: Tensor, scale: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Go through this process's tiles of logits, each a new (T, N) tensor, -inf where hidden."""
    starts = range(0, len(left), TILE_ROWS)
    bounds = [0] * (len(starts) + 1)
    if rows is not None and len(rows):
        edges = torch.tensor([*starts, len(left)], device=rows.device)
        bounds = torch.searchsorted(rows, edges).tolist()
    for number, start in list(enumerate(starts))[process_number() :: num_processes()]:
        tile = slice(start, start + TILE_ROWS)
        logits = (left[tile] * scale) @ right.T
        if rows is not None and columns is not None and bounds[number] < bounds[number + 1]:
            part = slice(bounds[number], bounds[number + 1])
            logits[rows[part] - start, columns[part]] = -math.inf
        yield tile, logits


def _is_safe(scale: Tensor) -> bool:
    """Say whether one shift does for all sums. Asking a GPU would make it wait, so there the answer is no."""
    return scale.device.type == "cpu" and abs(scale.item()) <= _MOST_SAFE_SCALE
