"""What a projector is to the rest of the package."""

from typing import Protocol

from torch import Tensor

from embedcache.registry import Registry

PROJECTORS = Registry(
    "projector",
    {
        "linear": "embedcache.projectors.linear:LinearProjector",
        "mlp": "embedcache.projectors.mlp:MlpProjector",
    },
)


class Projector(Protocol):
    """A `torch.nn.Module` built as `Projector(input_width, output_width)`; it maps (B, D) to (B, P) float32."""

    def start_from(self, weights_DP: Tensor) -> None:
        """Make it compute x @ weights, to the rounding of float32; training goes on from there."""
        ...

    def __call__(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        ...
