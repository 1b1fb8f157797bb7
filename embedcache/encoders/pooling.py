"""One vector from the token states of a text: hidden_BTD and mask_BT (1 on tokens, padding on the right) -> (B, D)."""

from collections.abc import Callable, Mapping

import torch

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Average the tokens."""
    return _sum(hidden_BTD, mask_BT) / _count(mask_BT)


def cls(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Take the first token."""
    del mask_BT
    return hidden_BTD[:, 0]


def last(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Take the last token that is no padding."""
    index_B11 = (mask_BT.sum(dim=1) - 1)[:, None, None].expand(-1, 1, hidden_BTD.shape[2])
    return hidden_BTD.gather(1, index_B11).squeeze(1)


def largest(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Take the largest value over the tokens, in each dimension."""
    return hidden_BTD.masked_fill(mask_BT[:, :, None] == 0, float("-inf")).amax(dim=1)


def mean_sqrt_len(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Add the tokens up and divide by the square root of their number."""
    return _sum(hidden_BTD, mask_BT) / _count(mask_BT).sqrt()


def weighted_mean(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Average the tokens, the n-th one counting n times."""
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
"""Feature name -> how it is made."""

POOLING: Mapping[str, str] = {
    "mean": "mean of the last hidden states over all tokens, special ones included",
    "cls": "last hidden state of the first token",
    "last": "last hidden state of the last token",
    "max": "largest value of the last hidden states over all tokens",
    "mean_sqrt_len": "sum of the last hidden states over the square root of the number of tokens",
    "weighted_mean": "mean of the last hidden states, weighted by position from 1",
    "tokens": "last hidden states of all tokens, special ones included",
}
"""What a fingerprint says of each feature."""


def _sum(hidden_BTD: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    return (hidden_BTD * weights_BT[:, :, None].to(hidden_BTD.dtype)).sum(dim=1)


def _count(weights_BT: torch.Tensor) -> torch.Tensor:
    return weights_BT.sum(dim=1, keepdim=True).to(torch.float32)
