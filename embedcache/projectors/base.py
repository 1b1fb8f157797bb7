"""What a projector is to the rest of the package."""

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from embedcache.registry import Registry

PROJECTORS = Registry(
    "projector",
    {
        "asif": "embedcache.projectors.heads:AsifProjector",
        "cls_token": "embedcache.projectors.tokens:ClsTokenProjector",
        "fusemix": "embedcache.projectors.heads:FuseMixProjector",
        "glu": "embedcache.projectors.heads:GluProjector",
        "identity": "embedcache.projectors.heads:IdentityProjector",
        "linear": "embedcache.projectors.heads:LinearProjector",
        "mlp": "embedcache.projectors.heads:MlpProjector",
        "openclip-linear": "embedcache.projectors.heads:OpenClipLinear",
        "openclip-mlp-image": "embedcache.projectors.heads:OpenClipImageMlp",
        "openclip-mlp-text": "embedcache.projectors.heads:OpenClipTextMlp",
        "sharelock": "embedcache.projectors.heads:ShareLockProjector",
        "token": "embedcache.projectors.tokens:TokenProjector",
        "token_mlp": "embedcache.projectors.tokens:TokenMlpProjector",
    },
)


class Projector(Protocol):
    """A `torch.nn.Module` built as `Projector(input_width, output_width)`; it maps (B, D) to (B, P) float32."""

    def __call__(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        ...


class TokenProjector(Protocol):
    """A module for several vectors an item, built as `TokenProjector(input_width, output_width, dropout=0.1)`."""

    takes_tokens: ClassVar[bool] = True

    def __call__(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Project a batch to (B, P) float32.

        Args:
            tokens_BTD: float32; what lies behind an item's length is not looked at.
            lengths_B: int64, tokens of each item, at least 1; None: all have T.
        """
        ...


@runtime_checkable
class Startable(Protocol):
    """What a projector with a linear branch offers too."""

    def start_from(self, weights_DP: Tensor) -> None:
        """Make it compute x @ weights, to the rounding of float32; training goes on from there."""
        ...


@runtime_checkable
class Anchored(Protocol):
    """What a projector offers that compares items with those of training pairs."""

    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Take the (P, D) vectors that items are compared with; those of both sides are aligned."""
        ...


_PRESETS = {"openclip-mlp": "openclip-mlp-image+openclip-mlp-text"}
"""One name for two projectors."""


def split_names(names: str) -> tuple[str, str]:
    """Tell the projectors of images and texts apart: `glu` is both, `identity+sharelock` one each."""
    image, _, text = _PRESETS.get(names, names).partition("+")
    return image, text or image
