"""Similarities to known pairs, in place of a learned map."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_NUM_KEPT = 800
_POWER = 8


class AsifProjector(nn.Module):
    """Cosines to P anchors, the 800 largest kept, negatives zero, to the power 8: (B, D) -> (B, P) float32.

    The sparse relative representation of "ASIF: Coupled Data Turns Unimodal Models to Multimodal Without Training"
    (NeurIPS 2023) with its 800 and 8: both sides hold the vectors of the same pairs, so that entry j says how near
    an item is to pair j. Nothing is learned. We differ in that cosines are taken of centred vectors, as a tower
    gives them.

    Args:
        input_width: D.
        output_width: P, the number of anchors. Until they are set, every item is projected to zero.
    """

    anchors: Tensor

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.zeros(output_width, input_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        cosines_BP = normalize(vectors_BD, dim=-1) @ self.anchors.T
        largest_BK, where_BK = cosines_BP.topk(min(_NUM_KEPT, len(self.anchors)), dim=-1)
        kept_BK = largest_BK.float().clamp(min=0) ** _POWER
        return torch.zeros_like(cosines_BP, dtype=torch.float32).scatter(-1, where_BK, kept_BK)

    @torch.no_grad()
    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Take the vectors of P pairs as anchors, of any length."""
        self.anchors.copy_(normalize(anchors_PD, dim=-1))
