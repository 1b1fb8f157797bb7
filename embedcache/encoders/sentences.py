"""What is taken from the modules of a sentence-transformers model."""

from collections.abc import Sequence

import torch

from embedcache.encoders.derived import at_layer
from embedcache.encoders.hidden_states import hidden_states, hidden_states_option
from embedcache.encoders.pooling import POOLS


class Sentences(torch.nn.Module):
    """A transformer with its poolings and dense layers behind it: ids and mask, (B, T) -> a dict of features by name.

    Args:
        transformer: the model.
        pools: names of poolings; several are joined.
        heads: the dense layers, in order.
        layers: blocks, counted from 1; those beyond its depth are left out.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        pools: Sequence[str],
        heads: Sequence[torch.nn.Module],
        layers: Sequence[int],
    ) -> None:
        super().__init__()
        self._transformer = transformer
        self._pools = pools
        self._heads = torch.nn.ModuleList(heads)
        self._layers = layers

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self._transformer(
            input_ids=input_ids, attention_mask=attention_mask, **hidden_states_option(self._layers)
        )
        outputs = self._pool(states.last_hidden_state, attention_mask)
        if len(self._heads):
            dense = outputs["_".join(self._pools)]
            for head in self._heads:
                dense = head(dense)
            outputs = {"dense": dense, **outputs}
        for layer, state in hidden_states(states, self._layers):
            outputs |= at_layer(layer, self._pool(state, attention_mask))
        return outputs

    def _pool(self, state: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden_BTD = state.float()
        pooled = torch.cat([POOLS[name](hidden_BTD, attention_mask) for name in self._pools], dim=-1)
        return {"_".join(self._pools): pooled, "tokens": hidden_BTD}


class Dense(torch.nn.Module):
    """A linear layer and what follows it: (B, D) -> (B, E).

    Args:
        num_in: D.
        num_out: E.
        has_bias: whether something is added.
        activation: what follows.
    """

    def __init__(self, num_in: int, num_out: int, *, has_bias: bool, activation: torch.nn.Module) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(num_in, num_out, bias=has_bias)
        self.activation = activation

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(vectors_BD))
        return out
