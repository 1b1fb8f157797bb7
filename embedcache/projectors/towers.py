"""One side of a pair: from a frozen feature into the shared space. What is learned of it is its projector."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.projectors.heads import Dropout


class Tower(nn.Module):
    """Each row is scaled to length 1, the training rows' mean is taken off, and the projector does the rest.

    Args:
        projector: maps (B, D) to (B, P).
        input_width: D of the feature.
        output_width: P of the shared space.
        dropout: share of the centered input set to zero in training.
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


class BareTower(nn.Module):
    """The feature as the encoder gave it, over one number: what tools have that put a head on an encoder.

    Args:
        projector: maps (B, D) to (B, P).
        input_width: D of the feature.
        output_width: P of the shared space.
        dropout: share of the input set to zero in training.
    """

    length: Tensor
    """The training rows' root mean square length; a first linear layer can take it in."""

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
    """One side whose projector takes all tokens of an item, as the encoder gave them.

    Args:
        projector: maps (B, T, D) and lengths to (B, P).
        input_width: D of the tokens.
        output_width: P of the shared space.
    """

    def __init__(self, projector: nn.Module, input_width: int, output_width: int) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.projector: Any = projector

    def forward(self, values: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Project a batch: (B, T, D), or (B, D) as one token each -> (B, P) float32, not normalized."""
        tokens_BTD = values.float() if values.ndim == 3 else values.float()[:, None]
        projected: Tensor = self.projector(tokens_BTD, lengths_B)
        return projected
