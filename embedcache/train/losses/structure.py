"""Keep the geometry of a frozen encoder: what is near before a projector should be near after it."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from embedcache.train.losses import tiles


def structure(inputs_BD: Tensor, outputs_BP: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Get how far the neighbourhoods of a batch differ before and after projection, from 0 to log 2.

    The STRUCTURE term of "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You" (2025): each side is
    centred over the batch and scaled to length 1; the softmax over its similarities, that to itself among them, is an
    item's neighbourhood; the mean over the items of the Jensen-Shannon divergence between both is the result, in nats.

    Only the paper's first level: level l compares the l-th powers of both (B, B) matrices, at a cost cubic in B. The
    authors' code scales first and centres then.

    No (B, B) matrix is held, and backward makes each tile again. Memory: some ten tiles of `tiles.TILE_ROWS` × B.

    Args:
        inputs_BD: (B, D) float32 or float64, what the projector was given; no gradient flows into it.
        outputs_BP: (B, P), alike, what it gave; of any length. B is at least 1; up to 2 items give 0.
        temperature: what similarities are divided by. 0.05 is the authors' setting.

    Returns:
        A scalar, differentiable in the outputs.
    """
    inputs_BD, outputs_BP = _directions(inputs_BD.detach()), _directions(outputs_BP)
    total = outputs_BP.new_zeros(())
    for start in range(0, len(outputs_BP), tiles.TILE_ROWS):
        rows = slice(start, start + tiles.TILE_ROWS)
        # The tile draws no random numbers, whose state would cost a copy.
        total = total + checkpoint(
            _divergence, inputs_BD, outputs_BP, rows, temperature, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(outputs_BP)


def _directions(vectors_BD: Tensor) -> Tensor:
    return normalize(vectors_BD - vectors_BD.mean(dim=0), dim=1)


def _divergence(inputs_BD: Tensor, outputs_BP: Tensor, rows: slice, temperature: float) -> Tensor:
    """Sum the Jensen-Shannon divergences of some rows."""
    before_TB, after_TB = (
        torch.log_softmax(vectors[rows] @ vectors.T / temperature, dim=1) for vectors in (inputs_BD, outputs_BP)
    )
    middle_TB = torch.logaddexp(before_TB, after_TB) - math.log(2)
    to_middle = (side_TB.exp() * (side_TB - middle_TB) for side_TB in (before_TB, after_TB))
    return sum(to_middle, torch.zeros_like(middle_TB)).sum() / 2
