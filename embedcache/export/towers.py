"""Towers of a run for other libraries: frozen encoders as torch modules, projectors as chains of dense layers.

A module comes with what a model folder needs beside its weights. A chain is exact: batch normalization and centering
are folded into its layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embedcache.encoders import sentence_transformers, timm, transformers
from embedcache.encoders.base import Modality, background_of
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.weights import find_model_folder, load_part, load_pretrained
from embedcache.errors import SettingError
from embedcache.export.base import ExportRun, check_plain, unsupported
from embedcache.modeling.features import (
    ImageFeatures,
    TextFeatures,
    TimmFeatures,
    requested_layers,
)
from embedcache.modeling.heads import (
    AnyTower,
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
from embedcache.modeling.images import LITE_CROP_PADDING_PX

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
_STALE_OPTIONS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")
"""Options that a tokenizer remembers from earlier use; a processor would truncate texts at that `max_length`."""
SENTENCE_OPTIONS = ("prompt", "prompt_name", "truncate_dim")
"""Options of an encoder `st:` that a folder of sentence-transformers does not hold."""


@dataclass(frozen=True, kw_only=True)
class EncoderModule:
    """A frozen encoder as a module that returns a dict of features."""

    config: Mapping[str, Any]
    """JSON values that `modeling_embedcache.py` builds it from."""
    module: nn.Module
    processor: Any
    """Its image processor or tokenizer, of transformers."""


def open_module(run: ExportRun, modality: Modality, format_name: str) -> EncoderModule:
    """Open an encoder of a run.

    Raises:
        SettingError: the format does not support its family, or the feature is of a view.
    """
    tower_input = run.trained.input(modality)
    check_plain(tower_input, format_name)
    spec, names = EncoderSpec.parse(tower_input.spec), list(feature_names(tower_input.feature))
    openers = _openers(modality)
    if spec.family not in openers:
        expected = " or ".join(", ".join(openers).rsplit(", ", 1))
        raise unsupported(format_name, f"its {modality} encoder is of the family {spec.family!r}: expected {expected}")
    preprocessing = tower_input.fingerprint["preprocessing"]
    layers = requested_layers(names)
    _check_exportable(spec, modality, preprocessing, layers, format_name)
    module, own_config, processor = openers[spec.family](spec, names)
    config: dict[str, Any] = {
        "features": names,
        "layers": layers,
        "width": tower_input.width,
        **own_config,
    }
    if modality == "image":
        with torch.inference_mode():
            outputs: dict[str, torch.Tensor] = module(torch.zeros(1, *config["input_size"]))
        config["shapes"] = {name: list(output.shape[1:]) for name, output in outputs.items()}
    else:
        processor.model_max_length = int(preprocessing["max_tokens"])
    return EncoderModule(config=config, module=module, processor=processor)


def _check_exportable(
    spec: EncoderSpec, modality: Modality, preprocessing: Mapping[str, Any], layers: Sequence[int], format_name: str
) -> None:
    """Check that an encoder's options and preprocessing can be written into an exported processor."""
    if spec.options.get("fit", "crop") != "crop":
        raise unsupported(format_name, "the exported image processor crops the center square")
    if background_of(preprocessing) != "white":
        raise unsupported(format_name, "the exported image processor composites transparent images onto white")
    if modality == "text" and (preprocessing["prefix"] or preprocessing["lower"]):
        text_alone = "use embedcache export sentence-transformers for the text tower"
        raise unsupported(
            format_name,
            "its text encoder prepends a prompt or lowercases texts, and a tokenizer does not",
            "" if set(SENTENCE_OPTIONS) & spec.options.keys() else text_alone,
        )
    if spec.family == "lite" and layers:
        reason = "layerN counts blocks in lite, and stages in timm's network of that architecture"
        raise unsupported(format_name, reason)


class _OpenedEncoder(NamedTuple):
    """An encoder as its family opens it.

    Args:
        module: returns a dict of features.
        config: the part of the config that depends on the family.
        processor: its image processor or tokenizer.
    """

    module: nn.Module
    config: dict[str, Any]
    processor: Any


def _openers(modality: Modality) -> dict[str, Callable[..., _OpenedEncoder]]:
    """Return the function that opens encoders of each exportable family."""
    open_hf = partial(_open_hf, modality)
    if modality == "image":
        return {"timm": _open_timm, "hf": open_hf, "lite": _open_lite}
    return {"hf": open_hf, "st": _open_sentences}


def _open_timm(spec: EncoderSpec, names: Sequence[str]) -> _OpenedEncoder:
    model, _ = timm.load_model(spec)
    size_px = spec.int_option("image_size")
    is_resized = size_px is not None and hasattr(model, "set_input_size")
    if is_resized:
        model.set_input_size(img_size=(size_px, size_px))
    transform = timm.pixel_transform(model, size_px)
    is_on_hub = spec.model.startswith(timm.HUB_PREFIXES)
    config = {
        "kind": "timm",
        "model": model.pretrained_cfg["architecture"] if is_on_hub else spec.model,
        "image_size": size_px if is_resized else None,
        "input_size": list(transform.input_size),
    }
    module = TimmFeatures(model, requested_layers(names)).eval()
    return _OpenedEncoder(module, config, _image_processor("timm", transform.published))


def _open_lite(spec: EncoderSpec, names: Sequence[str]) -> _OpenedEncoder:
    network, _ = timm.load_lite_model(spec)
    size_px = timm.LITE_MODELS[spec.model]
    network.reset_classifier(0)
    input_size = [3, size_px, size_px]
    model = timm.lite_architecture(spec.model)
    config = {"kind": "timm", "model": model, "image_size": None, "input_size": input_size}
    settings = {
        "size_px": size_px,
        "crop_padding_px": LITE_CROP_PADDING_PX,
        "mean": timm.LITE_MEAN,
        "std": timm.LITE_STD,
    }
    module = TimmFeatures(network, requested_layers(names)).eval()
    return _OpenedEncoder(module, config, _image_processor("lite", settings))


def _open_hf(modality: Modality, spec: EncoderSpec, names: Sequence[str]) -> _OpenedEncoder:
    from transformers import AutoImageProcessor

    folder = find_model_folder(spec).path
    tower_config, loader = transformers.find_tower(folder, modality)
    model = _load_seeded(lambda: load_pretrained(loader, folder, tower_config))
    layers = requested_layers(names)
    config: dict[str, Any] = {"kind": "transformers", **_model_config(model)}
    if modality == "text":
        pools = transformers.TEXT_POOLS
        config |= {"pools": pools, "heads": []}
        return _OpenedEncoder(TextFeatures(model, layers, pools).eval(), config, _tokenizer(folder))
    config["input_size"] = list(transformers.pixel_transform(folder).input_size)
    processor = load_part(AutoImageProcessor, folder, "image processor", "add preprocessor_config.json")
    settings = transformers.published_settings(processor)
    module = ImageFeatures(model, layers).eval()
    return _OpenedEncoder(module, config, _image_processor("transformers", settings))


def _load_seeded(load: Callable[[], tuple[nn.Module, str]]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for weights that the checkpoint lacks, such as those of an unused pooler
        return load()[0]


def _open_sentences(spec: EncoderSpec, names: Sequence[str]) -> _OpenedEncoder:
    modules = sentence_transformers.read_modules(sentence_transformers.find_folder(spec).path)
    model = _load_seeded(lambda: sentence_transformers.load_transformer(modules))
    config = {
        "kind": "sentences",
        **_model_config(model),
        "pools": modules.pools,
        "heads": [
            {
                "num_in": head.linear.in_features,
                "num_out": head.linear.out_features,
                "has_bias": head.linear.bias is not None,
                "activation": type(head.activation).__name__,
            }
            for head in modules.heads
        ],
    }
    width = spec.int_option("truncate_dim")
    module = TextFeatures(model, requested_layers(names), modules.pools, modules.heads, width).eval()
    return _OpenedEncoder(module, config, _tokenizer(modules.tokenizer))


def _model_config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return {"class": type(model).__name__, "config": settings}


def _image_processor(kind: str, settings: Mapping[str, Any]) -> Any:
    from embedcache.modeling.image_processing_embedcache import EmbedcacheImageProcessor

    EmbedcacheImageProcessor.register_for_auto_class()
    return EmbedcacheImageProcessor(kind=kind, settings=dict(settings))


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = load_part(AutoTokenizer, source, "tokenizer", "add the model's tokenizer files")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    for name in _STALE_OPTIONS:
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


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
