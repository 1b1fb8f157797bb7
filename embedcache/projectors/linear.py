"""A linear map."""

import torch
from torch import Tensor, nn


class LinearProjector(nn.Module):
    """y = W x: (B, D) -> (B, P) float32.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=False)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.linear(vectors_BD)
        return projected

    @torch.no_grad()
    def start_from(self, weights_DP: Tensor) -> None:
        """Make the projector compute exactly x @ weights."""
        self.linear.weight.copy_(weights_DP.T)
