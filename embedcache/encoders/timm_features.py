"""What is taken from a timm model."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from embedcache.encoders.derived import at_layer
from embedcache.errors import SettingError


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
            outputs |= at_layer(layer, self._from_level(levels[layer]))
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
