"""What a loss is to the training loop.

Contrastive losses over a softmax: CLIP's, and with any number of positives.

Losses that judge each pair on its own: SigLIP's, and SAIL's variant.

Keep the geometry of a frozen encoder: what is near before a projector should be near after it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

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
)


@dataclass(frozen=True, kw_only=True)
class Related:
    """Which images and texts of a batch belong together: those of one sample, and others with equal content.

    Args:
        images: (E,) int64 positions in the batch, ascending.
        texts: (E,) int64 positions, alike; each pair stands once.
    """

    images: Tensor
    texts: Tensor


class Loss(Protocol):
    """A `torch.nn.Module` built without arguments; parameters of its own are trained with the projectors'.

    It holds no B × M matrix: memory grows with B and M.
    """

    def __call__(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the loss of a batch, a scalar.

        Args:
            images_BP: (B, P) float32 or float64, rows of length 1.
            texts_MP: (M, P), alike. M is B, and row k the text of image k, unless all captions are positives.
            scale: scalar, the inverse of the temperature.
            related: who else belongs together.
        """
        ...


class InfoNce(nn.Module):
    """Symmetric InfoNCE: each image finds its own text among those of the batch, and each text its image.

    Others that belong together are no negatives: they are left out. The loss of CLIP, "Learning Transferable Visual
    Models From Natural Language Supervision" (2021), figure 3.
    """

    def forward(self, images_BP: Tensor, texts_BP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the mean over both directions of the cross-entropy, a scalar."""
        is_other = related.images != related.texts
        hidden = (related.images[is_other], related.texts[is_other])
        over_texts, over_images = log_sum_exp(images_BP, texts_BP, scale, hidden)
        own = scale * (images_BP * texts_BP).sum(dim=1)
        return (over_texts + over_images).mean() / 2 - own.mean()


class MultiPositive(nn.Module):
    """Symmetric InfoNCE where all that belong together are positives, each with an equal share.

    The cross-entropy between the softmax of the similarities and an even distribution over the positives, averaged
    over both directions. With one positive a row it is `InfoNce`. As SupCon's L_out, "Supervised Contrastive Learning"
    (2020), equation 2, between two modalities.
    """

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the mean over both directions of the cross-entropy, a scalar."""
        over_texts, over_images = log_sum_exp(images_BP, texts_MP, scale)
        logits_E = logits_of(images_BP, texts_MP, scale, (related.images, related.texts))
        of_images = over_texts.mean() - (_share(related.images, logits_E.dtype) * logits_E).sum() / len(images_BP)
        of_texts = over_images.mean() - (_share(related.texts, logits_E.dtype) * logits_E).sum() / len(texts_MP)
        return (of_images + of_texts) / 2


def _share(positions_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Give each pair its part of the positives of its image, or of its text."""
    return torch.bincount(positions_E)[positions_E].to(dtype).reciprocal()


_START_BIAS = -10.0


class SigLip(nn.Module):
    """Each pair of the batch is positive or negative, by a sigmoid with a learned bias.

    -1/B Σ log sigmoid(z (scale · cosine + bias)) over all pairs, z = 1 for those that belong together, else -1.
    "Sigmoid Loss for Language Image Pre-Training" (2023), equation 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(_START_BIAS))

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the loss, a scalar."""
        return self._sum(images_BP, texts_MP, scale, related) / len(images_BP)

    def _sum(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        bias = self.bias.to(images_BP.dtype)
        logits_E = logits_of(images_BP, texts_MP, scale, (related.images, related.texts))
        # As log sigmoid(x) = x - softplus(x) and log sigmoid(-x) = -softplus(x).
        return softplus_sum(images_BP, texts_MP, scale, bias) - (logits_E + bias).sum()


class Sail(SigLip):
    """SigLIP's loss as the mean over all B × M pairs.

    As in SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025).
    """

    def forward(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the loss, a scalar."""
        return self._sum(images_BP, texts_MP, scale, related) / (len(images_BP) * len(texts_MP))


def structure(inputs_BD: Tensor, outputs_BP: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Get how far the neighborhoods of a batch differ before and after projection, from 0 to log 2.

    The STRUCTURE term of "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You" (2025): each side is
    centered over the batch and scaled to length 1; the softmax over its similarities, that to itself among them, is an
    item's neighborhood; the mean over the items of the Jensen-Shannon divergence between both is the result, in nats.

    Only the paper's first level: level l compares the l-th powers of both (B, B) matrices, at a cost cubic in B. The
    authors' code scales first and centers then.

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
    """Go through tiles of rows: the logarithms, (T, B) each, of both neighborhoods and of the mean of both."""
    for start in range(0, len(after), tiles.TILE_ROWS):
        rows = slice(start, start + tiles.TILE_ROWS)
        log_p, log_q = (torch.log_softmax(side[rows] @ side.T / temperature, dim=1) for side in (before, after))
        yield rows, log_p, log_q, torch.logaddexp(log_p, log_q) - math.log(2)
