"""Features computed from the states of a model, and the grammar of derived features: `[layerN.]NAME`.

`layerN.` selects the state after block N, counted from 1, before the model's final norm; for a network of stages, after
its N-th level. NAME is one of the model's native features, such as `cls` or `patches`, or is derived from its patches:

- `grid:K`: means over K × K cells of the image, row by row;
- `kmeans:K`: means over K clusters of similar patches, wherever they lie.

`layers` are blocks, or levels, counted from 1; those beyond a model's depth are ignored. Masks of texts are (B, T) with
1 on tokens and 0 on padding, which is on the right.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from math import sqrt
from typing import Any, TypeAlias

import torch

Pool: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""States and mask of texts, (B, T, D) and (B, T) -> vectors, (B, D)."""

_NAME = re.compile(
    r"(?:layer(?P<layer>[1-9]\d*)\.)?(?:grid:(?P<grid>[1-9]\d*)|kmeans:(?P<clusters>[1-9]\d*)|(?P<native>[a-z_]+))"
)
_NUM_ROUNDS = 10  # of Lloyd's algorithm; more rounds change little for a hundred patches or for a thousand
_ROUNDING = 1e-4  # as a fraction of the patches' mean squared distance from their mean


@dataclass(frozen=True)
class FeatureName:
    """A parsed feature name.

    Args:
        native: the native feature that it is computed from.
        layer: block whose output is used; None: the model's last states.
        grid: cells along each side of the grid; None: no grid.
        clusters: number of clusters; None: no clustering.
    """

    native: str
    layer: int | None = None
    grid: int | None = None
    clusters: int | None = None

    @classmethod
    def parse(cls, text: str) -> "FeatureName | None":
        """Parse a name; return None if it does not follow the grammar."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        numbers = {part: int(match[part]) for part in ("layer", "grid", "clusters") if match[part] is not None}
        return cls(match["native"] or "patches", **numbers)

    @property
    def source(self) -> str:
        """Name of the model output that it is computed from: its own, or the patches of its layer."""
        return self.native if self.layer is None else f"layer{self.layer}.{self.native}"


def native_features(names: Iterable[str]) -> list[str]:
    """Return the names that are native features of a model, not derived ones."""
    return [name for name in names if FeatureName.parse(name) == FeatureName(name)]


def requested_layers(names: Sequence[str]) -> list[int]:
    """Return the numbers of the blocks that feature names refer to, sorted."""
    parsed = [FeatureName.parse(text) for text in names]
    return sorted({name.layer for name in parsed if name is not None and name.layer is not None})


def prefix_layer(layer: int, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return outputs computed from the state after a block under their feature names, such as `layer3.cls`."""
    return {FeatureName(name, layer).source: output for name, output in outputs.items()}


def patch_grid(num_patches: int, height_px: int, width_px: int) -> tuple[int, int] | None:
    """Return the rows and columns of square patches that cover an image; None if the patches do not form a grid."""
    if not num_patches:
        return None
    # Rounding the shorter side is off by less than half a patch even if the image is not a multiple of the patch.
    ratio = min(height_px, width_px) / max(height_px, width_px)
    shorter = max(1, round(sqrt(num_patches * ratio)))
    longer, rest = divmod(num_patches, shorter)
    if rest:
        return None
    return (shorter, longer) if height_px <= width_px else (longer, shorter)


def patch_pools(
    names: Iterable[str], shapes: Mapping[str, Sequence[int]], input_size: Sequence[int]
) -> torch.nn.ModuleDict:
    """Create the modules that derive features such as `grid:4` from the patches of (3, H, W) images.

    Args:
        names: names of features; those that are not derived, or need more patches than there are, are left out.
        shapes: (T, D) of the features of the model.
    """
    pools = torch.nn.ModuleDict()
    for text in names:
        name = FeatureName.parse(text)
        if name is None or name.source not in shapes:
            continue
        num_patches = shapes[name.source][0]
        grid = patch_grid(num_patches, *input_size[-2:])
        if name.clusters is not None and name.clusters <= num_patches:
            pools[_pool_key(text)] = KMeansPool(num_patches, name.clusters)
        elif name.grid is not None and grid is not None and name.grid <= min(grid):
            pools[_pool_key(text)] = GridPool(grid, name.grid)
    return pools


def derive_features(
    names: Iterable[str], outputs: Mapping[str, torch.Tensor], pools: torch.nn.ModuleDict
) -> dict[str, torch.Tensor]:
    """Return the named features that a model outputs, or that `pools` derive from its outputs; others are left out."""
    features: dict[str, torch.Tensor] = {}
    for text in names:
        name = FeatureName.parse(text)
        if text in outputs:
            features[text] = outputs[text]
        elif name is not None and _pool_key(text) in pools:
            features[text] = pools[_pool_key(text)](outputs[name.source])
    return features


def _pool_key(text: str) -> str:
    return text.replace(".", "_")  # torch allows no dot in a submodule's name


class GridPool(torch.nn.Module):
    """Average patches in a grid of (H, W) over K × K cells, as adaptive average pooling does: cells may overlap."""

    weights_KT: torch.Tensor

    def __init__(self, grid: tuple[int, int], num_cells: int) -> None:
        super().__init__()
        self.num_tokens = num_cells**2
        rows_KH, columns_KW = (_cell_weights(size, num_cells) for size in grid)
        self.register_buffer("weights_KT", torch.kron(rows_KH, columns_KW), persistent=False)

    def forward(self, patches_BTD: torch.Tensor) -> torch.Tensor:
        """Return (B, K * K, D) float32."""
        # ONNX has no adaptive pooling, so it is a matrix product; in float32, like all means of this package.
        with torch.autocast(patches_BTD.device.type, enabled=False):
            return self.weights_KT @ _to_float32(patches_BTD)


def _cell_weights(size: int, num_cells: int) -> torch.Tensor:
    """Return (K, size): row i averages the positions from floor(i size / K) to ceil((i + 1) size / K)."""
    weights = torch.zeros(num_cells, size)
    for cell in range(num_cells):
        start = cell * size // num_cells
        stop = -(-(cell + 1) * size // num_cells)
        weights[cell, start:stop] = 1 / (stop - start)
    return weights


class KMeansPool(torch.nn.Module):
    """Average patches over K clusters, found per image by ten rounds of Lloyd's algorithm.

    Deterministic: the centers start at K patches at equal steps and keep their order, row by row. A cluster that loses
    its last patch keeps its center. Clusters differ in size: the mean of the K tokens is not that of the patches.
    """

    starts_K: torch.Tensor

    def __init__(self, num_patches: int, num_clusters: int) -> None:
        super().__init__()
        self.num_tokens = num_clusters
        starts = [(2 * cluster + 1) * num_patches // (2 * num_clusters) for cluster in range(num_clusters)]
        self.register_buffer("starts_K", torch.tensor(starts), persistent=False)

    def forward(self, patches_BTD: torch.Tensor) -> torch.Tensor:
        """Return (B, K, D) float32."""
        with torch.autocast(patches_BTD.device.type, enabled=False):
            tokens_BTD = _to_float32(patches_BTD)
            mean_B1D = tokens_BTD.mean(dim=1, keepdim=True)
            tokens_BTD = tokens_BTD - mean_B1D  # a common offset would cost digits of the distances
            centers_BKD = tokens_BTD[:, self.starts_K]
            for _ in range(_NUM_ROUNDS):  # the same number for every image: an exported graph cannot stop early
                centers_BKD = _lloyd_round(tokens_BTD, centers_BKD)
            return centers_BKD + mean_B1D


def _lloyd_round(tokens_BTD: torch.Tensor, centers_BKD: torch.Tensor) -> torch.Tensor:
    """Move each center to the mean of the tokens nearest to it; the first of equally near centers gets the token.

    Distances that differ by rounding only count as equal: uniform areas have many equal patches, hence equal centers,
    and the order of the sums, which changes with the batch size, would distribute the tokens at random.
    """
    # |t - c|² minus |t|², which is the same for all centers.
    distances_BKT = (centers_BKD**2).sum(dim=2, keepdim=True) - 2 * centers_BKD @ tokens_BTD.transpose(1, 2)
    rounding_B11 = _ROUNDING * (tokens_BTD**2).sum(dim=2, keepdim=True).mean(dim=1, keepdim=True)
    is_near_BKT = distances_BKT <= distances_BKT.amin(dim=1, keepdim=True) + rounding_B11
    # Not argmax: onnxruntime returns any of several equal maxima.
    num_clusters = centers_BKD.shape[1]
    numbers_K1 = torch.arange(num_clusters, device=centers_BKD.device)[:, None]
    first_B1T = torch.where(is_near_BKT, numbers_K1, num_clusters).amin(dim=1, keepdim=True)
    is_member_BKT = (first_B1T == numbers_K1).float()
    sizes_BK1 = is_member_BKT.sum(dim=2, keepdim=True)
    means_BKD = is_member_BKT @ tokens_BTD / sizes_BK1.clamp(min=1)
    return torch.where(sizes_BK1 > 0, means_BKD, centers_BKD)


def _to_float32(values: torch.Tensor) -> torch.Tensor:
    """Convert values of other types: before 1.31, onnxruntime removes an output that a graph casts to its own type."""
    return values if values.dtype == torch.float32 else values.float()


def with_patch_mean(patches_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the features `patches` and `patch_mean`, their mean in float32."""
    return {"patch_mean": _to_float32(patches_BTD).mean(dim=1), "patches": patches_BTD}


class TimmFeatures(torch.nn.Module):
    """Native features of a timm model without its classifier, and the same after some of its blocks, by name."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        has_class_token = getattr(model, "cls_token", None) is not None
        self._has_cls = bool(getattr(model, "has_class_token", has_class_token))
        self._num_prefix = int(getattr(model, "num_prefix_tokens", has_class_token))
        self._is_nhwc = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        num_levels = len(model.feature_info) if hasattr(model, "forward_intermediates") else 0
        self._layers = [layer for layer in layers if layer <= num_levels]
        # Some models stop after the last requested level, so the last one is always requested.
        self._levels = sorted({*self._layers, num_levels}) if self._layers else []
        uses_prefix = self._layers and self._num_prefix
        has_option = uses_prefix and "return_prefix_tokens" in signature(model.forward_intermediates).parameters
        self._options = {"return_prefix_tokens": True} if has_option else {}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, C, H, W) images by name: (B, D), or (B, T, D) for tokens."""
        if not self._layers:
            return self._native(self._model.forward_features(images))
        indices = [level - 1 for level in self._levels]
        states, intermediates = self._model.forward_intermediates(images, indices=indices, norm=False, **self._options)
        levels = dict(zip(self._levels, intermediates, strict=True))
        outputs = self._native(states)
        for layer in self._layers:
            outputs |= prefix_layer(layer, self._from_level(levels[layer]))
        return outputs

    def _from_level(self, level: Any) -> dict[str, torch.Tensor]:
        maps_BDHW, prefix_BTD = level if isinstance(level, tuple) else (level, None)
        outputs = {"cls": prefix_BTD[:, 0]} if self._has_cls and prefix_BTD is not None else {}
        return {**outputs, **with_patch_mean(maps_BDHW.flatten(2).transpose(1, 2))}

    def _native(self, states: Any) -> dict[str, torch.Tensor]:
        if not isinstance(states, torch.Tensor):
            raise TypeError(f"expected a model with one map of tokens, got several from {type(self._model).__name__}")
        outputs = {"pooled": self._model.forward_head(states, pre_logits=True)}
        if states.ndim == 3 and self._has_cls:
            outputs["cls"] = states[:, 0]
        return {**outputs, **with_patch_mean(self._patches(states))}

    def _patches(self, states: torch.Tensor) -> torch.Tensor:
        if states.ndim == 3:
            return states[:, self._num_prefix :]
        return states.flatten(1, 2) if self._is_nhwc else states.flatten(2).transpose(1, 2)


class ImageFeatures(torch.nn.Module):
    """Native features of a transformers vision model, and the same after some of its blocks, by name."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        super().__init__()
        untie_last_state(model, layers)
        self._model = model
        self._layers = layers
        names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
        # CLIP's class token is called class_embedding, all others of the library cls_token.
        self._has_cls = bool(names & {"cls_token", "class_embedding"})
        num_registers = int(getattr(model.config, "num_register_tokens", 0) or 0)
        self._num_prefix = int(self._has_cls) + num_registers + int("distillation_token" in names)
        # A pooler with weights is often missing from checkpoints, or was trained for another task.
        self._has_pool = not any(name.startswith("pooler.") for name, _ in model.named_parameters())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, C, H, W) images by name: (B, D), or (B, T, D) for tokens."""
        states, outputs = state_features(self._model, {"pixel_values": images}, self._layers, self._from_state)
        pooled = getattr(states, "pooler_output", None) if self._has_pool else None
        return outputs if pooled is None else {"pooled": pooled.flatten(1), **outputs}

    def _from_state(self, state: torch.Tensor) -> dict[str, torch.Tensor]:
        if state.ndim == 4:
            return with_patch_mean(state.flatten(2).transpose(1, 2))
        outputs = {"cls": state[:, 0]} if self._has_cls else {}
        return {**outputs, **with_patch_mean(state[:, self._num_prefix :])}


class TextFeatures(torch.nn.Module):
    """Native features of a text model: its tokens, and vectors pooled from them; tokens and vectors of its blocks.

    Args:
        model: a transformers model; (B, T) token ids and mask -> states.
        layers: blocks whose states are pooled too.
        pools: feature -> the names in `POOLS` whose vectors it concatenates.
        heads: layers on the first of these features, which give the feature `dense`.
        width: vectors are truncated to their first dimensions, for models trained so that these are vectors of their
            own. If None, they are whole.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Sequence[int],
        pools: Mapping[str, Sequence[str]],
        heads: Sequence[torch.nn.Module] = (),
        width: int | None = None,
    ) -> None:
        super().__init__()
        untie_last_state(model, layers)
        self._model = model
        self._layers = layers
        self._pools = pools
        self._heads = torch.nn.ModuleList(heads)
        self._width = width

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, T) token ids by name: (B, D), or (B, T, D) for tokens."""

        def from_state(state: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden_BTD = state.float()
            features = {}
            for name, pools in self._pools.items():
                vectors = [POOLS[pool](hidden_BTD, attention_mask) for pool in pools]
                features[name] = torch.cat(vectors, dim=-1)
            return {**features, "tokens": hidden_BTD}

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        _, outputs = state_features(self._model, inputs, self._layers, from_state)
        if len(self._heads):
            dense = outputs[next(iter(self._pools))]
            for head in self._heads:
                dense = head(dense)
            outputs = {"dense": dense, **outputs}
        return {name: output[:, : self._width] if output.ndim == 2 else output for name, output in outputs.items()}


class Dense(torch.nn.Module):
    """A linear layer with an activation: (B, D) -> (B, P)."""

    def __init__(self, input_width: int, output_width: int, *, has_bias: bool, activation: torch.nn.Module) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_width, output_width, bias=has_bias)
        self.activation = activation

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        """Compute the outputs of the layer: (B, D) -> (B, P)."""
        out_BP: torch.Tensor = self.activation(self.linear(vectors_BD))
        return out_BP


def untie_last_state(model: Any, layers: Sequence[int]) -> None:
    """Configure a transformers model so that its last hidden state precedes the final norm, if blocks are requested.

    Raises:
        RuntimeError: the installed transformers may return the state after the final norm all the same.
    """
    if not layers:
        return
    installed = version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < (5, 18):
        raise RuntimeError(
            f"features of single blocks need transformers 5.18 or later, got {installed}; upgrade with: pip install "
            "'transformers>=5.18'"
        )
    model.config.tie_last_hidden_states = False


def state_features(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    layers: Sequence[int],
    from_state: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Run a transformers model.

    Returns:
        What the model returns, and the features of its last state and of the states after blocks, by name.
    """
    states = model(**inputs, output_hidden_states=True) if layers else model(**inputs)
    outputs = from_state(states.last_hidden_state)
    for layer in layers:
        if layer < len(states.hidden_states):
            outputs |= prefix_layer(layer, from_state(states.hidden_states[layer]))
    return states, outputs


def _mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the mean over tokens."""
    return _sum(hidden_BTD, mask_BT) / _count(mask_BT)


def _cls(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the first token."""
    del mask_BT
    return hidden_BTD[:, 0]


def _last(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the last token that is not padding."""
    index_B11 = (mask_BT.sum(dim=1) - 1)[:, None, None].expand(-1, 1, hidden_BTD.shape[2])
    return hidden_BTD.gather(1, index_B11).squeeze(1)


def _largest(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the maximum over tokens in each dimension."""
    return hidden_BTD.masked_fill(mask_BT[:, :, None] == 0, float("-inf")).amax(dim=1)


def _mean_sqrt_len(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the sum over tokens divided by the square root of their number."""
    return _sum(hidden_BTD, mask_BT) / _count(mask_BT).sqrt()


def _weighted_mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the mean over tokens, weighted by position from 1."""
    weights_BT = mask_BT * mask_BT.cumsum(dim=1)
    return _sum(hidden_BTD, weights_BT) / _count(weights_BT)


POOLS: Mapping[str, Pool] = {
    "mean": _mean,
    "cls": _cls,
    "last": _last,
    "max": _largest,
    "mean_sqrt_len": _mean_sqrt_len,
    "weighted_mean": _weighted_mean,
}
"""Feature name -> how it is pooled."""

TEXT_POOLING: Mapping[str, str] = {
    "mean": "mean of the last hidden states over all tokens, special ones included",
    "cls": "last hidden state of the first token",
    "last": "last hidden state of the last token",
    "max": "largest value of the last hidden states over all tokens",
    "mean_sqrt_len": "sum of the last hidden states over the square root of the number of tokens",
    "weighted_mean": "mean of the last hidden states, weighted by position from 1",
    "tokens": "last hidden states of all tokens, special ones included",
}
"""Feature name -> its description in a fingerprint."""


def _sum(hidden_BTD: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    return (hidden_BTD * weights_BT[:, :, None].to(hidden_BTD.dtype)).sum(dim=1)


def _count(weights_BT: torch.Tensor) -> torch.Tensor:
    return weights_BT.sum(dim=1, keepdim=True).to(torch.float32)
