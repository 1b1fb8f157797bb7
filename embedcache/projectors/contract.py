"""What a projector is to the rest of the package."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from embedcache.registry import Registry

PROJECTORS = Registry(
    "projector",
    {
        "fusemix": "embedcache.projectors.fusemix:FuseMixProjector",
        "glu": "embedcache.projectors.glu:GluProjector",
        "identity": "embedcache.projectors.identity:IdentityProjector",
        "linear": "embedcache.projectors.linear:LinearProjector",
        "mlp": "embedcache.projectors.mlp:MlpProjector",
        "sharelock": "embedcache.projectors.sharelock:ShareLockProjector",
    },
)


class Projector(Protocol):
    """A `torch.nn.Module` built as `Projector(input_width, output_width)`; it maps (B, D) to (B, P) float32."""

    def __call__(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        ...


@runtime_checkable
class Startable(Protocol):
    """What a projector with a linear branch offers too."""

    def start_from(self, weights_DP: Tensor) -> None:
        """Make it compute x @ weights, to the rounding of float32; training goes on from there."""
        ...


def split_names(names: str) -> tuple[str, str]:
    """Tell the projectors of images and texts apart: `glu` is both, `identity+sharelock` one each."""
    image, _, text = names.partition("+")
    return image, text or image
