"""Frozen encoders of a run as torch modules, with the config and the processor of a model folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embedcache.encoders import sentence_transformers, timm, transformers
from embedcache.encoders.base import Modality, background_of
from embedcache.encoders.open import EncoderSpec, feature_names
from embedcache.encoders.weights import find_model_folder, load_part, load_pretrained
from embedcache.export.base import check_plain, unsupported
from embedcache.modeling.features import ImageFeatures, TextFeatures, TimmFeatures, requested_layers
from embedcache.modeling.images import LITE_CROP_PADDING_PX
from embedcache.runs import Run

_STALE_OPTIONS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")
"""Options that a tokenizer stores from earlier use. A processor would truncate texts at that `max_length`."""


@dataclass(frozen=True, kw_only=True)
class EncoderModule:
    """A frozen encoder as a module that returns a dict of features.

    Args:
        config: JSON values that `modeling_embedcache.py` builds it from.
        processor: the image processor or tokenizer of transformers.
    """

    config: Mapping[str, Any]
    module: nn.Module
    processor: Any


def open_module(run: Run, modality: Modality, format_name: str) -> EncoderModule:
    """Open an encoder of a run.

    Raises:
        SettingError: the format does not support its family or options, or the feature is of a view.
    """
    side = run.input(modality)
    check_plain(side, format_name)
    spec = EncoderSpec.parse(side.spec)
    preprocessing = side.fingerprint["preprocessing"]
    names = list(feature_names(side.feature))
    layers = requested_layers(names)
    _check_exportable(spec, modality, preprocessing, layers, format_name)

    encoder = _openers(modality)[spec.family](spec, layers)
    config = {"features": names, "layers": layers, "width": side.width, **encoder.config}
    if modality == "image":
        # The number of patches depends on the size of the images.
        with torch.inference_mode():
            outputs: dict[str, torch.Tensor] = encoder.module(torch.zeros(1, *config["input_size"]))
        config["shapes"] = {name: list(output.shape[1:]) for name, output in outputs.items()}
    else:
        encoder.processor.model_max_length = int(preprocessing["max_tokens"])
    return EncoderModule(config=config, module=encoder.module.eval(), processor=encoder.processor)


def _check_exportable(
    spec: EncoderSpec, modality: Modality, preprocessing: Mapping[str, Any], layers: Sequence[int], format_name: str
) -> None:
    """Check that an encoder's family, options and preprocessing can be written into an exported model."""
    openers = _openers(modality)
    is_cropped = spec.options.get("fit", "crop") == "crop"
    is_altered = modality == "text" and (preprocessing.get("prefix") or preprocessing.get("lower"))
    reasons = {
        f"its {modality} encoder is {spec.family}: expected {' or '.join(openers)}": spec.family not in openers,
        "the exported image processor crops the center square": not is_cropped,
        "the exported image processor composites onto white": background_of(preprocessing) != "white",
        "its text encoder prepends a prompt or lowercases texts, and a tokenizer does not": is_altered,
        "layerN counts blocks in lite, and stages in timm's network": spec.family == "lite" and layers,
    }
    for reason, is_refused in reasons.items():
        if is_refused:
            raise unsupported(format_name, reason)


def _openers(modality: Modality) -> dict[str, Callable[[EncoderSpec, Sequence[int]], EncoderModule]]:
    """Return the function that opens encoders of each exportable family."""
    if modality == "image":
        return {"timm": _open_timm, "hf": _open_hf_images, "lite": _open_lite}
    return {"hf": _open_hf_texts, "st": _open_sentences}


def _open_timm(spec: EncoderSpec, layers: Sequence[int]) -> EncoderModule:
    model, _ = timm.load_model(spec)
    size_px = spec.int_option("image_size")
    is_resized = size_px is not None and hasattr(model, "set_input_size")
    if is_resized:
        model.set_input_size(img_size=(size_px, size_px))

    transform = timm.pixel_transform(model, size_px)

    # Without the hub, timm builds a network only by the name of its architecture.
    is_on_hub = spec.model.startswith(timm.HUB_PREFIXES)
    config = {
        "kind": "timm",
        "model": model.pretrained_cfg["architecture"] if is_on_hub else spec.model,
        "image_size": size_px if is_resized else None,
        "input_size": list(transform.input_size),
    }
    processor = _image_processor("timm", transform.published)
    return EncoderModule(config=config, module=TimmFeatures(model, layers), processor=processor)


def _open_lite(spec: EncoderSpec, layers: Sequence[int]) -> EncoderModule:
    network, _ = timm.load_lite_model(spec)
    network.reset_classifier(0)
    size_px = timm.LITE_MODELS[spec.model]
    model = timm.lite_architecture(spec.model)
    config = {"kind": "timm", "model": model, "image_size": None, "input_size": [3, size_px, size_px]}
    settings = {
        "size_px": size_px,
        "crop_padding_px": LITE_CROP_PADDING_PX,
        "mean": timm.LITE_MEAN,
        "std": timm.LITE_STD,
    }
    processor = _image_processor("lite", settings)
    return EncoderModule(config=config, module=TimmFeatures(network, layers), processor=processor)


def _open_hf_images(spec: EncoderSpec, layers: Sequence[int]) -> EncoderModule:
    from transformers import AutoImageProcessor

    folder = find_model_folder(spec).path
    model = _load_hf(folder, "image")
    input_size = list(transformers.pixel_transform(folder).input_size)
    published = load_part(AutoImageProcessor, folder, "image processor", "add preprocessor_config.json")
    processor = _image_processor("transformers", transformers.published_settings(published))
    config = {"kind": "transformers", **_model_config(model), "input_size": input_size}
    return EncoderModule(config=config, module=ImageFeatures(model, layers), processor=processor)


def _open_hf_texts(spec: EncoderSpec, layers: Sequence[int]) -> EncoderModule:
    folder = find_model_folder(spec).path
    model = _load_hf(folder, "text")
    pools = transformers.TEXT_POOLS
    config = {**_model_config(model), "pools": pools, "heads": []}
    return EncoderModule(config=config, module=TextFeatures(model, layers, pools), processor=_tokenizer(folder))


def _load_hf(folder: Path, modality: Modality) -> nn.Module:
    tower_config, loader = transformers.find_tower(folder, modality)
    model, _ = load_pretrained(loader, folder, tower_config)
    return model


def _open_sentences(spec: EncoderSpec, layers: Sequence[int]) -> EncoderModule:
    modules = sentence_transformers.read_modules(sentence_transformers.find_folder(spec).path)
    model, _ = sentence_transformers.load_transformer(modules)
    heads = []
    for head in modules.heads:
        heads.append(
            {
                "input_width": head.linear.in_features,
                "output_width": head.linear.out_features,
                "has_bias": head.linear.bias is not None,
                "activation": type(head.activation).__name__,
            }
        )

    config = {**_model_config(model), "pools": modules.pools, "heads": heads}
    module = TextFeatures(model, layers, modules.pools, modules.heads, spec.int_option("truncate_dim"))
    return EncoderModule(config=config, module=module, processor=_tokenizer(modules.tokenizer))


def _model_config(model: Any) -> dict[str, Any]:
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    return {"class": type(model).__name__, "config": settings}


def _image_processor(kind: str, settings: Mapping[str, Any]) -> Any:
    from embedcache.modeling.image_processing_embedcache import EmbedcacheImageProcessor

    EmbedcacheImageProcessor.register_for_auto_class()
    return EmbedcacheImageProcessor(kind=kind, settings=dict(settings))


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = load_part(AutoTokenizer, source, "tokenizer", "add the model's tokenizer files")
    tokenizer.padding_side = "right"

    # Padding is masked, so any token can pad.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)

    for name in _STALE_OPTIONS:
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer
