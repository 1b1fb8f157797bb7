"""Features made from a model's own ones, by name: `[layerN.]NAME`.

`layerN.` is the state after block N, counted from 1, without the model's final norm; for a network of stages, after
its N-th level. NAME is one of the model's own features, such as `cls` or `tokens`, or made from its patch tokens:

- `grid:K`: averages over K × K cells of the picture, row by row;
- `kmeans:K`: averages over K clusters of tokens that are alike, wherever they lie.

What is taken from a timm model.

The square that EfficientNet-Lite sees of a picture.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image, Resampling

from embedcache.encoders.base import ItemShape
from embedcache.errors import SettingError

_NAME = re.compile(
    r"(?:layer(?P<layer>[1-9]\d*)\.)?(?:grid:(?P<side>[1-9]\d*)|kmeans:(?P<clusters>[1-9]\d*)|(?P<own>[a-z_]+))"
)
_NUM_ROUNDS = 10  # of Lloyd's algorithm; more change little on a hundred patches, or on a thousand
_ROUNDING = 1e-4  # of the tokens' mean square distance from their middle


@dataclass(frozen=True)
class FeatureName:
    """A feature's name, read.

    Args:
        own: the model's own feature it is made from.
        layer: after which block; None: at the end.
        side: cells along one side of the grid; None: no grid.
        clusters: how many clusters; None: none are made.
    """

    own: str
    layer: int | None = None
    side: int | None = None
    clusters: int | None = None

    @classmethod
    def parse(cls, text: str) -> "FeatureName | None":
        """Read a name; None where it follows no such grammar."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        numbers = {part: int(match[part]) for part in ("layer", "side", "clusters") if match[part] is not None}
        return cls(match["own"] or "patches", **numbers)

    @property
    def source(self) -> str:
        """The name of the output that it is made from: itself, or the patches of its layer."""
        return self.own if self.layer is None else f"layer{self.layer}.{self.own}"


def native_features(names: Iterable[str]) -> list[str]:
    """Keep the names of features that are a model's own."""
    return [name for name in names if FeatureName.parse(name) == FeatureName(name)]


def requested_layers(asked: Sequence[str]) -> list[int]:
    """Get the blocks that names ask for, in order."""
    names = [FeatureName.parse(text) for text in asked]
    return sorted({name.layer for name in names if name is not None and name.layer is not None})


def prefix_layer(layer: int, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name what was made from the state after a block."""
    return {FeatureName(name, layer).source: output for name, output in outputs.items()}


def patch_grid(num_patches: int, height_px: int, width_px: int) -> tuple[int, int] | None:
    """Find how many patches lie below and beside each other, where patches are square and cover the picture.

    Returns:
        (H, W) with H * W = num_patches, or None where there is none.
    """
    if not num_patches:
        return None
    # The shorter side is off by less than half a patch, even where the picture is no multiple of the patch.
    ratio = min(height_px, width_px) / max(height_px, width_px)
    shorter = max(1, round(sqrt(num_patches * ratio)))
    longer, rest = divmod(num_patches, shorter)
    if rest:
        return None
    return (shorter, longer) if height_px <= width_px else (longer, shorter)


class GridPool(torch.nn.Module):
    """Average patch tokens over the cells of a grid, as adaptive average pooling does: cells may overlap by a patch.

    Args:
        grid: (H, W), patches below and beside each other.
        side: K, cells along each side.
    """

    weights_KT: torch.Tensor

    def __init__(self, grid: tuple[int, int], side: int) -> None:
        super().__init__()
        self.num_tokens = side**2
        rows_KH, columns_KW = (_cells(size, side) for size in grid)
        self.register_buffer("weights_KT", torch.kron(rows_KH, columns_KW), persistent=False)

    def forward(self, patches_BTD: torch.Tensor) -> torch.Tensor:
        """Give (B, K * K, D) float32."""
        # A product, as ONNX has no such pooling; in float32, as averages are taken in it everywhere.
        with torch.autocast(patches_BTD.device.type, enabled=False):
            return self.weights_KT @ patches_BTD.float()


class KMeansPool(torch.nn.Module):
    """Average patch tokens over K clusters of each picture's own, found in ten rounds of Lloyd's algorithm.

    Nothing is drawn: the clusters start from K patches at even steps, and stand in the order of these, row by row. A
    cluster that loses its last patch stays where it was. Each token is a plain mean of few patches or of many, so the
    mean over the K tokens is not the mean over the patches.

    Args:
        num_patches: T.
        num_clusters: K, at most T.
    """

    starts_K: torch.Tensor

    def __init__(self, num_patches: int, num_clusters: int) -> None:
        super().__init__()
        self.num_tokens = num_clusters
        starts = [(2 * cluster + 1) * num_patches // (2 * num_clusters) for cluster in range(num_clusters)]
        self.register_buffer("starts_K", torch.tensor(starts), persistent=False)

    def forward(self, patches_BTD: torch.Tensor) -> torch.Tensor:
        """Give (B, K, D) float32."""
        with torch.autocast(patches_BTD.device.type, enabled=False):
            tokens_BTD = patches_BTD.float()
            middle_B1D = tokens_BTD.mean(dim=1, keepdim=True)
            tokens_BTD = tokens_BTD - middle_B1D  # what all have in common would cost digits of the distances
            centres_BKD = tokens_BTD[:, self.starts_K]
            for _ in range(_NUM_ROUNDS):  # as many for every picture: an exported graph has no loop that ends early
                centres_BKD = _lloyd_round(tokens_BTD, centres_BKD)
            return centres_BKD + middle_B1D


def patch_pool(name: FeatureName, patches: ItemShape, input_size: Sequence[int]) -> GridPool | KMeansPool | None:
    """Make what a name derives from patches; None where they are fewer than it asks for, or lie in no grid.

    Args:
        name: of a grid or of clusters.
        patches: (T, D).
        input_size: (3, H, W) of the picture.
    """
    if name.clusters is not None:
        return None if name.clusters > patches[0] else KMeansPool(patches[0], name.clusters)
    grid = patch_grid(patches[0], *input_size[-2:])
    return None if grid is None or name.side is None or name.side > min(grid) else GridPool(grid, name.side)


def _cells(size: int, side: int) -> torch.Tensor:
    """Give (K, size): in each row the weights of one cell, from floor(i size / K) to ceil((i + 1) size / K)."""
    weights = torch.zeros(side, size)
    for cell in range(side):
        start, stop = cell * size // side, -(-(cell + 1) * size // side)
        weights[cell, start:stop] = 1 / (stop - start)
    return weights


def _lloyd_round(tokens_BTD: torch.Tensor, centres_BKD: torch.Tensor) -> torch.Tensor:
    """Move each center to the mean of the tokens nearest to it; of centers equally near, the first gets the token.

    Equal are those that only rounding tells apart. Plain areas give many equal patches, and so equal centers; the
    order of sums, another for each size of a batch, would share the tokens out between them.
    """
    # |t - c|² less |t|², which is the same for all centers.
    distances_BKT = (centres_BKD**2).sum(dim=2, keepdim=True) - 2 * centres_BKD @ tokens_BTD.transpose(1, 2)
    rounding_B11 = _ROUNDING * (tokens_BTD**2).sum(dim=2, keepdim=True).mean(dim=1, keepdim=True)
    is_near_BKT = distances_BKT <= distances_BKT.amin(dim=1, keepdim=True) + rounding_B11
    # No argmax of it: onnxruntime's gives any of those that are equal.
    num_clusters = centres_BKD.shape[1]
    numbers_K1 = torch.arange(num_clusters, device=centres_BKD.device)[:, None]
    first_B1T = torch.where(is_near_BKT, numbers_K1, num_clusters).amin(dim=1, keepdim=True)
    is_member_BKT = (first_B1T == numbers_K1).float()
    sizes_BK1 = is_member_BKT.sum(dim=2, keepdim=True)
    means_BKD = is_member_BKT @ tokens_BTD / sizes_BK1.clamp(min=1)
    return torch.where(sizes_BK1 > 0, means_BKD, centres_BKD)


class TimmFeatures(torch.nn.Module):
    """A timm model's own features, and the same after some of its blocks: (B, 3, H, W) float32 -> a dict by name.

    Args:
        model: the model, without its classifier.
        layers: blocks, or levels, counted from 1; those beyond its depth are left out.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        has_class_token = getattr(model, "cls_token", None) is not None
        self._has_cls = bool(getattr(model, "has_class_token", has_class_token))
        self._num_prefix = int(getattr(model, "num_prefix_tokens", has_class_token))
        self._is_nhwc = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        num_levels = len(model.feature_info) if hasattr(model, "forward_intermediates") else 0
        self._layers = [layer for layer in layers if layer <= num_levels]
        # Some models stop after the last level named, so the last one always is.
        self._levels = sorted({*self._layers, num_levels}) if self._layers else []
        self._options = _prefix_option(model) if self._layers and self._num_prefix else {}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self._layers:
            return self._own(self._model.forward_features(images))
        indices = [level - 1 for level in self._levels]
        states, found = self._model.forward_intermediates(images, indices=indices, norm=False, **self._options)
        levels = dict(zip(self._levels, found, strict=True))
        outputs = self._own(states)
        for layer in self._layers:
            outputs |= prefix_layer(layer, self._from_level(levels[layer]))
        return outputs

    def _from_level(self, level: Any) -> dict[str, torch.Tensor]:
        maps_BDHW, prefix_BTD = level if isinstance(level, tuple) else (level, None)
        outputs = {"cls": prefix_BTD[:, 0]} if self._has_cls and prefix_BTD is not None else {}
        return {**outputs, **_with_mean(maps_BDHW.flatten(2).transpose(1, 2))}

    def _own(self, states: Any) -> dict[str, torch.Tensor]:
        if not isinstance(states, torch.Tensor):
            raise SettingError(
                f"{type(self._model).__name__} gives several maps of tokens; take an encoder of another architecture"
            )
        outputs = {"pooled": self._model.forward_head(states, pre_logits=True)}
        if states.ndim == 3 and self._has_cls:
            outputs["cls"] = states[:, 0]
        return {**outputs, **_with_mean(self._patches(states))}

    def _patches(self, states: torch.Tensor) -> torch.Tensor:
        if states.ndim == 3:
            return states[:, self._num_prefix :]
        return states.flatten(1, 2) if self._is_nhwc else states.flatten(2).transpose(1, 2)


def _prefix_option(model: Any) -> dict[str, bool]:
    takes_it = "return_prefix_tokens" in signature(model.forward_intermediates).parameters
    return {"return_prefix_tokens": True} if takes_it else {}


def _with_mean(patches_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"patch_mean": patches_BTD.float().mean(dim=1), "patches": patches_BTD}


CROP_PADDING_PX = 32


def crop(image: Image, size_px: int) -> npt.NDArray[np.uint8]:
    """Turn an RGB picture into (3, size_px, size_px) uint8."""
    width, height = image.size
    side = max(1, int(min(width, height) * size_px / (size_px + CROP_PADDING_PX)))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    box = (left, top, left + side, top + side)
    square = image.resize((size_px, size_px), Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


class ImageFeatures(torch.nn.Module):
    """A model's features of pictures, and the same after some of its blocks: (B, 3, H, W) float32 -> a dict by name.

    Args:
        model: a vision tower.
        layers: blocks, counted from 1; those beyond its depth are left out.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        self._layers = layers
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        # CLIP calls its class token class_embedding; the others of the library cls_token.
        self._has_cls = bool(names & {"cls_token", "class_embedding"})
        self._num_prefix = _num_prefix(model.config, names, has_cls=self._has_cls)
        # A pooler with weights is often missing from checkpoints, or made for another task.
        self._has_pool = not any(name.startswith("pooler.") for name, _ in model.named_parameters())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self._model(pixel_values=images, **hidden_states_option(self._layers))
        pooled = getattr(states, "pooler_output", None) if self._has_pool else None
        outputs = {} if pooled is None else {"pooled": pooled.flatten(1)}
        outputs |= self._from_state(states.last_hidden_state)
        for layer, state in hidden_states(states, self._layers):
            outputs |= prefix_layer(layer, self._from_state(state))
        return outputs

    def _from_state(self, state: torch.Tensor) -> dict[str, torch.Tensor]:
        if state.ndim == 4:
            outputs, patches_BTD = {}, state.flatten(2).transpose(1, 2)
        else:
            outputs, patches_BTD = {"cls": state[:, 0]} if self._has_cls else {}, state[:, self._num_prefix :]
        return {**outputs, "patch_mean": patches_BTD.float().mean(dim=1), "patches": patches_BTD}


def _num_prefix(config: Any, names: set[str], *, has_cls: bool) -> int:
    num_registers = int(getattr(config, "num_register_tokens", 0) or 0)
    return int(has_cls) + num_registers + int("distillation_token" in names)


def untie(model: torch.nn.Module, layers: Sequence[int]) -> None:
    """Where blocks are asked for, let the last hidden state be the last block's, not the one after the final norm."""
    if layers:
        config: Any = model.config
        config.tie_last_hidden_states = False


def hidden_states_option(layers: Sequence[int]) -> dict[str, bool]:
    """What to call a model with so that `hidden_states` finds these blocks; nothing where there are none."""
    return {"output_hidden_states": True} if layers else {}


def hidden_states(states: Any, layers: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    """Get the states after blocks, counted from 1, from a model's output; those beyond its depth are left out."""
    found: Sequence[torch.Tensor] = (states.hidden_states if layers else None) or ()
    return [(layer, found[layer]) for layer in layers if layer < len(found)]
