"""Relative representations: nothing is learned."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_MOST_KEPT = 800
_POWER = 8


class AsifProjector(nn.Module):
    """An item's cosines to P anchors, the 800 largest alone, to the 8th power: (B, D) -> (B, P) float32.

    Anchor j of both sides is one training pair, so that items of both can be compared. ASIF, "Coupled Data Turns
    Unimodal Models to Multimodal Without Training" (NeurIPS 2023), with its defaults; there all training pairs are
    anchors, here as many of them as the shared space is wide. Negative cosines count as zero.

    Args:
        input_width: D.
        output_width: P, the number of anchors.
    """

    anchors_PD: Tensor

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.register_buffer("anchors_PD", torch.zeros(output_width, input_width))

    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Take what items are compared with."""
        self.anchors_PD.copy_(normalize(anchors_PD, dim=1))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        cosines_BP = normalize(vectors_BD, dim=1) @ self.anchors_PD.T
        kept_BK, places_BK = cosines_BP.topk(min(_MOST_KEPT, cosines_BP.shape[1]), dim=1)
        return torch.zeros_like(cosines_BP).scatter(1, places_BK, kept_BK.clamp(min=0) ** _POWER)
