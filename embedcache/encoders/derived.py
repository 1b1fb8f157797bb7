"""Features made from a model's own ones, by name: `[layerN.]NAME`.

`layerN.` is the state after block N, counted from 1, without the model's final norm; for a network of stages, after
its N-th level. NAME is one of the model's own features, such as `cls` or `tokens`, or made from its patch tokens:

- `grid:K`: averages over K × K cells of the picture, row by row;
- `kmeans:K`: averages over K clusters of tokens that are alike, wherever they lie.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from embedcache.encoders.shapes import ItemShape

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
    """Move each centre to the mean of the tokens nearest to it; of centres equally near, the first gets the token.

    Equal are those that only rounding tells apart. Plain areas give many equal patches, and so equal centres; the
    order of sums, another for each size of a batch, would share the tokens out between them.
    """
    # |t - c|² less |t|², which is the same for all centres.
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
