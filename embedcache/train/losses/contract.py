"""What a loss is to the training loop."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from embedcache.registry import Registry

LOSSES = Registry(
    "loss",
    {
        "info_nce": "embedcache.train.losses.info_nce:InfoNce",
        "multi_positive": "embedcache.train.losses.info_nce:MultiPositive",
        "sail": "embedcache.train.losses.sigmoid:Sail",
        "siglip": "embedcache.train.losses.sigmoid:SigLip",
    },
)


@dataclass(frozen=True, kw_only=True)
class Related:
    """Which images and texts of a batch belong together: those of one sample, and others with equal content.

    Args:
        images: (E,) int64 positions in the batch, ascending.
        texts: (E,) int64 positions, alike; each pair stands once.
    """

    images: Tensor
    texts: Tensor


class Loss(Protocol):
    """A `torch.nn.Module` built without arguments; parameters of its own are trained with the projectors'.

    It holds no B × M matrix: memory grows with B and M.
    """

    def __call__(self, images_BP: Tensor, texts_MP: Tensor, scale: Tensor, related: Related) -> Tensor:
        """Give the loss of a batch, a scalar.

        Args:
            images_BP: (B, P) float32 or float64, rows of length 1.
            texts_MP: (M, P), alike. M is B, and row k the text of image k, unless all captions are positives.
            scale: scalar, the inverse of the temperature.
            related: who else belongs together.
        """
        ...
