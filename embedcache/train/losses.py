"""Training losses over all pairs of a batch: exact sums, tile by tile, without a (B, M) matrix.

A loss from a plug-in is a `torch.nn.Module` with the interface of `Loss`; `embedcache.testing.losses` has the tests
that it must pass.

The backward pass takes the tiles of the forward pass if all of them fit into `HELD_BYTES`, and otherwise computes them
again, to the same bits. Several processes divide the tiles. Under autocast the matrix products use its dtype,
everything else float32. Memory: a few tiles of `TILE_ROWS` × `TILE_COLUMNS`, those that are held, the vectors of
all positives, and one gradient per modality.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, softplus

from embedcache.errors import SettingError
from embedcache.parameters import bind
from embedcache.registry import Registry
from embedcache.train.distributed import log_sum_over_processes, num_processes, process_rank, sum_over_processes

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
TILE_COLUMNS = 2048
"""A float32 tile of this size stays in the cache of a core between its product and its sum."""

HELD_BYTES = 2**26
"""Memory of each process for tiles of the forward pass: 4,096 × 4,096 values in float32."""

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


def _log_sum_exp(
    left_BP: Tensor, right_MP: Tensor, scale: Tensor, masked: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute log Σ exp of the logits scale · left · right', over each row and over each column: (B,) and (M,).

    `masked` are (E,) rows, ascending, and (E,) columns of logits that are left out; each row and column keeps one.
    """
    rows, columns = masked or (torch.empty(0, dtype=torch.int64, device=left_BP.device),) * 2
    result: tuple[Tensor, Tensor] = _apply(_LogSumExp, left_BP, right_MP, scale, rows, columns)
    return result


def _softplus_sum(left_BP: Tensor, right_MP: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute Σ log(1 + exp(logit + bias)) over all pairs, a scalar."""
    result: Tensor = _apply(_SoftplusSum, left_BP, right_MP, scale, bias)
    return result


def _logits_of(left_BP: Tensor, right_MP: Tensor, scale: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the (E,) logits of pairs given as (E,) rows and (E,) columns."""
    rows_E, columns_E = pairs
    # The backward pass of `index_select` sums in the order of the pairs; that of indexing in any order.
    return scale * (left_BP.index_select(0, rows_E) * right_MP.index_select(0, columns_E)).sum(dim=1)


def _apply(function: type[torch.autograd.Function], left: Tensor, *others: Tensor) -> Any:
    """Apply a function whose last argument is the dtype of matrix products: under autocast that of autocast."""
    device = left.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else left.dtype
    with torch.autocast(device, enabled=False):
        return function.apply(left, *others, dtype)  # type: ignore[no-untyped-call]


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(left, right, scale, dtype, masked=(rows, columns), are_powers=_is_safe(scale))
        over_rows, over_columns = (_sum_powers if tiles.are_powers else _sum_logs)(left, right, tiles)
        ctx.save_for_backward(left, right, scale, rows, columns, over_rows, over_columns, *tiles.held)
        ctx.dtype, ctx.are_powers = dtype, tiles.are_powers
        return over_rows, over_columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, rows, columns, over_rows, over_columns, *held = ctx.saved_tensors
        tiles = _Tiles(left, right, scale, ctx.dtype, masked=(rows, columns), are_powers=ctx.are_powers, held=held)
        gradients = _Gradients(left, right, ctx.dtype)
        by_row, by_column = row_gradient * (-over_rows).exp(), column_gradient * (-over_columns).exp()
        for across, down, values in tiles:
            if ctx.are_powers:
                weights = (by_row[across, None] + by_column[down]).mul_(values)
            else:
                weights = (values - over_rows[across, None]).exp_().mul_(row_gradient[across, None])
                weights += (values - over_columns[down]).exp_().mul_(column_gradient[down])
            gradients.add(across, down, weights)
        return (*gradients.result(scale), None, None, None)


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        tiles, total = _Tiles(left, right, scale, dtype), left.new_zeros(())
        for _, _, logits in tiles:
            total += softplus(logits + bias).sum()
        ctx.save_for_backward(left, right, scale, bias, *tiles.held)
        ctx.dtype = dtype
        sum_over_processes(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, bias, *held = ctx.saved_tensors
        gradients, bias_gradient = _Gradients(left, right, ctx.dtype), torch.zeros_like(bias)
        for across, down, logits in _Tiles(left, right, scale, ctx.dtype, held=held):
            weights = (logits + bias).sigmoid_().mul_(gradient)
            bias_gradient += weights.sum()
            gradients.add(across, down, weights)
        sum_over_processes(bias_gradient)
        return (*gradients.result(scale), bias_gradient, None)


class _Gradients:
    """Sum of the gradients of left, right and scale over tiles."""

    def __init__(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
        self._inputs, self._left, self._right = (left, right), left.to(dtype), right.to(dtype)
        self._left_sum, self._right_sum = torch.zeros_like(left), torch.zeros_like(right)

    def add(self, across: slice, down: slice, weights_TU: Tensor) -> None:
        """Add the gradient of the logits of one tile."""
        weights_TU = weights_TU.to(self._left.dtype)
        _add_product(self._left_sum[across], weights_TU, self._right[down])
        _add_product(self._right_sum[down], weights_TU.T, self._left[across])

    def result(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of left, right and scale."""
        sum_over_processes(self._left_sum, self._right_sum)
        of_scale = (self._left_sum * self._inputs[0]).sum()
        return self._left_sum.mul_(scale), self._right_sum.mul_(scale), of_scale


class _Tiles:
    """This process's tiles: rows, columns, and values in the inputs' dtype, which must not be changed.

    Values are logits, or with `are_powers` e^logit; those of the `masked` rows and columns are left out, as in
    `_log_sum_exp`. The first iteration computes them, and holds them if they fit.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        *,
        masked: tuple[Tensor, Tensor] | None = None,
        are_powers: bool = False,
        held: Sequence[Tensor] = (),
    ) -> None:
        self._left, self._right, self._scale, self._dtype = left, right, scale, dtype
        self._masked, self.are_powers, self.held = masked, are_powers, list(held)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        starts = range(0, len(self._left), TILE_ROWS)[process_rank() :: num_processes()]
        edges = [(start, first) for start in starts for first in range(0, len(self._right), TILE_COLUMNS)]
        num_bytes = len(self._left) * len(self._right) * self._left.itemsize // num_processes()
        is_held, fits = bool(self.held), num_bytes <= HELD_BYTES
        for (start, first), values_TU in zip(edges, self.held if is_held else self._compute(edges), strict=True):
            if fits and not is_held:
                self.held.append(values_TU)
            yield slice(start, start + TILE_ROWS), slice(first, first + TILE_COLUMNS), values_TU

    def _compute(self, edges: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        scaled, right = (self._left * self._scale).to(self._dtype), self._right.to(self._dtype)
        for start, first in edges:
            values = (scaled[start : start + TILE_ROWS] @ right[first : first + TILE_COLUMNS].T).to(self._left.dtype)
            if self._masked is not None and len(self._masked[0]):
                _mask(values, *self._masked, start, first)
            yield values.exp_() if self.are_powers else values


def _mask(logits: Tensor, rows: Tensor, columns: Tensor, start: int, first: int) -> None:
    """Set the logits of a tile at ascending rows, and columns, of the whole matrix to -inf."""
    edges = torch.tensor([start, start + len(logits)], device=rows.device)
    part = slice(*torch.searchsorted(rows, edges).tolist())
    rows, columns = rows[part] - start, columns[part] - first
    is_here = (columns >= 0) & (columns < logits.shape[1])
    logits[rows[is_here], columns[is_here]] = -math.inf


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += (left @ right).to(total.dtype)  # adding different dtypes takes twice as long


def _sum_powers(left: Tensor, right: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    over_rows, over_columns = left.new_zeros(len(left)), left.new_zeros(len(right))
    for across, down, powers in tiles:
        over_rows[across] += powers.sum(dim=1)
        over_columns[down] += powers.sum(dim=0)
    sum_over_processes(over_rows, over_columns)
    return over_rows.log_(), over_columns.log_()


def _sum_logs(left: Tensor, right: Tensor, tiles: _Tiles) -> tuple[Tensor, Tensor]:
    over_rows, over_columns = (left.new_full((len(side),), -math.inf) for side in (left, right))
    for across, down, logits in tiles:
        over_rows[across] = torch.logaddexp(over_rows[across], logits.logsumexp(dim=1))
        over_columns[down] = torch.logaddexp(over_columns[down], logits.logsumexp(dim=0))
    return log_sum_over_processes(over_rows), log_sum_over_processes(over_columns)


def _is_safe(scale: Tensor) -> bool:
    """Return whether no logit can overflow; false on a GPU, which would have to synchronize to answer."""
    return scale.device.type == "cpu" and abs(scale.item()) <= _MAX_SAFE_SCALE
