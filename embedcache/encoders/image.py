"""An image encoder: a transform for one picture and a graph for a batch."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image

from embedcache.arrays import Array, Floats
from embedcache.encoders.contract import Fingerprint, ItemShape, Modality
from embedcache.encoders.graph import Graph
from embedcache.registry import unknown_name

Transform: TypeAlias = Callable[[Image], Floats]
"""An RGB picture of any size -> (3, H, W) float32, as the model wants it."""

INPUT = "images"
"""The name of the graph's one input, (B, 3, H, W) float32."""


class ImageEncoder:
    """A frozen model of pictures, of any family.

    Args:
        graph: gives the features, each with the batch as first axis.
        transform: called from many threads at once.
        features: name -> shape of one item, the default first.
        fingerprint: all that decides the output.
        batch_size: how many pictures one `encode` call should get.
    """

    modality: Modality = "image"

    def __init__(
        self,
        *,
        graph: Graph,
        transform: Transform,
        features: Mapping[str, ItemShape],
        fingerprint: Fingerprint,
        batch_size: int = 32,
    ) -> None:
        self.features = features
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self._graph = graph
        self._transform = transform

    def prepare(self, items: Sequence[Image]) -> list[Array]:
        """Turn RGB pictures of any size into (3, H, W) float32 arrays."""
        return [self._transform(image) for image in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Give the named features of each picture, float32, not normalised."""
        check_names(names, self.features)
        if not prepared:
            return {name: [] for name in names}
        outputs = self._graph({INPUT: np.stack(prepared)}, names)
        return {name: list(outputs[name]) for name in names}


def image_features(module: torch.nn.Module, input_size: Sequence[int]) -> dict[str, ItemShape]:
    """Find what a model gives, and in which shapes, by showing it two pictures of noise.

    Args:
        module: takes (B, 3, H, W), gives a dict of (B, D) vectors and (B, T, D) tokens.
        input_size: (3, H, W).

    Returns:
        name -> shape of one item, in the model's order, without a `pooled` that only repeats another feature.
    """
    noise = torch.rand((2, *input_size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs: dict[str, torch.Tensor] = module(noise)
    pooled = outputs.get("pooled")
    others = [output for name, output in outputs.items() if name != "pooled"]
    if pooled is not None and any(_is_same(pooled, other) for other in others):
        del outputs["pooled"]
    return {name: tuple(output.shape[1:]) for name, output in outputs.items()}


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


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
