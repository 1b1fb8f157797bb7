"""A residual multi-layer perceptron."""

import torch
from torch import Tensor, nn

from embedcache.projectors.dropout import Dropout

_HIDDEN_WIDTH = 512
_DROPOUT = 0.1


class MlpProjector(nn.Module):
    """y = W x + V gelu(U layernorm(x)): (B, D) -> (B, P) float32.

    V starts at zero, so that training starts from the linear map. The linear branch in place of an identity skip
    follows the token projector of "From Unimodal to Multimodal" (CVPR 2025).

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=False)
        self.hidden = nn.Sequential(
            nn.LayerNorm(input_width),
            nn.Linear(input_width, _HIDDEN_WIDTH),
            nn.GELU(),
            Dropout(_DROPOUT),
        )
        self.output = nn.Linear(_HIDDEN_WIDTH, output_width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.linear(vectors_BD) + self.output(self.hidden(vectors_BD))
        return projected

    @torch.no_grad()
    def start_from(self, weights_DP: Tensor) -> None:
        """Make the projector compute exactly x @ weights."""
        self.linear.weight.copy_(weights_DP.T)
        self.output.weight.zero_()
