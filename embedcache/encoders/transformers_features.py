"""What is taken from a model of transformers."""

from collections.abc import Sequence
from typing import Any

import torch

from embedcache.encoders.derived import at_layer
from embedcache.encoders.hidden_states import hidden_states, hidden_states_option
from embedcache.encoders.pooling import cls, mean


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
            outputs |= at_layer(layer, self._from_state(state))
        return outputs

    def _from_state(self, state: torch.Tensor) -> dict[str, torch.Tensor]:
        if state.ndim == 4:
            outputs, patches_BTD = {}, state.flatten(2).transpose(1, 2)
        else:
            outputs, patches_BTD = {"cls": state[:, 0]} if self._has_cls else {}, state[:, self._num_prefix :]
        return {**outputs, "patch_mean": patches_BTD.float().mean(dim=1), "patches": patches_BTD}


class TextFeatures(torch.nn.Module):
    """A model's features of texts, and the same after some of its blocks: ids and mask, (B, T) -> a dict by name.

    Args:
        model: a text tower.
        layers: blocks, counted from 1; those beyond its depth are left out.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = model
        self._layers = layers

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self._model(input_ids=input_ids, attention_mask=attention_mask, **hidden_states_option(self._layers))
        outputs = self._from_state(states.last_hidden_state, attention_mask)
        for layer, state in hidden_states(states, self._layers):
            outputs |= at_layer(layer, self._from_state(state, attention_mask))
        return outputs

    def _from_state(self, state: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden_BTD = state.float()
        return {
            "mean": mean(hidden_BTD, attention_mask),
            "cls": cls(hidden_BTD, attention_mask),
            "tokens": hidden_BTD,
        }


def _num_prefix(config: Any, names: set[str], *, has_cls: bool) -> int:
    num_registers = int(getattr(config, "num_register_tokens", 0) or 0)
    return int(has_cls) + num_registers + int("distillation_token" in names)
