"""A plain deep perceptron with batch normalisation."""

from itertools import pairwise

from torch import Tensor, nn

from embedcache.projectors.dropout import Dropout

_HIDDEN_WIDTH = 4096
_NUM_LAYERS = 4
_DROPOUT = 0.2


class ShareLockProjector(nn.Module):
    """Four linear layers, 4,096 wide, with batch normalisation, ReLU and dropout between them: (B, D) -> (B, P).

    The text side of ShareLock, "Better Language Models Exhibit Higher Visual Alignment" (TMLR 2026), whose image side
    is the frozen feature itself: name the pair `identity+sharelock`. For 4,096 -> 1,024 it has 54.6 M parameters.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        widths = [input_width, *[_HIDDEN_WIDTH] * (_NUM_LAYERS - 1)]
        hidden: list[nn.Module] = []
        for before, after in pairwise(widths):
            hidden += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), Dropout(_DROPOUT)]
        self.layers = nn.Sequential(*hidden, nn.Linear(_HIDDEN_WIDTH, output_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected
