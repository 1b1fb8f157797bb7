"""The frozen encoders of a run as torch modules, with what a model folder needs beside their weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedcache.encoders import lite, sentence_transformers, timm, transformers
from embedcache.encoders.base import Modality
from embedcache.encoders.image_features import CROP_PADDING_PX, ImageFeatures, TimmFeatures, requested_layers, untie
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.text_features import Dense, Sentences, TextFeatures
from embedcache.encoders.weights import load_pretrained, model_folder
from embedcache.export.base import Run, check_plain, refusal
from embedcache.projectors.towers import RawTower, TokenTower

_STALE = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")
"""What a tokenizer remembers of another use; a processor would cut texts at that `max_length`."""
_TEXT_KINDS = "hf and st"
_IMAGE_KINDS = "timm, hf and lite"


@dataclass(frozen=True, kw_only=True)
class OpenTower:
    """One side's encoder.

    Args:
        about: JSON values that `hub_code/modeling_embedcache.py` builds it from.
        module: gives a dict of features; the weights are in it.
        save: writes its processor or tokenizer into a folder.
    """

    about: Mapping[str, Any]
    module: nn.Module
    save: Callable[[Path], None]


def open_image_tower(run: Run, form: str) -> OpenTower:
    """Open the image encoder of a run.

    Raises:
        SettingError: it is of a family whose models the format does not hold, or the feature is of a view, or rounded.
    """
    spec, names = _checked(run, "image", form)
    openers = {"timm": _open_timm, "hf": _open_hf_image, "lite": _open_lite}
    if spec.family not in openers:
        raise refusal(form, f"its image encoder is of the family {spec.family!r}, and {_IMAGE_KINDS} can be held")
    module, about, save = openers[spec.family](spec, names)
    shapes = _shapes(module, about["input_size"])
    return OpenTower(about={**_about(run, "image"), **about, "shapes": shapes}, module=module, save=save)


def open_text_tower(run: Run, form: str) -> OpenTower:
    """Open the text encoder of a run.

    Raises:
        SettingError: it is of a family whose models the format does not hold, or the feature is rounded.
    """
    spec, names = _checked(run, "text", form)
    openers = {"hf": _open_hf_text, "st": _open_sentences}
    if spec.family not in openers:
        raise refusal(form, f"its text encoder is of the family {spec.family!r}, and {_TEXT_KINDS} can be held")
    preprocessing = run.config.text.fingerprint["preprocessing"]
    if preprocessing["prefix"] or preprocessing["lower"]:
        raise refusal(form, "its text encoder puts a prompt before each text, or lowers it, and a tokenizer does not",
                      "use embedcache export sentence-transformers for the text side")  # fmt: skip
    module, about, source = openers[spec.family](spec, names)
    save = _tokenizer_saver(source, int(preprocessing["max_tokens"]))
    return OpenTower(about={**_about(run, "text"), **about}, module=module, save=save)


def _checked(run: Run, modality: Modality, form: str) -> tuple[EncoderSpec, tuple[str, ...]]:
    side = run.config.tower_input(modality)
    check_plain(side, form)
    return EncoderSpec.parse(side.spec), feature_names(side.feature)


def _about(run: Run, modality: Modality) -> dict[str, Any]:
    side, tower = run.config.tower_input(modality), run.pair.tower(modality)
    takes = "tokens" if isinstance(tower, TokenTower) else "bare" if isinstance(tower, RawTower) else "centred"
    names = list(feature_names(side.feature))
    return {"features": names, "layers": requested_layers(names), "width": side.width, "takes": takes}


def _shapes(module: nn.Module, input_size: Sequence[int]) -> dict[str, list[int]]:
    with torch.inference_mode():
        outputs: dict[str, torch.Tensor] = module(torch.zeros(1, *input_size))
    return {name: list(output.shape[1:]) for name, output in outputs.items()}


_Image = tuple[nn.Module, dict[str, Any], Callable[[Path], None]]


def _open_timm(spec: EncoderSpec, names: Sequence[str]) -> _Image:
    model, _ = timm.load_model(spec)
    size_px = int(spec.options["image_size"]) if "image_size" in spec.options else None
    resizes = size_px is not None and hasattr(model, "set_input_size")
    if resizes:
        model.set_input_size(img_size=(size_px, size_px))
    settings = timm.pixel_transform(model, size_px)[2]
    is_on_hub = spec.model.startswith(timm.HUB_PREFIXES)
    about = {
        "kind": "timm",
        "model": model.pretrained_cfg["architecture"] if is_on_hub else spec.model,
        "image_size": size_px if resizes else None,
        "input_size": settings["input_size"],
    }
    return TimmFeatures(model, requested_layers(names)).eval(), about, _processor_saver("timm", settings)


def _open_lite(spec: EncoderSpec, names: Sequence[str]) -> _Image:
    """Put the package's weights into timm's network of the same architecture: the order of layers is the same."""
    model, size_px = lite.load_model(spec)
    if requested_layers(names):
        raise refusal("an export of lite", "layerN counts its blocks, and timm's network counts stages")
    name = f"tf_{spec.model.replace('-', '_')}"
    network = timm.make_model(name)
    weights = [value for key, value in model.state_dict().items() if not key.startswith("_fc.")]
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    about = {"kind": "timm", "model": name, "image_size": None, "input_size": [3, size_px, size_px]}
    settings = {"size_px": size_px, "crop_padding_px": CROP_PADDING_PX, "mean": lite.MEAN, "std": lite.STD}
    return TimmFeatures(network, []).eval(), about, _processor_saver("lite", settings)


def _open_hf_image(spec: EncoderSpec, names: Sequence[str]) -> _Image:
    folder = model_folder(spec).path
    config, loader = transformers.tower_of(folder, "image")
    model, _ = _loaded(loader, folder, config)
    layers = requested_layers(names)
    untie(model, layers)
    input_size = list(transformers.pixel_transform(folder)[3])
    about = {"kind": "transformers", **_class(model), "input_size": input_size}
    return ImageFeatures(model, layers).eval(), about, lambda out: transformers.save_processor(folder, out)


_Text = tuple[nn.Module, dict[str, Any], Path]


def _open_hf_text(spec: EncoderSpec, names: Sequence[str]) -> _Text:
    folder = model_folder(spec).path
    config, loader = transformers.tower_of(folder, "text")
    model, _ = _loaded(loader, folder, config)
    layers = requested_layers(names)
    untie(model, layers)
    return TextFeatures(model, layers).eval(), {"kind": "transformers", **_class(model)}, folder


def _open_sentences(spec: EncoderSpec, names: Sequence[str]) -> _Text:
    folder = sentence_transformers.find_folder(spec).path
    parts = sentence_transformers.read_parts(folder)
    model, _ = _loaded(*sentence_transformers.loader_of(parts.transformer))
    layers = requested_layers(names)
    untie(model, layers)
    heads = [sentence_transformers.open_dense(path) for path in parts.dense]
    about = {
        "kind": "sentences",
        **_class(model),
        "pools": list(parts.pools),
        "heads": [_head(head) for head in heads],
    }
    source = folder if (folder / "tokenizer_config.json").exists() else parts.transformer
    return Sentences(model, parts.pools, heads, layers).eval(), about, source


def _loaded(loader: Any, folder: Path, config: Any) -> tuple[nn.Module, str]:
    """Load a model; what its checkpoint leaves out, such as a pooler that nobody asks, is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_pretrained(loader, folder, config)


def _class(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return {"class": type(model).__name__, "config": settings}


def _head(head: Dense) -> dict[str, Any]:
    linear = head.linear
    return {
        "num_in": linear.in_features,
        "num_out": linear.out_features,
        "has_bias": linear.bias is not None,
        "activation": type(head.activation).__name__,
    }


def _processor_saver(kind: str, settings: Mapping[str, Any]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        from embedcache.export.hub_code.image_processing_embedcache import EmbedcacheImageProcessor

        EmbedcacheImageProcessor(kind=kind, settings=dict(settings)).save_pretrained(folder)

    return save


def _tokenizer_saver(source: Path, max_tokens: int) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.model_max_length = max_tokens
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        for name in _STALE:
            tokenizer.init_kwargs.pop(name, None)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(folder)

    return save
