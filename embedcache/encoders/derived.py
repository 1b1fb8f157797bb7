"""Features made from a model's own ones, by name: `[layerN.]NAME`.

`layerN.` is the state after block N, counted from 1, without the model's final norm; for a network of stages, after
its N-th level. NAME is one of the model's own features, such as `cls` or `tokens`, or `grid:K`: the patch tokens
averaged over K × K cells of the picture, row by row.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from embedcache.encoders.contract import ItemShape

_NAME = re.compile(r"(?:layer(?P<layer>[1-9]\d*)\.)?(?:grid:(?P<side>[1-9]\d*)|(?P<own>[a-z_]+))")


@dataclass(frozen=True)
class FeatureName:
    """A feature's name, read.

    Args:
        own: the model's own feature it is made from.
        layer: after which block; None: at the end.
        side: cells along one side of the grid; None: no grid.
    """

    own: str
    layer: int | None = None
    side: int | None = None

    @classmethod
    def parse(cls, text: str) -> "FeatureName | None":
        """Read a name; None where it follows no such grammar."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        layer, side = (None if match[part] is None else int(match[part]) for part in ("layer", "side"))
        return cls(match["own"] or "patches", layer, side)

    @property
    def source(self) -> str:
        """The name of the output that it is made from: itself, or the patches of its layer."""
        return self.own if self.layer is None else f"layer{self.layer}.{self.own}"


def own_features(names: Iterable[str]) -> list[str]:
    """Keep the names of features that are a model's own."""
    return [name for name in names if FeatureName.parse(name) == FeatureName(name)]


def asked_layers(asked: Sequence[str]) -> list[int]:
    """Get the blocks that names ask for, in order."""
    names = [FeatureName.parse(text) for text in asked]
    return sorted({name.layer for name in names if name is not None and name.layer is not None})


def at_layer(layer: int, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
        rows_KH, columns_KW = (_cells(size, side) for size in grid)
        self.register_buffer("weights_KT", torch.kron(rows_KH, columns_KW), persistent=False)

    def forward(self, patches_BTD: torch.Tensor) -> torch.Tensor:
        """Give (B, K * K, D) float32."""
        # A product, as ONNX has no such pooling; in float32, as averages are taken in it everywhere.
        with torch.autocast(patches_BTD.device.type, enabled=False):
            return self.weights_KT @ patches_BTD.float()


def grid_pool(side: int, patches: ItemShape, input_size: Sequence[int]) -> GridPool | None:
    """Make what averages patches of one shape; None where they are fewer than its cells, or lie in no grid.

    Args:
        side: K.
        patches: (T, D).
        input_size: (3, H, W) of the picture.
    """
    grid = patch_grid(patches[0], *input_size[-2:])
    return None if grid is None or side > min(grid) else GridPool(grid, side)


def _cells(size: int, side: int) -> torch.Tensor:
    """Give (K, size): in each row the weights of one cell, from floor(i size / K) to ceil((i + 1) size / K)."""
    weights = torch.zeros(side, size)
    for cell in range(side):
        start, stop = cell * size // side, -(-(cell + 1) * size // side)
        weights[cell, start:stop] = 1 / (stop - start)
    return weights
