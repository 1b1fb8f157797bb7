"""The states after some of the blocks of a transformers model."""

from collections.abc import Sequence
from typing import Any

import torch


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
