"""Two projectors and a temperature: an aligned model."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.projectors.contract import PROJECTORS, split_names
from embedcache.projectors.dropout import Dropout

_START_TEMPERATURE = 0.07
_TEMPERATURE_RANGE = (0.001, 0.5)


class Tower(nn.Module):
    """One side: a frozen feature into the shared space.

    Each row is scaled to length 1, the training rows' mean is taken off, and the projector does the rest.

    Args:
        projector: a name of `PROJECTORS`, or `module:attribute`.
        input_width: D of the feature.
        output_width: P of the shared space.
        dropout: share of the centred input set to zero in training.
    """

    mean: Tensor

    def __init__(self, projector: str, input_width: int, output_width: int, *, dropout: float) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.dropout = Dropout(dropout)
        self.register_buffer("mean", torch.zeros(input_width))
        self.projector = PROJECTORS.load(projector)(input_width, output_width)

    def forward(self, vectors_BD: Tensor, lengths_B: None = None) -> Tensor:
        """Project a batch: (B, D) any float -> (B, P) float32, not normalised."""
        del lengths_B
        centred = normalize(vectors_BD.float(), dim=-1) - self.mean
        projected: Tensor = self.projector(self.dropout(centred))
        return projected


class TokenTower(nn.Module):
    """One side whose projector takes all tokens of an item, as the encoder gave them.

    Args:
        projector: a name of `PROJECTORS`, or `module:attribute`.
        input_width: D of the tokens.
        output_width: P of the shared space.
        dropout: share of each token set to zero in training.
    """

    def __init__(self, projector: str, input_width: int, output_width: int, *, dropout: float) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.projector = PROJECTORS.load(projector)(input_width, output_width, dropout=dropout)

    def forward(self, values: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Project a batch: (B, T, D), or (B, D) as one token each -> (B, P) float32, not normalised."""
        tokens_BTD = values.float() if values.ndim == 3 else values.float()[:, None]
        projected: Tensor = self.projector(tokens_BTD, lengths_B)
        return projected


def takes_tokens(projector: str) -> bool:
    """Say whether a projector of that name takes several vectors an item."""
    return bool(getattr(PROJECTORS.load(projector), "takes_tokens", False))


def _tower(projector: str, input_width: int, output_width: int, dropout: float) -> Tower | TokenTower:
    kind = TokenTower if takes_tokens(projector) else Tower
    return kind(projector, input_width, output_width, dropout=dropout)


class AlignedPair(nn.Module):
    """An image tower, a text tower and a temperature, learned together.

    The temperature is stored as the log of its inverse and kept within 0.001 to 0.5, as in the code of "From
    Unimodal to Multimodal" (CVPR 2025).

    Args:
        projector: of both towers, or `IMAGE+TEXT`.
        image_width: D of the image feature.
        text_width: D of the text feature.
        shared_width: P of the shared space.
        dropout: share of each tower's input set to zero in training.
    """

    def __init__(
        self,
        projector: str,
        *,
        image_width: int,
        text_width: int,
        shared_width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        image_projector, text_projector = split_names(projector)
        self.image = _tower(image_projector, image_width, shared_width, dropout)
        self.text = _tower(text_projector, text_width, shared_width, dropout)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_START_TEMPERATURE)))

    @property
    def temperature(self) -> Tensor:
        """The temperature, a scalar."""
        return torch.exp(-self.log_scale).clamp(*_TEMPERATURE_RANGE)

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by, a scalar."""
        return 1 / self.temperature

    def tower(self, modality: str) -> Tower | TokenTower:
        """Get the tower of `image` or `text`."""
        return {"image": self.image, "text": self.text}[modality]
