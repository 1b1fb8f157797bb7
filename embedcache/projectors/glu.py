"""A gated perceptron, wide."""

from torch import Tensor, nn
from torch.nn.functional import relu6

_TIMES_INPUT = 8
_LARGEST = 1e3


class GluProjector(nn.Module):
    """y = V (relu6(U x') ⊙ W x') with x' = layernorm(x), 8 times as wide as the input inside: (B, D) -> (B, P) float32.

    The projector of SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025): for
    2,048 and 4,096 -> 1,024 the two have 386.0 M parameters. It has no linear branch that a closed form could start.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        hidden_width = _TIMES_INPUT * input_width
        self.norm = nn.LayerNorm(input_width)
        self.gate = nn.Linear(input_width, hidden_width)
        self.value = nn.Linear(input_width, hidden_width)
        self.output = nn.Linear(hidden_width, output_width)
        for linear in (self.gate, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        normed = self.norm(vectors_BD)
        gated = (relu6(self.gate(normed)) * self.value(normed)).clamp(-_LARGEST, _LARGEST)
        projected: Tensor = self.output(gated)
        return projected
