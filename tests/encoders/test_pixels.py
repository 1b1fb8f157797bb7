"""Split transforms, compared with each library's whole transform."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedcache.encoders.models import PixelScale, split_transform
from embedcache.testing.encoders import example_images

ATOL = 1e-6


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.9},
        {"crop_pct": 1.0},
        {"crop_pct": 0.95, "crop_mode": "squash"},
        {"crop_pct": 1.0, "crop_mode": "border"},
        {"crop_pct": 0.875, "input_size": (3, 64, 96)},
        {"crop_pct": 1.0, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ],
    ids=str,
)
def test_timm(config: Mapping[str, Any], interpolation: str) -> None:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from embedcache.encoders.timm import pixel_transform

    model = timm.create_model("test_vit", pretrained_cfg_overlay={**config, "interpolation": interpolation})
    whole = create_transform(**resolve_model_data_config(model), is_training=False)
    pixels = pixel_transform(model)
    for image in _in_all_modes():
        _check(pixels.transform(image), pixels.scale, whole(image).numpy())


PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
    "SiglipImageProcessor": {"size": {"height": 32, "width": 32}},
    "DPTImageProcessor": {"size": {"height": 32, "width": 32}, "do_normalize": False},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers(name: str, tmp_path: Path) -> None:
    import transformers

    from embedcache.encoders.transformers import pixel_transform

    getattr(transformers, name)(**PROCESSORS[name]).save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = pixel_transform(tmp_path)
    for image in example_images():
        expected = processor(images=image, return_tensors="np")["pixel_values"][0]
        assert expected.shape == pixels.input_size
        _check(pixels.transform(image), pixels.scale, expected)


def test_transform_that_cannot_be_split_stays_float32(tmp_path: Path) -> None:
    import transformers

    from embedcache.encoders.transformers import pixel_transform

    # EfficientNet's processor normalizes twice.
    made = transformers.EfficientNetImageProcessor(size={"height": 32, "width": 32})
    made.save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = pixel_transform(tmp_path)
    for image in example_images():
        found = pixels.transform(image)
        assert found.dtype == np.float32
        assert isinstance(pixels.scale, torch.nn.Identity)
        np.testing.assert_array_equal(found, processor(images=image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_open_clip(resize_mode: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    from embedcache.encoders.open_clip import pixel_transform

    published = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    whole = open_clip.image_transform(32, is_train=False, resize_mode=resize_mode, **published)
    pixels = pixel_transform(whole, published)
    for image in example_images():
        _check(pixels.transform(image), pixels.scale, whole(image).numpy())


def test_split_that_differs_is_not_used() -> None:
    def whole(image: Image.Image) -> np.ndarray:
        return to_pixels(image).astype(np.float32) / 255

    def to_pixels(image: Image.Image) -> np.ndarray:
        return np.array(image.resize((8, 8))).transpose(2, 0, 1)

    right, wrong = PixelScale([0.0], [1.0], divisor=255), PixelScale([0.001], [1.0], divisor=255)
    assert split_transform(whole, to_pixels, right, {}) == (to_pixels, right, {}, (3, 8, 8))
    assert split_transform(whole, to_pixels, wrong, {}).transform is whole


def _check(pixels: np.ndarray, scale: torch.nn.Module, expected: np.ndarray) -> None:
    assert pixels.dtype == np.uint8
    found = scale(torch.from_numpy(pixels)[None])[0].numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


def _in_all_modes() -> list[Image.Image]:
    modes = ("RGB", "L", "RGBA", "CMYK", "P")
    return [image.convert(mode).convert("RGB") for image in example_images() for mode in modes]
