"""An image encoder: a transform for one picture and a graph for a batch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from embedcache.arrays import Array
from embedcache.encoders.contract import EncoderSettings, Fingerprint, Modality
from embedcache.encoders.derived import FeatureName, own_features, patch_grid, patch_pool
from embedcache.encoders.graph import Graph, batch_size
from embedcache.encoders.pixels import Transform
from embedcache.encoders.shapes import ItemShape
from embedcache.errors import SettingError
from embedcache.registry import unknown_name

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

    def prepare(self, items: Sequence[Image]) -> list[Array]:
        """Turn RGB pictures of any size into (3, H, W) arrays, uint8 or float32."""
        return [self._transform(image) for image in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Give the named features of each picture, float32, not normalised."""
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
        self.features = {name: shapes[name] for name in own_features(shapes)}
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
    others = [outputs[name] for name in own_features(outputs) if name != "pooled"]
    if pooled is not None and any(_is_same(pooled, other) for other in others):
        del outputs["pooled"]
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _key(text: str) -> str:
    """Name a submodule: torch allows no dot in it."""
    return text.replace(".", "_")
