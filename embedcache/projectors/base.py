"""The projectors by name, the interface of a projector from a plug-in, and the projection of items by a tower.

A projector is a `torch.nn.Module`. `embedcache.testing.projectors` has the tests that a plug-in must pass. torch is
imported when items are projected.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from embedcache.arrays import Floats, Inputs, blocks, check_finite, normalize
from embedcache.processes import announce_device
from embedcache.progress import NullProgress, Progress
from embedcache.registry import Registry, bind

if TYPE_CHECKING:
    from torch import Tensor

    from embedcache.modeling.heads import AnyTower

_BLOCK = 8192

_PRESETS = {"openclip-mlp": "openclip-mlp-image+openclip-mlp-text"}

PROJECTORS = Registry(
    "projector",
    {
        "asif": "embedcache.modeling.heads:AsifProjector",
        "cls_token": "embedcache.modeling.heads:ClsTokenProjector",
        "fusemix": "embedcache.modeling.heads:FuseMixProjector",
        "glu": "embedcache.modeling.heads:GluProjector",
        "identity": "embedcache.modeling.heads:IdentityProjector",
        "linear": "embedcache.modeling.heads:LinearProjector",
        "mlp": "embedcache.modeling.heads:MlpProjector",
        "openclip-linear": "embedcache.modeling.heads:OpenClipLinear",
        "openclip-mlp-image": "embedcache.modeling.heads:OpenClipImageMlp",
        "openclip-mlp-text": "embedcache.modeling.heads:OpenClipTextMlp",
        "sharelock": "embedcache.modeling.heads:ShareLockProjector",
        "token": "embedcache.modeling.heads:MeanTokenProjector",
        "token_mlp": "embedcache.modeling.heads:TokenMlpProjector",
    },
    group="embedcache.projectors",
    presets=_PRESETS,
    arguments=2,
    has_parameters=True,
)


def split_names(names: str) -> tuple[str, str]:
    """Return the projectors of both towers: `glu` names both, `identity+mlp:hidden=1024` the first and the second."""
    first, _, second = _PRESETS.get(names, names).partition("+")
    return first, second or first


def has_token_input(projector: str) -> bool:
    """Return whether the projector of this name maps token sequences."""
    return bool(getattr(PROJECTORS.load(projector), "has_token_input", False))


def bind_projector(projector: str) -> partial[Any]:
    """Return the class of a projector with the parameters that its text names, such as `mlp:hidden=1024`."""
    given = ("dropout",) if has_token_input(projector) else ()
    return bind(PROJECTORS, projector, given=given)


class Projector(Protocol):
    """A projector of one vector per item, built as `Projector(input_width, output_width)`.

    Vectors come scaled to length 1 and centered; with a class attribute `has_raw_input = True`, as the encoder returned
    them, divided by one number. In training, dropout is applied to them before.
    """

    def __call__(self, vectors_BD: "Tensor") -> "Tensor":
        """Project a batch: (B, D) float32 -> (B, P) float32."""
        ...


class TokenProjector(Protocol):
    """A module for token features, built as `TokenProjector(input_width, output_width, dropout=0.1)`."""

    has_token_input: ClassVar[bool] = True

    def __call__(self, tokens_BTD: "Tensor", lengths_B: "Tensor | None") -> "Tensor":
        """Project a batch to (B, P) float32.

        Args:
            tokens_BTD: float32; values after the last token of an item are padding and must not matter.
            lengths_B: int64 number of tokens of each item, at least 1; None: every item has T tokens.
        """
        ...


@runtime_checkable
class HasLinearBranch(Protocol):
    """A projector that can be initialized with a closed form."""

    def set_linear_map(self, weights_DP: "Tensor") -> None:
        """Make the projector compute x @ weights, up to float32 rounding."""
        ...


@runtime_checkable
class HasAnchors(Protocol):
    """A projector that compares items with those of training pairs."""

    def set_anchors(self, anchors_PD: "Tensor") -> None:
        """Set the (P, D) anchor vectors; row j of both towers comes from the same training pair."""
        ...


def project(
    tower: "AnyTower",
    inputs: Inputs,
    *,
    device: str = "cpu",
    width: int | None = None,
    progress: Progress | None = None,
) -> Floats:
    """Project items block by block: N items of any float dtype -> (N, P) float32, rows of length 1.

    Args:
        tower: the tower.
        inputs: the items.
        device: device of the tower.
        width: P, the first components to keep before rows are scaled to length 1; None: all.
        progress: a step that advances by the items.

    Raises:
        DataError: a value is NaN or infinite after projection.
    """
    import torch

    announce_device(device)
    progress = progress or NullProgress()
    parts_NP = [np.empty((0, width or tower.output_width), np.float32)]
    num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
    with torch.inference_mode():
        for block in blocks(len(inputs.values), max(1, _BLOCK // num_tokens)):
            part = inputs.take(block)
            values = torch.from_numpy(np.require(part.values, np.float32, ["W"])).to(device)  # chunks are read-only
            lengths = None if part.lengths is None else torch.from_numpy(part.lengths).to(device)
            parts_NP.append(tower(values, lengths)[:, :width].float().cpu().numpy())
            progress.advance(len(parts_NP[-1]))
    projected_NP = np.concatenate(parts_NP)
    check_finite(projected_NP, "the projected feature")
    return normalize(projected_NP)
