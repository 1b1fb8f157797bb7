"""Keep the geometry of a frozen encoder: what is near before a projector should be near after it."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from embedcache.train.losses import tiles


def structure(inputs_BD: Tensor, outputs_BP: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Get how far the neighbourhoods of a batch differ before and after projection, from 0 to log 2.

    The STRUCTURE term of "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You" (2025): each side is
    centred over the batch and scaled to length 1; the softmax over its similarities, that to itself among them, is an
    item's neighbourhood; the mean over the items of the Jensen-Shannon divergence between both is the result, in nats.

    Only the paper's first level: level l compares the l-th powers of both (B, B) matrices, at a cost cubic in B. The
    authors' code scales first and centres then.

    No (B, B) matrix is held, and backward makes each tile again. Memory: some fifteen tiles of `tiles.TILE_ROWS` × B.

    Args:
        inputs_BD: (B, D) float32 or float64, what the projector was given; no gradient flows into it.
        outputs_BP: (B, P), alike, what it gave; of any length. B is at least 1; up to 2 items give 0.
        temperature: what similarities are divided by. 0.05 is the authors' setting.

    Returns:
        A scalar, differentiable in the outputs.
    """
    before_BD, after_BP = _directions(inputs_BD), _directions(outputs_BP)
    result: Tensor = _Divergence.apply(before_BD, after_BP, temperature)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    # One node for all tiles: with a checkpoint each, what lives on between them keeps malloc from using freed tiles
    # again, and a batch of 16,384 took as much as the (B, B) matrix.
    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(before, after)
        ctx.temperature = temperature
        total = after.new_zeros(())
        for _, log_p, log_q, log_middle in _tiles(before, after, temperature):
            total += (log_p.exp() * (log_p - log_middle)).sum() + (log_q.exp() * (log_q - log_middle)).sum()
        return total / (2 * len(after))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        before, after = ctx.saved_tensors
        total = torch.zeros_like(after)
        for rows, _, log_q, log_middle in _tiles(before, after, ctx.temperature):
            q, slopes = log_q.exp(), log_q - log_middle  # slopes: twice the divergence by q
            weights = q * (slopes - (q * slopes).sum(dim=1, keepdim=True))
            total.addmm_(weights.T, after[rows])
            total[rows].addmm_(weights, after)
        return None, total * (gradient / (2 * len(after) * ctx.temperature)), None


def _directions(vectors_BD: Tensor) -> Tensor:
    return normalize(vectors_BD - vectors_BD.mean(dim=0), dim=1)


def _tiles(before: Tensor, after: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Go through tiles of rows: the logarithms, (T, B) each, of both neighbourhoods and of the mean of both."""
    for start in range(0, len(after), tiles.TILE_ROWS):
        rows = slice(start, start + tiles.TILE_ROWS)
        log_p, log_q = (torch.log_softmax(side[rows] @ side.T / temperature, dim=1) for side in (before, after))
        yield rows, log_p, log_q, torch.logaddexp(log_p, log_q) - math.log(2)
