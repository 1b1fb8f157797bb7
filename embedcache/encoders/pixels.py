"""Where a picture's preprocessing is cut in two: resized to uint8 on threads, scaled in float32 on the device."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array

Transform: TypeAlias = Callable[[Image.Image], Array]
"""An RGB picture of any size -> (3, H, W): uint8 where the model scales pixels itself, else float32 as it wants it."""

TOLERANCE = 1e-6
"""The order of float32 operations may differ; values are of about 1."""


class Scale(torch.nn.Module):
    """Pixels to what a model wants: (pixels / divisor - mean) / std, in float32.

    Args:
        mean: one value a channel, as numbers or a tensor.
        std: the same.
        divisor: 255 where mean and std are those of pixels in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor, *, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self._divisor = divisor
        for name, values in (("mean", mean), ("std", std)):
            values_C11 = torch.as_tensor(values, dtype=torch.float32)[:, None, None]
            self.register_buffer(name, values_C11, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale (B, 3, H, W) uint8 to float32."""
        pixels = images.float()
        if self._divisor != 1:
            pixels = pixels / self._divisor
        return (pixels - self.mean) / self.std


def cut_at_pixels(whole: Transform, to_pixels: Transform, scale: Scale) -> tuple[Transform, torch.nn.Module]:
    """Stop a published transform at uint8 where that gives the same.

    Args:
        whole: the published transform, to float32.
        to_pixels: the same without its scaling.
        scale: the scaling, from its published settings.

    Returns:
        `to_pixels` and `scale` where one after the other they give what `whole` gives on pictures of noise; else
        `whole`, and a module that changes nothing.
    """
    is_same = all(_agree(whole, to_pixels, scale, size) for size in ((320, 200), (200, 320)))
    return (to_pixels, scale) if is_same else (whole, torch.nn.Identity())


def _agree(whole: Transform, to_pixels: Transform, scale: Scale, size: tuple[int, int]) -> bool:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = whole(Image.fromarray(noise))
    try:
        pixels = to_pixels(Image.fromarray(noise))
    except (TypeError, ValueError, RuntimeError):  # a transform that scales twice may refuse to leave it out
        return False
    if pixels.dtype != np.uint8 or pixels.shape != expected.shape:
        return False
    found = scale(torch.from_numpy(pixels)[None])[0].numpy()
    return np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
