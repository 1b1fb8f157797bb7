"""A tower maps a frozen feature of width D into the shared space of width P: it prepares the input of a projector."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.projectors.heads import Dropout


class Tower(nn.Module):
    """Scale each vector to length 1, subtract the mean of the training vectors, and project.

    `dropout` is the fraction of the centered input that is set to zero in training.
    """

    mean: Tensor

    def __init__(self, projector: nn.Module, input_width: int, output_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.dropout = Dropout(dropout)
        self.register_buffer("mean", torch.zeros(input_width))
        self.projector: Any = projector

    def forward(self, vectors_BD: Tensor, lengths_B: None = None) -> Tensor:
        """Project a batch: (B, D) any float -> (B, P) float32, not normalized."""
        del lengths_B
        centered = normalize(vectors_BD.float(), dim=-1) - self.mean
        projected: Tensor = self.projector(self.dropout(centered))
        return projected


class RawTower(nn.Module):
    """Project vectors as the encoder returned them, divided by one number, as in tools that put a head on encoders."""

    length: Tensor
    """Root mean square length of the training vectors; an export folds it into the first linear layer."""

    def __init__(self, projector: nn.Module, input_width: int, output_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.dropout = Dropout(dropout)
        self.register_buffer("length", torch.ones(()))
        self.projector: Any = projector

    def forward(self, vectors_BD: Tensor, lengths_B: None = None) -> Tensor:
        """Project a batch: (B, D) any float -> (B, P) float32, not normalized."""
        del lengths_B
        projected: Tensor = self.projector(self.dropout(vectors_BD.float() / self.length))
        return projected


class TokenTower(nn.Module):
    """Project all tokens of an item as the encoder returned them."""

    def __init__(self, projector: nn.Module, input_width: int, output_width: int) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.projector: Any = projector

    def forward(self, values: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Project a batch: (B, T, D), or (B, D) as one token per item -> (B, P) float32, not normalized."""
        tokens_BTD = values.float() if values.ndim == 3 else values.float()[:, None]
        projected: Tensor = self.projector(tokens_BTD, lengths_B)
        return projected
