"""Training losses over all pairs of a batch: exact sums, tile by tile, without a (B, M) matrix.

A loss from a plug-in is a `torch.nn.Module` with the interface of `Loss`; `embedcache.testing.losses` has the tests
that it must pass.

The backward pass keeps the tiles of the forward pass if all of them fit into `HELD_BYTES`, and otherwise computes them
again, to the same bits. Several processes divide the tiles. Under autocast the matrix products use its dtype,
everything else float32. Memory: a few tiles of `TILE_ROWS` rows and all columns, the tiles that are kept, the vectors
of all positives, and two gradients per modality.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus
from torch.utils.checkpoint import checkpoint

from embedcache.errors import SettingError
from embedcache.registry import Registry, bind
from embedcache.train.distributed import (
    divided,
    log_sum_over_processes,
    num_processes,
    process_rank,
    sum_over_processes,
)

LOSSES = Registry(
    "loss",
    {
        "info_nce": "embedcache.train.losses:InfoNce",
        "multi_positive": "embedcache.train.losses:MultiPositive",
        "sail": "embedcache.train.losses:Sail",
        "siglip": "embedcache.train.losses:SigLip",
    },
    group="embedcache.losses",
    arguments=0,
    has_parameters=True,
)

TILE_ROWS = 512
"""Rows of a tile, which has all columns; fewer in a batch of more than 16,384."""

HELD_BYTES = 2**26
"""Memory of each process for tiles of the forward pass: 4,096 × 4,096 values in float32."""

_TILE_VALUES = 2**23
_LEFT_OUT = -1e30  # finite: of columns that a tile leaves out as a whole, too, the gradient is 0
_MAX_SAFE_SCALE = math.log(torch.finfo(torch.float32).max) / 2 - 4
"""Below it, e^logit neither vanishes nor overflows in float32, as logits of unit vectors lie in ± scale."""


@dataclass(frozen=True, kw_only=True)
class Positives:
    """Pairs of items of a batch that belong together: those of one sample, and others of equal content.

    Args:
        first: (E,) int64 positions of items of the pair's first modality, such as images, ascending.
        second: (E,) int64 positions of items of the second one, such as texts; each pair is listed once.
        excluded: (A,) positions of first and of second items of pairs that are neither positives nor negatives, such as
            those of near-duplicates, the first ascending; None: there are none.
    """

    first: Tensor
    second: Tensor
    excluded: tuple[Tensor, Tensor] | None = None


class Loss(Protocol):
    """A `torch.nn.Module`, built with the arguments that its text names, as in `siglip:bias=-5`.

    Its own parameters are trained with those of the projectors.

    One that takes one second item per first one has the class attribute `has_all_captions = False`: training on all
    captions is then refused, see `check_loss`.
    """

    def __call__(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        """Compute the loss of a batch, a scalar.

        Args:
            first_BP: (B, P) float32 or float64, rows of length 1: items of the first modality, such as images.
            second_MP: (M, P), those of the second. M is B, and row k belongs to row k of the first, unless all captions
                are positives.
            scale: scalar, the inverse of the temperature.
            positives: all pairs that belong together, and pairs that must be left out.
        """
        ...


def check_loss(name: str, captions: str) -> None:
    """Check a loss and the arguments that its text names, and that it takes all captions if these are the positives.

    Raises:
        UnknownNameError: there is no loss of that name, or it has no such parameter.
        SettingError: a parameter is of another type; or `captions` is `all`, and it takes one text per image.
    """
    loss = bind(LOSSES, name).func
    if captions == "all" and not getattr(loss, "has_all_captions", True):
        raise SettingError(
            f"captions: expected draw, got all: {name} has one positive per image; use captions=draw or "
            "loss=multi_positive"
        )


class InfoNce(nn.Module):
    """Symmetric InfoNCE: cross-entropy of each item's own partner among those of the batch, in both directions.

    Other pairs that belong together are not negatives: they are left out. The loss of CLIP, "Learning Transferable
    Visual Models From Natural Language Supervision" (2021), figure 3.
    """

    has_all_captions = False

    def forward(self, first_BP: Tensor, second_BP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        is_other = positives.first != positives.second
        masked = (positives.first[is_other], positives.second[is_other])
        if positives.excluded is not None:
            rows, columns = (torch.cat(sides) for sides in zip(masked, positives.excluded, strict=True))
            order = torch.argsort(rows, stable=True)
            masked = (rows[order], columns[order])
        over_second, over_first = _log_sum_exp(first_BP, second_BP, scale, masked)
        own = scale * (first_BP * second_BP).sum(dim=1)
        return (over_second + over_first).mean() / 2 - own.mean()


class MultiPositive(nn.Module):
    """Symmetric InfoNCE with several positives of equal weight.

    The cross-entropy between the softmax of the similarities and a uniform distribution over the positives, averaged
    over both directions. With one positive per row it is `InfoNce`. It is SupCon's L_out, "Supervised Contrastive
    Learning" (2020), equation 2, between two modalities.
    """

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        over_second, over_first = _log_sum_exp(first_BP, second_MP, scale, positives.excluded)
        logits_E = _logits_of(first_BP, second_MP, scale, (positives.first, positives.second))
        of_first = over_second.mean() - (_weights(positives.first, logits_E.dtype) * logits_E).sum() / len(first_BP)
        of_second = over_first.mean() - (_weights(positives.second, logits_E.dtype) * logits_E).sum() / len(second_MP)
        return (of_first + of_second) / 2


def _weights(positions_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / (number of positives) of the item of each pair."""
    return torch.bincount(positions_E)[positions_E].to(dtype).reciprocal()


class SigLip(nn.Module):
    """Binary cross-entropy of each pair of the batch, with a learned bias that starts at `bias`.

    -1/B Σ log sigmoid(z (scale · cosine + bias)) over all pairs that are not excluded, z = 1 for those that belong
    together, else -1.
    "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1.
    """

    def __init__(self, bias: float = -10.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        return self._sum(first_BP, second_MP, scale, positives) / len(first_BP)

    def _sum(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        bias = self.bias.to(first_BP.dtype)
        logits_E = _logits_of(first_BP, second_MP, scale, (positives.first, positives.second))
        # As log sigmoid(x) = x - softplus(x) and log sigmoid(-x) = -softplus(x).
        total = _softplus_sum(first_BP, second_MP, scale, bias) - (logits_E + bias).sum()
        if positives.excluded is None:
            return total
        return total + logsigmoid(-_logits_of(first_BP, second_MP, scale, positives.excluded) - bias).sum()


class Sail(SigLip):
    """SigLIP's loss averaged over all B × M pairs.

    The loss of SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025).
    """

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        return self._sum(first_BP, second_MP, scale, positives) / (len(first_BP) * len(second_MP))


def _logits_of(left_BP: Tensor, right_MP: Tensor, scale: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the (E,) logits of pairs given as (E,) rows and (E,) columns."""
    rows_E, columns_E = pairs
    # The backward pass of `index_select` sums in the order of the pairs; that of indexing in any order.
    return scale * (left_BP.index_select(0, rows_E) * right_MP.index_select(0, columns_E)).sum(dim=1)


def _log_sum_exp(
    left_BP: Tensor, right_MP: Tensor, scale: Tensor, masked: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute log Σ exp of the logits scale · left · right', over each row and over each column: (B,) and (M,).

    `masked` are (E,) rows, ascending, and (E,) columns of logits that are left out; each row and column keeps one.
    """
    is_safe = _is_safe(scale)

    def of_tile(left_TP: Tensor, right_MP: Tensor, scale: Tensor, start: int) -> tuple[Tensor, Tensor]:
        logits_TM = _products(left_TP * scale, right_MP)
        if masked is not None and len(masked[0]):
            _mask(logits_TM, *masked, start)
        if not is_safe:
            return logits_TM.logsumexp(dim=1), logits_TM.logsumexp(dim=0)
        powers_TM = logits_TM.exp_()
        return powers_TM.sum(dim=1), powers_TM.sum(dim=0)

    def of_process(left_BP: Tensor, right_MP: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        empty = 0.0 if is_safe else -math.inf
        over_rows_B = left_BP.new_full((len(left_BP),), empty)
        over_columns_M = right_MP.new_full((len(right_MP),), empty)
        for rows, (of_rows, of_columns) in _tiles(of_tile, left_BP, right_MP, scale):
            over_rows_B[rows] = of_rows
            over_columns_M = over_columns_M + of_columns if is_safe else torch.logaddexp(over_columns_M, of_columns)
        return over_rows_B, over_columns_M

    parts = divided(of_process, left_BP, right_MP, scale)
    over_rows, over_columns = (
        sum_over_processes(part).log() if is_safe else log_sum_over_processes(part) for part in parts
    )
    return over_rows, over_columns


def _softplus_sum(left_BP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute Σ log(1 + exp(logit + bias)) over all pairs, a scalar."""

    def of_tile(left_TP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        del start
        logits_TM = _products(left_TP * scale, right_MP) + bias
        return softplus(logits_TM, threshold=40.0).sum()  # the gradient is exact up to there

    def of_process(left_BP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
        total = left_BP.new_zeros(())
        for _, of_one in _tiles(of_tile, left_BP, right_MP, scale, bias):
            total = total + of_one
        return (total,)

    (part,) = divided(of_process, left_BP, right_MP, scale, bias)
    return sum_over_processes(part)


def _tiles(
    function: Callable[..., Any], left_BP: Tensor, right_MP: Tensor, *others: Tensor
) -> Iterator[tuple[slice, Any]]:
    """Iterate over this process's tiles of rows, and what a function returns for each.

    The backward pass computes the tiles again, unless all of them fit into `HELD_BYTES`.
    """
    num_rows = max(1, min(TILE_ROWS, _TILE_VALUES // len(right_MP)))
    starts = range(0, len(left_BP), num_rows)[process_rank() :: num_processes()]
    fits = len(left_BP) * len(right_MP) * left_BP.itemsize // num_processes() <= HELD_BYTES
    for start in starts:
        rows = slice(start, start + num_rows)
        arguments = left_BP[rows], right_MP, *others, start
        yield rows, function(*arguments) if fits else checkpoint(function, *arguments, use_reentrant=False)


def _products(left_TP: Tensor, right_MP: Tensor) -> Tensor:
    """Compute products in the dtype of autocast, if it is enabled: (T, M) in the dtype of the rows."""
    return (left_TP @ right_MP.T).to(left_TP.dtype)


def _mask(logits_TM: Tensor, rows: Tensor, columns: Tensor, start: int) -> None:
    """Leave logits of a tile out, given ascending rows, and columns, of the whole matrix."""
    edges = torch.tensor([start, start + len(logits_TM)], device=rows.device)
    part = slice(*torch.searchsorted(rows, edges).tolist())
    logits_TM[rows[part] - start, columns[part]] = _LEFT_OUT


def _is_safe(scale: Tensor) -> bool:
    """Return whether no logit can overflow; false on a GPU, which would have to synchronize to answer."""
    return scale.device.type == "cpu" and abs(scale.item()) <= _MAX_SAFE_SCALE
