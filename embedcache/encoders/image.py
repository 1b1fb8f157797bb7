"""Image encoders: a transform per image, run on threads, and a model per batch.

Preprocessing is split where possible: images are resized to uint8 on threads and normalized in float32 on the device.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array
from embedcache.axis import Axis
from embedcache.encoders.backends import GraphEncoder, OnnxExport, build_graph
from embedcache.encoders.base import EncoderSettings, Fingerprint, ItemShape
from embedcache.errors import SettingError
from embedcache.modeling.features import FeatureName, derive_features, native_features, patch_grid, patch_pools

Transform: TypeAlias = Callable[[Image.Image], Array]
"""RGB image of any size -> (3, H, W): uint8 if the model normalizes pixels itself, else float32."""

INPUT = "images"
"""Name of an image model's input."""


def build_image_encoder(
    module: torch.nn.Module,
    pixels: "PixelTransform",
    fingerprint: Fingerprint,
    settings: EncoderSettings,
    *,
    config: Mapping[str, Any] | None = None,
    is_whole: bool = False,
) -> GraphEncoder:
    """Create an encoder from a loaded model.

    Args:
        module: computes native features, see `ImageModel`.
        pixels: how images become its input.
        fingerprint: of the model; the preprocessing is filled in here, and the rest as in `GraphEncoder`.
        settings: how it runs.
        config: JSON values that determine the ONNX graph together with the weights and the preprocessing. If None, the
            model runs on torch only.
        is_whole: whether the transform shows the model the whole image, not a part of it.
    """
    model = ImageModel(module, pixels.scale, input_size=pixels.input_size, requested=settings.features)
    export = None
    if config is not None:
        noise = np.random.default_rng(0).integers(0, 256, (2, *model.input_size), dtype=np.uint8)
        if not model.has_pixel_scale:
            noise = ((noise - 127.5) / 64).astype(np.float32)
        export = OnnxExport(
            module=model,
            example={INPUT: np.zeros_like(noise[:1])},
            check_inputs={INPUT: noise},
            outputs=tuple(model.features),
            dynamic_axes={name: {0: "batch"} for name in (INPUT, *model.features)},
            key={"config": config, "preprocessing": pixels.published},
        )
    return GraphEncoder(
        "image",
        build_graph(model, settings, fingerprint, export),
        prepare=lambda images: [pixels.transform(image) for image in images],
        collate=lambda prepared: {INPUT: np.stack(prepared)},
        features=model.features,
        fingerprint=replace(fingerprint, preprocessing=pixels.published),
        settings=settings,
        axes=model.axes(box=(0.0, 0.0, 1.0, 1.0) if is_whole else None),
    )


class ImageModel(torch.nn.Module):
    """An image model with pixel normalization before it and derived features after it.

    Args:
        module: maps (B, 3, H, W) float32 to a dict of (B, D) vectors and (B, T, D) tokens: its native features, and
            the same names with the prefix `layerN.` for each requested block.
        scale: normalizes a batch of prepared images.
        input_size: (3, H, W).
        requested: names of features; those that cannot be derived are left out.
    """

    features: dict[str, ItemShape]
    """Name -> shape of one item: native features in the model's order, then the requested ones."""
    has_pixel_scale: bool
    """Whether it normalizes uint8 pixels itself; else it takes float32 values that are normalized."""

    def __init__(
        self, module: torch.nn.Module, scale: torch.nn.Module, *, input_size: Sequence[int], requested: Sequence[str]
    ) -> None:
        super().__init__()
        self.input_size = tuple(input_size)
        self.has_pixel_scale = isinstance(scale, PixelScale)
        self._module, self._scale = module.eval(), scale
        shapes = _find_shapes(module, input_size)
        self._pools = patch_pools(requested, shapes, input_size)
        zeros = {name: torch.zeros(1, *shape) for name, shape in shapes.items()}
        features = derive_features([*native_features(shapes), *requested], zeros, self._pools)
        self.features = {name: tuple(values.shape[1:]) for name, values in features.items()}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, C, H, W) images by name: (B, D), or (B, T, D) for tokens."""
        return derive_features(self.features, self._module(self._scale(images)), self._pools)

    def axes(self, *, box: tuple[float, float, float, float] | None) -> dict[str, Axis]:
        """Return the axes of the features whose tokens form a grid; `box` is the part of the image that they cover."""
        axes = {}
        for text, shape in self.features.items():
            name = FeatureName.parse(text)
            if len(shape) == 1 or name is None or name.clusters is not None:
                continue
            is_pooled = name.grid is not None
            grid = (name.grid, name.grid) if is_pooled else patch_grid(shape[0], *self.input_size[-2:])
            if grid is not None:
                axes[text] = Axis(kind="grid", rows=grid[0], columns=grid[1], box=box)
        return axes


def _find_shapes(module: torch.nn.Module, input_size: Sequence[int]) -> dict[str, ItemShape]:
    """Return the shapes of a model's outputs for one image, found by running it twice on noise.

    A `pooled` that repeats another feature is left out, and so are patches that form no grid: some are special tokens.
    """
    noise = torch.rand((2, *input_size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs: dict[str, torch.Tensor] = module(noise)
        repeated: dict[str, torch.Tensor] = module(noise)
    for name in [name for name in outputs if name.endswith("patches")]:
        if patch_grid(outputs[name].shape[1], *input_size[-2:]) is None:
            del outputs[name]
            outputs.pop(name.replace("patches", "patch_mean"), None)
    if not all(_is_close(output, repeated[name]) for name, output in outputs.items()):
        raise SettingError(
            "expected a deterministic model, got one whose output differs between two runs on the same image, such as "
            "one that masks random patches; choose another architecture"
        )
    pooled = outputs.get("pooled")
    others = [outputs[name] for name in native_features(outputs) if name != "pooled"]
    if pooled is not None and any(_is_close(pooled, other) for other in others):
        del outputs["pooled"]
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def _is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-5)


class PixelScale(torch.nn.Module):
    """Normalize pixels in float32: (pixels / divisor - mean) / std.

    Mean and std have one value per channel; the divisor is 255 if they are those of pixels in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor, *, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self._divisor = divisor
        for name, values in (("mean", mean), ("std", std)):
            per_channel = torch.as_tensor(values, dtype=torch.float32)[:, None, None]
            self.register_buffer(name, per_channel, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize (B, C, H, W) pixels: the same shape, float32."""
        pixels = images.float()
        if self._divisor != 1:
            pixels = pixels / self._divisor
        return (pixels - self.mean) / self.std


class PixelTransform(NamedTuple):
    """How images become the input of a model: a transform per image on threads, then a module on the device.

    Args:
        transform: RGB image of any size -> (3, H, W).
        scale: normalizes a batch of these, (B, 3, H, W) -> the same shape in float32.
        published: settings of the published transform, as JSON values.
        input_size: (3, H, W).
    """

    transform: Transform
    scale: torch.nn.Module
    published: dict[str, Any]
    input_size: tuple[int, ...]


def split_transform(
    whole: Transform, to_pixels: Transform, scale: PixelScale, published: Mapping[str, Any]
) -> PixelTransform:
    """Split a published transform at uint8 pixels.

    Args:
        whole: the published transform.
        to_pixels: its steps up to uint8 pixels.
        scale: its normalization. If this and `to_pixels` do not compute what `whole` does on noise, `whole` is kept.
        published: its settings.

    Raises:
        SettingError: the transform returns a different shape per image.
    """
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((320, 200), (200, 320))]
    expected = [whole(image) for image in images]
    shapes = {array.shape for array in expected}
    if len(shapes) != 1:
        raise SettingError(
            f"the image processor returns a different shape per image, {sorted(shapes)}, and a batch needs one: set "
            "do_center_crop, or a size with height and width, in preprocessor_config.json"
        )
    try:
        split = [to_pixels(image) for image in images]
        is_exact = all(map(partial(_is_exact, scale), split, expected))
    except (TypeError, ValueError, RuntimeError):  # a transform that normalizes twice may not support skipping it
        is_exact = False
    transform, module = (to_pixels, scale) if is_exact else (whole, torch.nn.Identity())
    return PixelTransform(transform, module, plain_json(published), shapes.pop())


def _is_exact(scale: PixelScale, pixels: Array, expected: Array) -> bool:
    if pixels.dtype != np.uint8 or pixels.shape != expected.shape:
        return False
    scaled = scale(torch.from_numpy(pixels)[None])[0].numpy()
    return np.allclose(scaled, expected, rtol=1e-6, atol=1e-6)  # the order of float32 operations may differ


def plain_json(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return a library's settings as they read back from JSON: tuples as lists, other objects as their text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(published), default=str))
    return plain
