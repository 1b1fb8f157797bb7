"""The aligned pair: an image tower, a text tower and a temperature."""

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

from embedcache.projectors.base import PROJECTORS, has_token_input, split_names
from embedcache.projectors.towers import RawTower, TokenTower, Tower

AnyTower: TypeAlias = Tower | RawTower | TokenTower

_INITIAL_TEMPERATURE = 0.07
_TEMPERATURE_RANGE = (0.001, 0.5)


class AlignedPair(nn.Module):
    """Two towers and a temperature, trained together.

    The temperature is stored as the log of its inverse and clamped to 0.001 … 0.5, as in the code of "From Unimodal
    to Multimodal" (CVPR 2025). `dropout` is the fraction of each tower's input set to zero in training.
    """

    def __init__(
        self, projector: str, *, image_width: int, text_width: int, shared_width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        image_projector, text_projector = split_names(projector)
        self.image = _tower(image_projector, image_width, shared_width, dropout)
        self.text = _tower(text_projector, text_width, shared_width, dropout)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_INITIAL_TEMPERATURE)))

    @property
    def temperature(self) -> Tensor:
        return torch.exp(-self.log_scale).clamp(*_TEMPERATURE_RANGE)

    @property
    def scale(self) -> Tensor:
        """The factor of the similarities: the inverse of the temperature, a scalar."""
        return 1 / self.temperature

    def tower(self, modality: str) -> AnyTower:
        """Return the tower of `image` or `text`."""
        return {"image": self.image, "text": self.text}[modality]


def _tower(projector: str, input_width: int, output_width: int, dropout: float) -> AnyTower:
    kind = PROJECTORS.load(projector)
    if has_token_input(projector):
        return TokenTower(kind(input_width, output_width, dropout=dropout), input_width, output_width)
    tower = RawTower if getattr(kind, "has_raw_input", False) else Tower
    return tower(kind(input_width, output_width), input_width, output_width, dropout=dropout)
