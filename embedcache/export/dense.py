"""A tower as an exact chain of linear layers and activations; batch normalization and centering are folded in."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embedcache.errors import SettingError
from embedcache.export.base import unsupported
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
    RawTower,
    ShareLockProjector,
    TokenTower,
)
from embedcache.projectors.pair import AnyTower

_Affine = tuple[Tensor, Tensor]  # (a, b) of x -> a x + b, in float64
_Refuse = Callable[[str], SettingError]
_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid)
_CHAINS = (OpenClipLinear, OpenClipImageMlp, OpenClipTextMlp, ShareLockProjector)
_REASONS = {
    MlpProjector: "adds a linear branch to a branch with layer normalization",
    GluProjector: "multiplies two branches with layer normalization",
    FuseMixProjector: "has residual blocks with layer normalization",
    AsifProjector: "keeps the largest of its cosines",
}


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """y = activation(W x + b), in float32."""

    weight_PD: Tensor
    bias_P: Tensor | None
    activation: nn.Module

    @property
    def is_linear(self) -> bool:
        return isinstance(self.activation, nn.Identity)


class DenseChain(NamedTuple):
    """A tower as layers, none for an identity; with `has_unit_input`, on vectors that are scaled to length 1 first."""

    layers: tuple[DenseLayer, ...]
    has_unit_input: bool


@torch.no_grad()
def dense_chain(tower: AnyTower, format_name: str, next_step: str) -> DenseChain:
    """Return a trained tower as a chain of dense layers that computes the same, up to rounding.

    Raises:
        SettingError: the projector is no such chain; the message ends with `next_step`, which the format knows.
    """
    refuse = partial(unsupported, format_name, next_step=next_step)
    if isinstance(tower, TokenTower):
        raise refuse(f"{type(tower.projector).__name__} maps every token, and a dense layer maps one vector")
    modules = list(_modules(tower, refuse))
    ones_D = torch.ones(tower.input_width, dtype=torch.float64)
    if isinstance(tower, RawTower):
        affine = (ones_D / tower.length.double(), 0 * ones_D)
    else:
        affine = (ones_D, -tower.mean.double())
    return DenseChain(_fold(modules, affine, refuse), has_unit_input=not isinstance(tower, RawTower))


def _modules(tower: AnyTower, refuse: _Refuse) -> Iterable[nn.Module]:
    projector = tower.projector
    if isinstance(projector, IdentityProjector):
        return []
    if isinstance(projector, LinearProjector):
        return [projector.linear]
    if isinstance(projector, _CHAINS):
        return projector.layers
    reason = _REASONS.get(type(projector), "is a plug-in with unknown layers")
    name = type(projector).__name__
    raise refuse(f"{name} {reason}, unlike a chain of dense layers")


def _fold(modules: list[nn.Module], affine: _Affine | None, refuse: _Refuse) -> tuple[DenseLayer, ...]:
    """Fold affine maps x -> a x + b, before or after a linear layer, into the layers, in float64."""
    layers: list[DenseLayer] = []
    for module in modules:
        can_extend = bool(layers) and layers[-1].is_linear and affine is None
        if isinstance(module, nn.Linear):
            layers.append(_fold_before(module, affine))
            affine = None
        elif isinstance(module, nn.BatchNorm1d):
            if can_extend:
                layers[-1] = _fold_after(layers[-1], _as_affine(module))
            else:
                scale_D, shift_D = _as_affine(module)
                affine = (scale_D, shift_D) if affine is None else (affine[0] * scale_D, affine[1] * scale_D + shift_D)
        elif isinstance(module, _ACTIVATIONS) and can_extend:
            layers[-1] = replace(layers[-1], activation=module)
        elif not isinstance(module, (nn.Dropout, nn.Identity)):
            raise refuse(f"a {type(module).__name__} cannot be folded into a dense layer")
    if affine is not None and any((affine[0] != 1) | (affine[1] != 0)):
        layers.append(DenseLayer(weight_PD=torch.diag(affine[0]), bias_P=affine[1], activation=nn.Identity()))
    return tuple(
        replace(layer, weight_PD=layer.weight_PD.float(), bias_P=None if layer.bias_P is None else layer.bias_P.float())
        for layer in layers
    )


def _fold_before(linear: nn.Linear, affine: _Affine | None) -> DenseLayer:
    weight_PD = linear.weight.double()
    bias_P = None if linear.bias is None else linear.bias.double()
    if affine is not None:
        scale_D, shift_D = affine
        if shift_D.any():
            bias_P = (0 if bias_P is None else bias_P) + weight_PD @ shift_D
        weight_PD = weight_PD * scale_D
    return DenseLayer(weight_PD=weight_PD, bias_P=bias_P, activation=nn.Identity())


def _fold_after(layer: DenseLayer, affine: _Affine) -> DenseLayer:
    scale_P, shift_P = affine
    bias_P = shift_P if layer.bias_P is None else layer.bias_P * scale_P + shift_P
    return replace(layer, weight_PD=layer.weight_PD * scale_P[:, None], bias_P=bias_P)


def _as_affine(norm: nn.BatchNorm1d) -> _Affine:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_P = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale_P, norm.bias.double() - norm.running_mean.double() * scale_P
