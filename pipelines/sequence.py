"""Parts of networks on sequences: valid frames of a padded batch, positions, layer sizes, standardized inputs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


def valid_frames(lengths_B: Tensor, num_frames: int) -> Tensor:
    """Return whether each frame of a padded batch belongs to its item: (B, T) bool."""
    return torch.arange(num_frames, device=lengths_B.device) < lengths_B[:, None]


def sinusoids(num_frames: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Compute the positions of "Attention Is All You Need", §3.5: (T, D) float32, sines in even channels."""
    return sinusoids_at(torch.arange(num_frames, device=device, dtype=torch.float32), width)


def sinusoids_at(positions_T: Tensor, width: int) -> Tensor:
    """Compute `sinusoids` at any positions, (T,) float32: (T, D)."""
    rates = torch.exp(
        torch.arange(0, width, 2, device=positions_T.device, dtype=torch.float32) * (-math.log(10_000) / width)
    )
    angles = positions_T[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(len(positions_T), -1)[:, :width]


class LayerSizes(NamedTuple):
    """Sizes of the layers of transformers.

    Args:
        num_heads: attention heads.
        feed_forward: width of the hidden layer of the feed-forward blocks.
        dropout: fraction of activations set to zero in training.
    """

    num_heads: int
    feed_forward: int
    dropout: float


class StandardizedInput(nn.Module):
    """A module that first brings each channel of its feature to mean 0 and standard deviation 1.

    The moments are buffers, so that a run keeps them.
    """

    def __init__(self, input_width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(input_width))
        self.register_buffer("scale", torch.ones(input_width))

    def standardize(self, values_ND: Tensor) -> None:
        """Standardize each channel by its mean and standard deviation in some vectors of the feature."""
        deviation_D, mean_D = torch.std_mean(values_ND.float(), dim=0, correction=0)
        self.mean = mean_D
        self.scale = 1 / deviation_D.clamp(min=1e-5)
