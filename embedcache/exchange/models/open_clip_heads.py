"""The heads that open_clip puts on its towers, with the weights of a projector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from embedcache.exchange.models.dense import Layer
from embedcache.exchange.models.run import refusal

_FORM = "open-clip"
NEXT = "train with --projector openclip-linear or openclip-mlp, or use embedcache export transformers"
_LAST = {
    "image": (("visual.proj", "matrix"), ("visual.head.proj", "linear"), ("visual.attnpool.c_proj", "linear")),
    "text": (("text_projection", "matrix"), ("text.text_projection", "matrix"), ("text.text_projection", "linear"),
             ("text.proj", "linear")),
}  # fmt: skip
"""Where a tower of open_clip's own ends in a linear map: a table (D, P), or a layer."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head.

    Args:
        config: what names it in open_clip's config.
        state: its weights, by the names of its modules.
    """

    config: Mapping[str, Any]
    state: Mapping[str, Tensor]


def image_head(layers: Sequence[Layer], shared_width: int) -> Head:
    """Put layers into the head of a timm tower: `linear`, or `mlp`, 2 P wide inside and with a bias there.

    Raises:
        SettingError: they have another shape.
    """
    if _is_linear(layers):
        state = {"proj.weight": layers[0].weight_PD, **_bias("proj.bias", layers[0])}
        return Head(config={"timm_proj": "linear", "timm_proj_bias": layers[0].bias_P is not None}, state=state)
    if _is_mlp(layers, 2 * shared_width):
        hidden, output = layers
        state = {
            "mlp.fc1.weight": hidden.weight_PD,
            "mlp.fc1.bias": hidden.weight_PD.new_zeros(2 * shared_width) if hidden.bias_P is None else hidden.bias_P,
            "mlp.fc2.weight": output.weight_PD,
            **_bias("mlp.fc2.bias", output),
        }
        return Head(config={"timm_proj": "mlp", "timm_proj_bias": output.bias_P is not None}, state=state)
    raise refusal(_FORM, "the image projector is no linear map, and no two of them with a GELU between, twice the "
                         "shared width inside", NEXT)  # fmt: skip


def text_head(layers: Sequence[Layer], shared_width: int) -> Head:
    """Put layers into the head of a transformer: `linear`, or `mlp`, (D + P) / 2 wide inside, both without biases.

    Raises:
        SettingError: they have another shape.
    """
    has_bias = any(layer.bias_P is not None for layer in layers)
    if _is_linear(layers) and not has_bias:
        return Head(config={"hf_proj_type": "linear"}, state={"weight": layers[0].weight_PD})
    if layers and _is_mlp(layers, (layers[0].weight_PD.shape[1] + shared_width) // 2) and not has_bias:
        state = {"0.weight": layers[0].weight_PD, "2.weight": layers[1].weight_PD}
        return Head(config={"hf_proj_type": "mlp"}, state=state)
    raise refusal(_FORM, "the text projector is no linear map without a bias, and no two of them with a GELU between, "
                         "(D + P) / 2 wide inside", NEXT)  # fmt: skip


def fold_behind(state: dict[str, Tensor], modality: str, layers: Sequence[Layer]) -> None:
    """Put a linear map behind a tower of open_clip's own into the linear map that the tower ends in.

    Args:
        state: of the whole model; changed in place.
        modality: `image` or `text`.
        layers: of the projector.

    Raises:
        SettingError: the projector is more than a linear map, or the tower does not end in one.
    """
    if not _is_linear(layers) or layers[0].bias_P is not None:
        raise refusal(_FORM, f"the {modality} projector is more than a linear map, and open_clip's towers end in one",
                      "train with --projector openclip-linear")  # fmt: skip
    weight_PD = layers[0].weight_PD.double()
    for name, kind in _LAST[modality]:
        if kind == "matrix" and name in state:
            state[name] = (state[name].double() @ weight_PD.T).float()
            return
        if kind == "linear" and f"{name}.weight" in state:
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in state:
                    state[key] = (weight_PD @ state[key].double()).float()
            return
    raise refusal(_FORM, f"the {modality} tower does not end in a linear map that could take the projector in")


def _is_linear(layers: Sequence[Layer]) -> bool:
    return len(layers) == 1 and isinstance(layers[0].activation, nn.Identity)


def _is_mlp(layers: Sequence[Layer], hidden_width: int) -> bool:
    return (
        len(layers) == 2
        and isinstance(layers[0].activation, nn.GELU)
        and layers[0].activation.approximate == "none"
        and isinstance(layers[1].activation, nn.Identity)
        and len(layers[0].weight_PD) == hidden_width
    )


def _bias(name: str, layer: Layer) -> dict[str, Tensor]:
    return {} if layer.bias_P is None else {name: layer.bias_P}
