"""Contrastive losses over all pairs of a batch.

A contrastive loss pulls the two items of a pair together and pushes all other pairs of the batch apart. Larger batches
have more and harder negatives, so no loss here stores the (B, M) matrix of similarities: exact sums are computed tile
by tile.

A loss from a plug-in is a `torch.nn.Module` with the interface of `Loss`. It must pass the tests in
`embedcache.testing.losses`.

The backward pass keeps the tiles of the forward pass if all of them fit into `KEPT_BYTES`. Otherwise it recomputes
them, to the same bits. Several processes divide the tiles. Under autocast the matrix products use its dtype, and
everything else is float32. Memory: a few tiles of `TILE_ROWS` rows and all columns, the kept tiles, the vectors of all
positives, and two gradients per modality.
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

KEPT_BYTES = 2**26
"""Memory of each process for tiles of the forward pass: 4,096 × 4,096 values in float32."""

_TILE_VALUES = 2**23
# Finite, so that the gradient is 0 even if a tile leaves out a whole column.
_LEFT_OUT = -1e30
_MAX_SAFE_SCALE = math.log(torch.finfo(torch.float32).max) / 2 - 4
"""Below it, e^logit neither vanishes nor overflows in float32, as logits of unit vectors lie in ± scale."""


@dataclass(frozen=True, kw_only=True)
class Positives:
    """The pairs of a batch that belong together, because they are of one sample or have equal content.

    Args:
        first: (A,) int64 positions of items of the pair's first modality, such as images, ascending.
        second: (A,) int64 positions of items of the second modality, such as texts. Each pair is listed once.
        excluded: two (A,) arrays with the positions of the first and second items of pairs that are neither positives
            nor negatives, such as near-duplicates. The first ones are ascending. If None, every other pair is negative.

    Example:
        Image 0 has two captions, image 1 has one:

        >>> import torch
        >>> from embedcache.train.losses import Positives
        >>> pairs = Positives(first=torch.tensor([0, 0, 1]), second=torch.tensor([0, 1, 2]))
        >>> list(zip(pairs.first.tolist(), pairs.second.tolist()))
        [(0, 0), (0, 1), (1, 2)]
    """

    first: Tensor
    second: Tensor
    excluded: tuple[Tensor, Tensor] | None = None


class Loss(Protocol):
    """The interface of a loss: a `torch.nn.Module`, built with the arguments that its name has, as in `siglip:bias=-5`.

    Its own parameters are trained with those of the projectors.

    A loss that needs exactly one second item per first item has the class attribute `has_all_captions = False`.
    `check_loss` then rejects training on all captions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Pull(nn.Module):  # without negatives, so it is only a part of a loss
        ...     def forward(self, first_BP, second_MP, scale, positives):
        ...         cosines_A = (first_BP[positives.first] * second_MP[positives.second]).sum(dim=1)
        ...         return (1 - cosines_A).mean()
        >>> pairs = torch.arange(2)
        >>> Pull()(torch.eye(2), torch.eye(2), torch.tensor(20.0), Positives(first=pairs, second=pairs)).item()
        0.0
    """

    def __call__(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        """Compute the loss of a batch, a scalar.

        Args:
            first_BP: (B, P) float32 or float64, rows of length 1: items of the first modality, such as images.
            second_MP: (M, P), items of the second modality. M is B, and row k belongs to row k of the first, unless all
                captions are positives.
            scale: scalar, the inverse of the temperature. It multiplies the cosines.
            positives: all pairs that belong together, and pairs that must be left out.
        """
        ...


def check_loss(name: str, captions: str) -> None:
    """Check the name of a loss, its arguments, and whether it accepts all captions if these are the positives.

    Raises:
        UnknownNameError: there is no loss of that name, or it has no such parameter.
        SettingError: a parameter has another type, or `captions` is `all` and the loss needs one text per image.
    """
    loss = bind(LOSSES, name).func
    if captions == "all" and not getattr(loss, "has_all_captions", True):
        raise SettingError(
            f"captions: expected draw, got all: {name} has one positive per image; use captions=draw or "
            "loss=multi_positive"
        )


class InfoNce(nn.Module):
    """Symmetric InfoNCE, the loss of CLIP.

    In plain words: for each image, the loss asks which text of the batch is its own, as a classification among all M
    texts. It asks the same for each text among all images, and averages both cross-entropies.

    Inputs: one second item per first item, as `Loss` describes. Other pairs of the batch that belong together, such as
    equal captions, are not negatives. They are left out of the sums.

    Relations: `MultiPositive` counts these pairs as positives instead, and accepts several captions per image. `SigLip`
    judges each pair on its own, without a softmax.

    "Learning Transferable Visual Models From Natural Language Supervision" (2021), figure 3.

    Example:
        >>> import torch
        >>> from embedcache.train.losses import InfoNce, Positives
        >>> vectors_BP, scale = torch.eye(4), torch.tensor(20.0)
        >>> positives = Positives(first=torch.arange(4), second=torch.arange(4))
        >>> round(InfoNce()(vectors_BP, vectors_BP, scale, positives).item(), 4)  # each item finds its partner
        0.0
        >>> round(InfoNce()(vectors_BP, vectors_BP.flip(0), scale, positives).item(), 1)  # each finds another
        20.0
    """

    has_all_captions = False

    def forward(self, first_BP: Tensor, second_BP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        is_other = positives.first != positives.second
        masked = (positives.first[is_other], positives.second[is_other])

        if positives.excluded is not None:
            # `_mask` finds the rows of a tile by bisection, so both lists become one in ascending order.
            rows = torch.cat([masked[0], positives.excluded[0]])
            columns = torch.cat([masked[1], positives.excluded[1]])
            order = torch.argsort(rows, stable=True)
            masked = (rows[order], columns[order])

        rows_B, columns_M = _log_sum_exp(first_BP, second_BP, scale, masked)
        positive_logits_B = scale * (first_BP * second_BP).sum(dim=1)
        return (rows_B + columns_M).mean() / 2 - positive_logits_B.mean()


class MultiPositive(nn.Module):
    """Symmetric InfoNCE with several positives of equal weight.

    In plain words: an image with three captions should spread its softmax evenly over the three, and each caption
    should find its image. The loss is the cross-entropy between the softmax of the similarities and the uniform
    distribution over the positives, averaged over both directions.

    Inputs: any number of positives per item, at least one each.

    Relations: with one positive per item it equals `InfoNce`. It is SupCon's L_out, "Supervised Contrastive Learning"
    (2020), equation 2, between two modalities.

    Example:
        >>> import torch
        >>> from embedcache.train.losses import MultiPositive, Positives
        >>> images_BP, texts_MP = torch.eye(2), torch.eye(2)[[0, 0, 1]]
        >>> positives = Positives(first=torch.tensor([0, 0, 1]), second=torch.tensor([0, 1, 2]))
        >>> loss = MultiPositive()(images_BP, texts_MP, torch.tensor(20.0), positives)
        >>> round(loss.item(), 3)  # log 2 / 4, since two captions share the softmax of image 0
        0.173
    """

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        rows_B, columns_M = _log_sum_exp(first_BP, second_MP, scale, positives.excluded)
        logits_A = _logits_of(first_BP, second_MP, scale, (positives.first, positives.second))

        first_weights_A = _weights(positives.first, logits_A.dtype)
        first_loss = rows_B.mean() - (first_weights_A * logits_A).sum() / len(first_BP)

        second_weights_A = _weights(positives.second, logits_A.dtype)
        second_loss = columns_M.mean() - (second_weights_A * logits_A).sum() / len(second_MP)
        return (first_loss + second_loss) / 2


def _weights(positions_A: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / (number of positives) of the item of each pair."""
    return torch.bincount(positions_A)[positions_A].to(dtype).reciprocal()


class SigLip(nn.Module):
    """The sigmoid loss of SigLIP: each pair of the batch is classified on its own as matching or not.

    In plain words: the loss is -1/B Σ log sigmoid(z (scale · cosine + bias)) over all B × M pairs that are not
    excluded. z is 1 for pairs that belong together, else -1. The bias is learned. It starts at a negative `bias`,
    because almost all pairs of a batch do not match.

    Inputs: any number of positives per item.

    Relations: there is no softmax as in `InfoNce`, so the term of a pair depends on that pair only. `Sail` is the same
    sum, averaged over all pairs.

    "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1.

    Args:
        bias: the initial bias.

    Example:
        >>> import torch
        >>> from embedcache.train.losses import Positives, SigLip
        >>> vectors_BP, scale = torch.eye(4), torch.tensor(20.0)
        >>> positives = Positives(first=torch.arange(4), second=torch.arange(4))
        >>> round(SigLip(bias=-10.0)(vectors_BP, vectors_BP, scale, positives).item(), 4)
        0.0002
        >>> round(SigLip(bias=-10.0)(vectors_BP, vectors_BP.flip(0), scale, positives).item(), 1)
        20.0
    """

    def __init__(self, bias: float = -10.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        return self._sum(first_BP, second_MP, scale, positives) / len(first_BP)

    def _sum(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        bias = self.bias.to(first_BP.dtype)
        logits_A = _logits_of(first_BP, second_MP, scale, (positives.first, positives.second))

        # As log sigmoid(x) = x - softplus(x) and log sigmoid(-x) = -softplus(x), all pairs count as negatives first.
        total = _softplus_sum(first_BP, second_MP, scale, bias) - (logits_A + bias).sum()
        if positives.excluded is None:
            return total

        # Excluded pairs were summed as negatives, so their terms are taken off again.
        excluded_A = _logits_of(first_BP, second_MP, scale, positives.excluded)
        return total + logsigmoid(-excluded_A - bias).sum()


class Sail(SigLip):
    """The loss of SAIL: SigLIP's sum, averaged over all B × M pairs.

    Its gradients are M times smaller than SigLIP's.

    "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025).

    Example:
        >>> import torch
        >>> from embedcache.train.losses import Positives, Sail, SigLip
        >>> vectors_BP, scale = torch.eye(4), torch.tensor(20.0)
        >>> positives = Positives(first=torch.arange(4), second=torch.arange(4))
        >>> mean = Sail()(vectors_BP, vectors_BP.flip(0), scale, positives)
        >>> total = SigLip()(vectors_BP, vectors_BP.flip(0), scale, positives)
        >>> round((total / mean).item(), 3)
        4.0
    """

    def forward(self, first_BP: Tensor, second_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        return self._sum(first_BP, second_MP, scale, positives) / (len(first_BP) * len(second_MP))


def _logits_of(left_BP: Tensor, right_MP: Tensor, scale: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the (A,) logits of pairs, given as (A,) rows and (A,) columns."""
    rows_A, columns_A = pairs
    # The backward pass of `index_select` sums in the order of the pairs, and the one of indexing in any order.
    return scale * (left_BP.index_select(0, rows_A) * right_MP.index_select(0, columns_A)).sum(dim=1)


def _log_sum_exp(
    left_BP: Tensor, right_MP: Tensor, scale: Tensor, masked: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute log Σ exp of the logits scale · left · right', over each row and over each column: (B,) and (M,).

    `masked` are (A,) rows, ascending, and (A,) columns of logits that are left out; each row and column keeps one.
    """
    is_safe = _is_safe(scale)

    def sum_tile(left_BP: Tensor, right_MP: Tensor, scale: Tensor, start: int) -> tuple[Tensor, Tensor]:
        logits_BM = _products(left_BP * scale, right_MP)
        if masked is not None and len(masked[0]):
            _mask(logits_BM, *masked, start)
        if not is_safe:
            return logits_BM.logsumexp(dim=1), logits_BM.logsumexp(dim=0)

        # The powers replace the logits, so there is no second matrix.
        powers_BM = logits_BM.exp_()
        return powers_BM.sum(dim=1), powers_BM.sum(dim=0)

    def sum_process(left_BP: Tensor, right_MP: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        empty = 0.0 if is_safe else -math.inf
        rows_B = left_BP.new_full((len(left_BP),), empty)
        columns_M = right_MP.new_full((len(right_MP),), empty)
        for tile, (tile_rows, tile_columns) in _tiles(sum_tile, left_BP, right_MP, scale):
            rows_B[tile] = tile_rows
            columns_M = columns_M + tile_columns if is_safe else torch.logaddexp(columns_M, tile_columns)
        return rows_B, columns_M

    rows_B, columns_M = divided(sum_process, left_BP, right_MP, scale)
    if is_safe:
        return sum_over_processes(rows_B).log(), sum_over_processes(columns_M).log()
    return log_sum_over_processes(rows_B), log_sum_over_processes(columns_M)


def _softplus_sum(left_BP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute Σ log(1 + exp(logit + bias)) over all pairs, a scalar."""

    def sum_tile(left_BP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor, start: int) -> Tensor:
        del start
        logits_BM = _products(left_BP * scale, right_MP) + bias
        # Beyond the threshold softplus is linear, which is exact in float64 from 40 on, but not from the default 20 on.
        return softplus(logits_BM, threshold=40.0).sum()

    def sum_process(left_BP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor]:
        total = left_BP.new_zeros(())
        for _, tile_sum in _tiles(sum_tile, left_BP, right_MP, scale, bias):
            total = total + tile_sum
        return (total,)

    (process_sum,) = divided(sum_process, left_BP, right_MP, scale, bias)
    return sum_over_processes(process_sum)


def _tiles(
    function: Callable[..., Any], left_BP: Tensor, right_MP: Tensor, *others: Tensor
) -> Iterator[tuple[slice, Any]]:
    """Iterate over this process's tiles of rows, with the result of a function for each.

    The backward pass recomputes the tiles, unless all of them fit into `KEPT_BYTES`.
    """
    num_rows = max(1, min(TILE_ROWS, _TILE_VALUES // len(right_MP)))
    num_bytes = len(left_BP) * len(right_MP) * left_BP.itemsize // num_processes()
    fits = num_bytes <= KEPT_BYTES

    # Processes take turns, so that their numbers of tiles differ by one at most.
    for start in range(0, len(left_BP), num_rows)[process_rank() :: num_processes()]:
        rows = slice(start, start + num_rows)
        arguments = left_BP[rows], right_MP, *others, start
        yield rows, function(*arguments) if fits else checkpoint(function, *arguments, use_reentrant=False)


def _products(left_BP: Tensor, right_MP: Tensor) -> Tensor:
    """Compute products in the dtype of autocast, if it is enabled: (B, M) in the dtype of the rows."""
    return (left_BP @ right_MP.T).to(left_BP.dtype)


def _mask(logits_BM: Tensor, rows: Tensor, columns: Tensor, start: int) -> None:
    """Leave logits of a tile out, given ascending rows and their columns in the whole matrix."""
    edges = torch.tensor([start, start + len(logits_BM)], device=rows.device)
    part = slice(*torch.searchsorted(rows, edges).tolist())
    logits_BM[rows[part] - start, columns[part]] = _LEFT_OUT


def _is_safe(scale: Tensor) -> bool:
    """Return whether no logit can overflow; false on a GPU, which would have to synchronize to answer."""
    return scale.device.type == "cpu" and abs(scale.item()) <= _MAX_SAFE_SCALE
