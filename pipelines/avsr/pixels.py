"""An image encoder, `pipelines.avsr.pixels:open_pixels:24x16`: the gray image itself, at a width and height in pixels.

On the frames of videos: `frames:pipelines.avsr.pixels:open_pixels:24x16,rate=25`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from embedcache.arrays import Array
from embedcache.encoders.base import NO_WEIGHTS, Encoder, EncoderSettings, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.errors import SettingError

FAMILY = "pipelines.avsr.pixels:open_pixels"
PIXELS_SIZE = (24, 16)
"""Width and height of the frames of `stacks`."""


def open_pixels(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder. Its model is the size, WIDTHxHEIGHT in pixels; it has no options."""
    check_options(spec, ())
    check_modality(spec, modality, "image")
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", spec.model)
    if match is None:
        raise SettingError(f"{spec.text}: expected WIDTHxHEIGHT in pixels, such as 24x16, got {spec.model!r}")
    return Pixels((int(match[1]), int(match[2])), batch_size=settings.batch_size or 256)


class Pixels:
    """An image encoder whose vector is the gray image itself: its center, in the size's aspect ratio, resized."""

    modality: Modality = "image"

    def __init__(self, size: tuple[int, int], *, batch_size: int) -> None:
        self._size = size
        self.batch_size = batch_size

        self.features: Mapping[str, ItemShape] = {"pixels": (size[0] * size[1],)}
        self.fingerprint = Fingerprint(
            family="pixels",
            model=f"{size[0]}x{size[1]}",
            weights=NO_WEIGHTS,
            preprocessing={"width": size[0], "height": size[1], "interpolation": "bilinear (Pillow)", "range": [0, 1]},
            pooling={"pixels": "all pixels in gray, row by row"},
            backend="numpy",
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        method = Image.Resampling.BILINEAR
        return [np.asarray(ImageOps.fit(image.convert("L"), self._size, method=method)) for image in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        check_names(names, self.features)
        vectors: list[Array] = [image.ravel() / np.float32(255) for image in prepared]
        return {name: list(vectors) for name in names}
