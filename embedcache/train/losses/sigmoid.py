"""Losses that judge each pair on its own: SigLIP's, and SAIL's variant."""

import torch
from torch import Tensor, nn

from embedcache.train.losses.contract import Related
from embedcache.train.losses.tiles import logits_of, softplus_sum

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
