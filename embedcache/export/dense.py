"""A tower as a plain chain of linear layers and activations, exactly: batch norms and centering are folded in."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from embedcache.export.base import refusal
from embedcache.projectors.heads import (
    AsifProjector,
    FuseMixProjector,
    GluProjector,
    IdentityProjector,
    LinearProjector,
    MlpProjector,
    OpenClipImageMlp,
    OpenClipLinear,
    OpenClipTextMlp,
    ShareLockProjector,
)
from embedcache.projectors.pair import AnyTower
from embedcache.projectors.towers import RawTower, TokenTower

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid)
_CHAINS = (OpenClipLinear, OpenClipImageMlp, OpenClipTextMlp, ShareLockProjector)
_REASONS = {
    MlpProjector: "adds a linear branch to one that stands behind a layer normalization",
    GluProjector: "multiplies two branches behind a layer normalization",
    FuseMixProjector: "adds each block, with its layer normalization, to what goes into it",
    AsifProjector: "keeps the largest of its cosines",
}


_INSTEAD = (
    "train with linear, identity, sharelock, openclip-linear or openclip-mlp, or use embedcache export transformers"
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """y = activation(W x + b).

    Args:
        weight_PD: W, float32.
        bias_P: b; None: nothing is added.
        activation: what follows.
    """

    weight_PD: Tensor
    bias_P: Tensor | None
    activation: nn.Module


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A tower as layers.

    Args:
        layers: in order; none: the vectors stay as they are.
        is_scaled: whether vectors are scaled to length 1 before the first layer.
    """

    layers: tuple[Layer, ...]
    is_scaled: bool


@torch.no_grad()
def dense_chain(tower: AnyTower, form: str) -> Chain:
    """Write a trained tower as a chain of dense layers that gives the same, to rounding.

    Raises:
        SettingError: its projector is no such chain; says why.
    """
    if isinstance(tower, TokenTower):
        raise refusal(form, f"{_name(tower)} maps every token, and a dense layer takes one vector")
    modules = list(_modules(tower, form))
    if isinstance(tower, RawTower):
        return Chain(layers=tuple(_folded(modules, _scaling(tower), form)), is_scaled=False)
    centering = (torch.ones_like(tower.mean).double(), -tower.mean.double())
    return Chain(layers=tuple(_folded(modules, centering, form)), is_scaled=True)


def _modules(tower: AnyTower, form: str) -> Iterable[nn.Module]:
    projector = tower.projector
    if isinstance(projector, IdentityProjector):
        return []
    if isinstance(projector, LinearProjector):
        return [projector.linear]
    if isinstance(projector, _CHAINS):
        return projector.layers
    reason = _REASONS.get(type(projector), "is of your own, and its layers are not known")
    raise refusal(form, f"{_name(tower)} {reason}, and a chain of dense layers does not", _INSTEAD)


def _name(tower: AnyTower) -> str:
    return type(tower.projector).__name__


def _scaling(tower: RawTower) -> tuple[Tensor, Tensor]:
    ones_D = torch.ones(tower.input_width, dtype=torch.float64)
    return ones_D / tower.length.double(), torch.zeros_like(ones_D)


def _folded(modules: list[nn.Module], before: tuple[Tensor, Tensor] | None, form: str) -> list[Layer]:
    """Fold x -> a x + b, before a layer or behind one, into the layers, in float64."""
    layers: list[Layer] = []
    for module in modules:
        is_open = bool(layers) and isinstance(layers[-1].activation, nn.Identity) and before is None
        if isinstance(module, nn.Linear):
            layers.append(_layer(module, before))
            before = None
        elif isinstance(module, nn.BatchNorm1d):
            if is_open:
                layers[-1] = _behind(layers[-1], _affine(module))
            else:
                before = _composed(before, _affine(module))
        elif isinstance(module, _ACTIVATIONS) and is_open:
            layers[-1] = replace(layers[-1], activation=module)
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            raise refusal(form, f"a {type(module).__name__} can't be folded into a dense layer")
    if before is not None and any((before[0] != 1) | (before[1] != 0)):
        layers.append(_rounded(torch.diag(before[0]), before[1]))
    return [replace(layer, weight_PD=layer.weight_PD.float(), bias_P=_float(layer.bias_P)) for layer in layers]


def _layer(linear: nn.Linear, before: tuple[Tensor, Tensor] | None) -> Layer:
    weight_PD = linear.weight.double()
    bias_P = None if linear.bias is None else linear.bias.double()
    if before is not None:
        scale_D, shift_D = before
        if shift_D.any():
            bias_P = (0 if bias_P is None else bias_P) + weight_PD @ shift_D
        weight_PD = weight_PD * scale_D
    return _rounded(weight_PD, bias_P)


def _rounded(weight_PD: Tensor, bias_P: Tensor | None) -> Layer:
    return Layer(weight_PD=weight_PD, bias_P=bias_P, activation=nn.Identity())


def _behind(layer: Layer, affine: tuple[Tensor, Tensor]) -> Layer:
    scale_P, shift_P = affine
    bias_P = shift_P if layer.bias_P is None else layer.bias_P * scale_P + shift_P
    return replace(layer, weight_PD=layer.weight_PD * scale_P[:, None], bias_P=bias_P)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_P = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale_P, norm.bias.double() - norm.running_mean.double() * scale_P


def _composed(first: tuple[Tensor, Tensor] | None, then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return then if first is None else (first[0] * then[0], first[1] * then[0] + then[1])


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()
