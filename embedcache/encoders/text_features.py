"""Text features computed from the token states of a text model, and pooling: (B, T, D) states -> (B, D).

Masks are (B, T) with 1 on tokens and 0 on padding, which is on the right. `layers` are blocks, counted from 1; those
beyond a model's depth are ignored.

`embedcache export transformers` copies this file into the model folder, where it runs without embedcache: import only
torch, the standard library and `image_features`, which is copied along.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from embedcache.encoders.image_features import state_features, untie_last_state

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TextFeatures(torch.nn.Module):
    """Native features of a transformers text model, and the same after some of its blocks: (B, T) -> dict by name."""

    def __init__(self, model: torch.nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        untie_last_state(model, layers)
        self._model = model
        self._layers = layers

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, T) token ids by name: (B, D), or (B, T, D) for tokens."""

        def from_state(state: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden_BTD = state.float()
            return {
                "mean": mean(hidden_BTD, attention_mask),
                "cls": cls(hidden_BTD, attention_mask),
                "tokens": hidden_BTD,
            }

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return state_features(self._model, inputs, self._layers, from_state)[1]


class SentenceFeatures(torch.nn.Module):
    """Features of a sentence-transformers model by name: transformer, concatenated poolings, then dense layers.

    `width` truncates vectors to their first dimensions, for models trained so that these are vectors of their own.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        pools: Sequence[str],
        heads: Sequence[torch.nn.Module],
        layers: Sequence[int],
        width: int | None = None,
    ) -> None:
        super().__init__()
        untie_last_state(transformer, layers)
        self._transformer = transformer
        self._pools = pools
        self._heads = torch.nn.ModuleList(heads)
        self._layers = layers
        self._width = width

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of (B, T) token ids by name: (B, D), or (B, T, D) for tokens."""
        pooled = "_".join(self._pools)

        def from_state(state: torch.Tensor) -> dict[str, torch.Tensor]:
            hidden_BTD = state.float()
            vectors = [POOLS[name](hidden_BTD, attention_mask) for name in self._pools]
            return {pooled: torch.cat(vectors, dim=-1), "tokens": hidden_BTD}

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        _, outputs = state_features(self._transformer, inputs, self._layers, from_state)
        if len(self._heads):
            dense = outputs[pooled]
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


def mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the mean over tokens."""
    return _sum(hidden_BTD, mask_BT) / _count(mask_BT)


def cls(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the first token."""
    del mask_BT
    return hidden_BTD[:, 0]


def last(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the last token that is not padding."""
    index_B11 = (mask_BT.sum(dim=1) - 1)[:, None, None].expand(-1, 1, hidden_BTD.shape[2])
    return hidden_BTD.gather(1, index_B11).squeeze(1)


def largest(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the maximum over tokens in each dimension."""
    return hidden_BTD.masked_fill(mask_BT[:, :, None] == 0, float("-inf")).amax(dim=1)


def mean_sqrt_len(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the sum over tokens divided by the square root of their number."""
    return _sum(hidden_BTD, mask_BT) / _count(mask_BT).sqrt()


def weighted_mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Compute the mean over tokens, weighted by position from 1."""
    weights_BT = mask_BT * mask_BT.cumsum(dim=1)
    return _sum(hidden_BTD, weights_BT) / _count(weights_BT)


POOLS: Mapping[str, Pool] = {
    "mean": mean,
    "cls": cls,
    "last": last,
    "max": largest,
    "mean_sqrt_len": mean_sqrt_len,
    "weighted_mean": weighted_mean,
}
"""Feature name -> how it is pooled."""

POOLING: Mapping[str, str] = {
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
