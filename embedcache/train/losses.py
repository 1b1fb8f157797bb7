"""Training losses over all pairs of a batch, and the STRUCTURE regularizer.

A loss from a plug-in is a `torch.nn.Module` with the interface of `Loss`; `embedcache.testing.losses` has the tests
that it must pass. The losses here sum over tiles and hold no B x M matrix of more than 64 MB, see `tiles.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, normalize

from embedcache.arrays import blocks
from embedcache.registry import Registry
from embedcache.train import tiles
from embedcache.train.tiles import log_sum_exp, logits_of, softplus_sum

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
)


@dataclass(frozen=True, kw_only=True)
class Positives:
    """Pairs of images and texts of a batch that belong together: those of one sample, and others of equal content.

    Args:
        images: (E,) int64 positions in the batch, ascending.
        texts: (E,) int64 positions in the batch; each pair is listed once.
        excluded: (A,) positions of images and of texts of pairs that are neither positives nor negatives, such as those
            of near-duplicates, the images ascending; None: there are none.
    """

    images: Tensor
    texts: Tensor
    excluded: tuple[Tensor, Tensor] | None = None


class Loss(Protocol):
    """A `torch.nn.Module` built without arguments; its parameters are trained with those of the projectors."""

    def __call__(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        """Compute the loss of a batch, a scalar.

        Args:
            images_BP: (B, P) float32 or float64, rows of length 1.
            texts_MP: (M, P), as `images_BP`. M is B, and row k the text of image k, unless all captions are positives.
            scale: scalar, the inverse of the temperature.
            positives: all pairs that belong together, and pairs that must be left out.
        """
        ...


class InfoNce(nn.Module):
    """Symmetric InfoNCE: cross-entropy of each image's own text among the texts of the batch, and vice versa.

    Other pairs that belong together are not negatives: they are left out. The loss of CLIP, "Learning Transferable
    Visual Models From Natural Language Supervision" (2021), figure 3.
    """

    def forward(self, images_BP: Tensor, texts_BP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        is_other = positives.images != positives.texts
        masked = (positives.images[is_other], positives.texts[is_other])
        if positives.excluded is not None:
            rows, columns = (torch.cat(sides) for sides in zip(masked, positives.excluded, strict=True))
            order = torch.argsort(rows, stable=True)
            masked = (rows[order], columns[order])
        over_texts, over_images = log_sum_exp(images_BP, texts_BP, scale, masked)
        own = scale * (images_BP * texts_BP).sum(dim=1)
        return (over_texts + over_images).mean() / 2 - own.mean()


class MultiPositive(nn.Module):
    """Symmetric InfoNCE with several positives of equal weight.

    The cross-entropy between the softmax of the similarities and a uniform distribution over the positives, averaged
    over both directions. With one positive per row it is `InfoNce`. It is SupCon's L_out, "Supervised Contrastive
    Learning" (2020), equation 2, between two modalities.
    """

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        over_texts, over_images = log_sum_exp(images_BP, texts_MP, scale, positives.excluded)
        logits_E = logits_of(images_BP, texts_MP, scale, (positives.images, positives.texts))
        of_images = over_texts.mean() - (_weights(positives.images, logits_E.dtype) * logits_E).sum() / len(images_BP)
        of_texts = over_images.mean() - (_weights(positives.texts, logits_E.dtype) * logits_E).sum() / len(texts_MP)
        return (of_images + of_texts) / 2


def _weights(positions_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / (number of positives) of the item of each pair."""
    return torch.bincount(positions_E)[positions_E].to(dtype).reciprocal()


class SigLip(nn.Module):
    """Binary cross-entropy of each pair of the batch, with a learned bias.

    -1/B Σ log sigmoid(z (scale · cosine + bias)) over all pairs that are not excluded, z = 1 for those that belong
    together, else -1.
    "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        return self._sum(images_BP, texts_MP, scale, positives) / len(images_BP)

    def _sum(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        bias = self.bias.to(images_BP.dtype)
        logits_E = logits_of(images_BP, texts_MP, scale, (positives.images, positives.texts))
        # As log sigmoid(x) = x - softplus(x) and log sigmoid(-x) = -softplus(x).
        total = softplus_sum(images_BP, texts_MP, scale, bias) - (logits_E + bias).sum()
        if positives.excluded is None:
            return total
        return total + logsigmoid(-logits_of(images_BP, texts_MP, scale, positives.excluded) - bias).sum()


class Sail(SigLip):
    """SigLIP's loss averaged over all B × M pairs.

    The loss of SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025).
    """

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        return self._sum(images_BP, texts_MP, scale, positives) / (len(images_BP) * len(texts_MP))


def structure(inputs_BD: Tensor, outputs_BP: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Compute how much the neighborhoods of a batch change by projection, from 0 to log 2: the STRUCTURE regularizer.

    "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You" (2025): inputs and outputs are centered
    over the batch and scaled to length 1; an item's neighborhood is the softmax over its similarities, itself included;
    the result is the mean Jensen-Shannon divergence between both neighborhoods of an item, in nats.

    Only the paper's first level: level l compares the l-th powers of both (B, B) matrices, at a cost cubic in B. The
    authors' code scales before it centers.

    No (B, B) matrix is held: the backward pass recomputes each tile. Memory: about fifteen tiles of `tiles.TILE_ROWS`
    × B. No gradient flows into the (B, D) inputs; the (B, P) outputs have any length. 1 or 2 items give 0. The
    temperature is the authors' setting.
    """
    before_BD, after_BP = (normalize(side - side.mean(dim=0), dim=1) for side in (inputs_BD, outputs_BP))
    result: Tensor = _Divergence.apply(before_BD, after_BP, temperature)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    # One node for all tiles: with a checkpoint per tile, long-lived tensors between them kept malloc from reusing freed
    # tiles, and a batch of 16,384 took as much memory as the (B, B) matrix.
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
            q, slopes = log_q.exp(), log_q - log_middle  # slopes: derivative of twice the divergence by q
            weights = q * (slopes - (q * slopes).sum(dim=1, keepdim=True))
            total.addmm_(weights.T, after[rows])
            total[rows].addmm_(weights, after)
        return None, total * (gradient / (2 * len(after) * ctx.temperature)), None


def _tiles(before: Tensor, after: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Iterate over tiles of T rows: (T, B) logarithms of both neighborhoods and of their mean."""
    for rows in blocks(len(after), tiles.TILE_ROWS):
        log_p, log_q = (torch.log_softmax(side[rows] @ side.T / temperature, dim=1) for side in (before, after))
        yield rows, log_p, log_q, torch.logaddexp(log_p, log_q) - math.log(2)
