"""Two projectors and a temperature: an aligned model."""

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

from embedcache.projectors.base import PROJECTORS, split_names
from embedcache.projectors.towers import BareTower, TokenTower, Tower

AnyTower: TypeAlias = Tower | BareTower | TokenTower

_START_TEMPERATURE = 0.07
_TEMPERATURE_RANGE = (0.001, 0.5)


def takes_tokens(projector: str) -> bool:
    """Say whether a projector of that name takes several vectors an item."""
    return bool(getattr(PROJECTORS.load(projector), "takes_tokens", False))


def takes_vectors_as_they_are(projector: str) -> bool:
    """Say whether a projector of that name takes vectors that are neither scaled to length 1 nor centered."""
    return bool(getattr(PROJECTORS.load(projector), "takes_vectors_as_they_are", False))


def _tower(projector: str, input_width: int, output_width: int, dropout: float) -> AnyTower:
    kind = PROJECTORS.load(projector)
    if takes_tokens(projector):
        return TokenTower(kind(input_width, output_width, dropout=dropout), input_width, output_width)
    tower = BareTower if takes_vectors_as_they_are(projector) else Tower
    return tower(kind(input_width, output_width), input_width, output_width, dropout=dropout)


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

    def tower(self, modality: str) -> AnyTower:
        """Get the tower of `image` or `text`."""
        return {"image": self.image, "text": self.text}[modality]
