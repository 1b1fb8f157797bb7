"""The heads that open_clip has, so that a trained pair can be exported to it as it is.

They take vectors as the encoder gave them: open_clip neither scales nor centres what a head gets.
"""

from torch import Tensor, nn


class OpenClipLinear(nn.Module):
    """y = W x: (B, D) -> (B, P) float32. open_clip's `linear`, of images and of texts.

    Args:
        input_width: D.
        output_width: P.
    """

    takes_vectors_as_they_are = True

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_width, output_width, bias=False))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected


class OpenClipImageMlp(nn.Module):
    """y = V gelu(U x + b), 2 P wide inside: (B, D) -> (B, P) float32. open_clip's `timm_proj: mlp`.

    Args:
        input_width: D.
        output_width: P.
    """

    takes_vectors_as_they_are = True

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        hidden_width = 2 * output_width
        self.layers = nn.Sequential(
            nn.Linear(input_width, hidden_width), nn.GELU(), nn.Linear(hidden_width, output_width, bias=False)
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected


class OpenClipTextMlp(nn.Module):
    """y = V gelu(U x), (D + P) / 2 wide inside: (B, D) -> (B, P) float32. open_clip's `hf_proj_type: mlp`.

    Args:
        input_width: D.
        output_width: P.
    """

    takes_vectors_as_they_are = True

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        hidden_width = (input_width + output_width) // 2
        self.layers = nn.Sequential(
            nn.Linear(input_width, hidden_width, bias=False),
            nn.GELU(),
            nn.Linear(hidden_width, output_width, bias=False),
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected
