"""The projectors by name, and the interface of a projector from a plug-in.

A projector is a `torch.nn.Module`. `embedcache.testing.projectors` has the tests that a plug-in must pass.
"""

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from embedcache.registry import Registry

_PRESETS = {"openclip-mlp": "openclip-mlp-image+openclip-mlp-text"}

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
        "token": "embedcache.projectors.tokens:MeanTokenProjector",
        "token_mlp": "embedcache.projectors.tokens:TokenMlpProjector",
    },
    group="embedcache.projectors",
    presets=_PRESETS,
    arguments=2,
)


def split_names(names: str) -> tuple[str, str]:
    """Return the projectors of both towers: `glu` names both, `identity+sharelock` the first and the second."""
    first, _, second = _PRESETS.get(names, names).partition("+")
    return first, second or first


def has_token_input(projector: str) -> bool:
    """Return whether the projector of this name maps token sequences."""
    return bool(getattr(PROJECTORS.load(projector), "has_token_input", False))


class Projector(Protocol):
    """A projector of one vector per item, built as `Projector(input_width, output_width)`.

    Vectors come scaled to length 1 and centered; with a class attribute `has_raw_input = True`, as the encoder returned
    them, divided by one number. In training, dropout is applied to them before.
    """

    def __call__(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch: (B, D) float32 -> (B, P) float32."""
        ...


class TokenProjector(Protocol):
    """A module for token features, built as `TokenProjector(input_width, output_width, dropout=0.1)`."""

    has_token_input: ClassVar[bool] = True

    def __call__(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Project a batch to (B, P) float32.

        Args:
            tokens_BTD: float32; values after the last token of an item are padding and must not matter.
            lengths_B: int64 number of tokens of each item, at least 1; None: every item has T tokens.
        """
        ...


@runtime_checkable
class HasLinearBranch(Protocol):
    """A projector that can be initialized with a closed form."""

    def set_linear_map(self, weights_DP: Tensor) -> None:
        """Make the projector compute x @ weights, up to float32 rounding."""
        ...


@runtime_checkable
class HasAnchors(Protocol):
    """A projector that compares items with those of training pairs."""

    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Set the (P, D) anchor vectors; row j of both towers comes from the same training pair."""
        ...
