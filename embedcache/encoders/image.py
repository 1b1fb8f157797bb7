"""An image encoder: a transform for one picture and a graph for a batch.

Where a picture's preprocessing is cut in two: resized to uint8 on threads, scaled in float32 on the device.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from embedcache.arrays import Array
from embedcache.encoders.backends import Graph, batch_size
from embedcache.encoders.base import Fingerprint, ItemShape, Modality
from embedcache.encoders.image_features import FeatureName, native_features, patch_grid, patch_pool
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError
from embedcache.registry import unknown_name

Transform: TypeAlias = Callable[[Image.Image], Array]
"""An RGB picture of any size -> (3, H, W): uint8 where the model scales pixels itself, else float32 as it wants it."""

TOLERANCE = 1e-6
"""The order of float32 operations may differ; values are of about 1."""


class Scale(torch.nn.Module):
    """Pixels to what a model wants: (pixels / divisor - mean) / std, in float32.

    Args:
        mean: one value a channel, as numbers or a tensor.
        std: the same.
        divisor: 255 where mean and std are those of pixels in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor, *, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self._divisor = divisor
        for name, values in (("mean", mean), ("std", std)):
            values_C11 = torch.as_tensor(values, dtype=torch.float32)[:, None, None]
            self.register_buffer(name, values_C11, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale (B, 3, H, W) uint8 to float32."""
        pixels = images.float()
        if self._divisor != 1:
            pixels = pixels / self._divisor
        return (pixels - self.mean) / self.std


def split_transform(whole: Transform, to_pixels: Transform, scale: Scale) -> tuple[Transform, torch.nn.Module]:
    """Stop a published transform at uint8 where that gives the same.

    Args:
        whole: the published transform, to float32.
        to_pixels: the same without its scaling.
        scale: the scaling, from its published settings.

    Returns:
        `to_pixels` and `scale` where one after the other they give what `whole` gives on pictures of noise; else
        `whole`, and a module that changes nothing.
    """
    is_same = all(_agree(whole, to_pixels, scale, size) for size in ((320, 200), (200, 320)))
    return (to_pixels, scale) if is_same else (whole, torch.nn.Identity())


def _agree(whole: Transform, to_pixels: Transform, scale: Scale, size: tuple[int, int]) -> bool:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = whole(Image.fromarray(noise))
    try:
        pixels = to_pixels(Image.fromarray(noise))
    except (TypeError, ValueError, RuntimeError):  # a transform that scales twice may refuse to leave it out
        return False
    if pixels.dtype != np.uint8 or pixels.shape != expected.shape:
        return False
    found = scale(torch.from_numpy(pixels)[None])[0].numpy()
    return np.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


INPUT = "images"
"""The name of the graph's one input, (B, 3, H, W), uint8 or float32 as the transform gives it."""


class ImageEncoder:
    """A frozen model of pictures, of any family.

    Args:
        graph: gives the features, each with the batch as first axis.
        transform: called from many threads at once.
        features: name -> shape of one item, the default first.
        fingerprint: all that decides the output.
        settings: how many pictures one `encode` call should get.
    """

    modality: Modality = "image"

    def __init__(
        self,
        *,
        graph: Graph,
        transform: Transform,
        features: Mapping[str, ItemShape],
        fingerprint: Fingerprint,
        settings: EncoderSettings,
    ) -> None:
        self.features = features
        self.fingerprint = fingerprint
        self.batch_size = batch_size(settings, cpu=32, other=128)
        self._graph = graph
        self._transform = transform

    def prepare(self, items: Sequence[Image.Image]) -> list[Array]:
        """Turn RGB pictures of any size into (3, H, W) arrays, uint8 or float32."""
        return [self._transform(image) for image in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Give the named features of each picture, float32, not normalized."""
        check_names(names, self.features)
        if not prepared:
            return {name: [] for name in names}
        outputs = self._graph({INPUT: np.stack(prepared)}, names)
        return {name: list(outputs[name]) for name in names}


class ImageModel(torch.nn.Module):
    """A model of pictures, with the scaling of pixels before it and what is derived behind it.

    Args:
        module: takes (B, 3, H, W) float32, gives a dict of (B, D) vectors and (B, T, D) tokens: its own features, and
            for each block asked for the same ones named `layerN.`.
        scale: what a batch of `prepare`'s pictures goes through first.
        input_size: (3, H, W).
        asked: names of features; those that can't be derived are left out.
    """

    features: dict[str, ItemShape]
    """Name -> shape of one item: the model's own in its order, then those asked for."""

    def __init__(
        self, module: torch.nn.Module, scale: torch.nn.Module, *, input_size: Sequence[int], asked: Sequence[str]
    ) -> None:
        super().__init__()
        self._module, self._scale = module.eval(), scale
        self._pools = torch.nn.ModuleDict()
        self._sources: dict[str, str] = {}
        shapes = _try_out(module, input_size)
        self.features = {name: shapes[name] for name in native_features(shapes)}
        for text in asked:
            self._add(text, shapes, input_size)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self._module(self._scale(images))
        for text, source in self._sources.items():
            outputs[text] = self._pools[_key(text)](outputs[source])
        return {text: outputs[text] for text in self.features}

    def _add(self, text: str, shapes: Mapping[str, ItemShape], input_size: Sequence[int]) -> None:
        name = FeatureName.parse(text)
        if name is None or name.source not in shapes:
            return
        if name.side is None and name.clusters is None:
            self.features[text] = shapes[name.source]
        elif (pool := patch_pool(name, shapes[name.source], input_size)) is not None:
            self._pools[_key(text)] = pool
            self._sources[text] = name.source
            self.features[text] = (pool.num_tokens, shapes[name.source][1])


def plain_json(published: Mapping[str, Any]) -> dict[str, Any]:
    """Give a library's settings as they read back from JSON: tuples as lists, enumerations as their values."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(published), default=str))
    return plain


def check_names(names: Sequence[str], features: Mapping[str, ItemShape]) -> None:
    """Refuse a feature that an encoder does not have.

    Raises:
        UnknownNameError: lists those it has.
    """
    for name in names:
        if name not in features:
            raise unknown_name("feature", name, features)


def _try_out(module: torch.nn.Module, input_size: Sequence[int]) -> dict[str, ItemShape]:
    """Show a model two pictures of noise, twice.

    Left out are a `pooled` that only repeats another feature, and patches that lie in no grid, as where some token
    that is none stands among them.

    Raises:
        SettingError: the second answer is another than the first.
    """
    noise = torch.rand((2, *input_size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs: dict[str, torch.Tensor] = module(noise)
        again: dict[str, torch.Tensor] = module(noise)
    for name in [name for name in outputs if name.endswith("patches")]:
        if patch_grid(outputs[name].shape[1], *input_size[-2:]) is None:
            del outputs[name]
            outputs.pop(name.replace("patches", "patch_mean"), None)
    if not all(_is_same(output, again[name]) for name, output in outputs.items()):
        raise SettingError(
            "this model gives another answer each time it sees the same picture, as one does that masks patches at "
            "random; take the encoder of another architecture"
        )
    pooled = outputs.get("pooled")
    others = [outputs[name] for name in native_features(outputs) if name != "pooled"]
    if pooled is not None and any(_is_same(pooled, other) for other in others):
        del outputs["pooled"]
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _key(text: str) -> str:
    """Name a submodule: torch allows no dot in it."""
    return text.replace(".", "_")
