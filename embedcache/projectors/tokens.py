"""Projectors for token features, from "From Unimodal to Multimodal: Scaling up Projectors to Align Modalities".

T(x) = A x' + C gelu(B x') with x' = dropout(layernorm(x)) maps each token, followed by the mean over an item's tokens.
As A and C are linear, the mean of T is A mean(x') + C mean(gelu(B x')): only B is applied to every token (CVPR 2025).

Each is built as `Projector(input_width, output_width, dropout=0.1)` and maps (B, T, D) float32 tokens with (B,) lengths
to (B, P) float32; `dropout` is the fraction of each normalized token that is set to zero in training.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from embedcache.projectors.heads import Dropout


class MeanTokenProjector(nn.Module):
    """Mean of T over the tokens of an item."""

    has_token_input = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.LayerNorm(input_width), Dropout(dropout))
        self.linear = nn.Linear(input_width, output_width)
        self.hidden = nn.Linear(input_width, output_width)
        self.output = nn.Linear(output_width, output_width)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        is_token = None
        if lengths_B is not None:  # false for padding: (B, T)
            is_token = torch.arange(tokens_BTD.shape[1], device=tokens_BTD.device) < lengths_B[:, None]
        normed = self.norm(tokens_BTD if is_token is None else tokens_BTD[is_token])
        hidden = gelu(self.hidden(normed))
        projected: Tensor = self.linear(_mean(normed, is_token)) + self.output(_mean(hidden, is_token))
        return projected


class ClsTokenProjector(nn.Module):
    """T of the first token (the encoder's CLS) plus the mean of a second T over the other tokens.

    The vision head of the paper. An item of one token has no such mean.
    """

    has_token_input = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.cls = MeanTokenProjector(input_width, output_width, dropout)
        self.patches = MeanTokenProjector(input_width, output_width, dropout)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        cls: Tensor = self.cls(tokens_BTD[:, :1], None)
        if lengths_B is None:
            return cls if tokens_BTD.shape[1] == 1 else cls + self.patches(tokens_BTD[:, 1:], None)
        has_patches = lengths_B > 1
        patches = self.patches(tokens_BTD[has_patches, 1:], lengths_B[has_patches] - 1)
        return cls.index_add(0, torch.nonzero(has_patches)[:, 0], patches)


class TokenMlpProjector(nn.Module):
    """layernorm(dropout(V gelu(p)) + p) with p = U t, where t is the mean of T over the tokens of an item.

    The text head of the paper. Dropout is also applied to the output of V.
    """

    has_token_input = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = MeanTokenProjector(input_width, output_width, dropout)
        self.linear = nn.Linear(output_width, output_width)
        self.residual = nn.Sequential(nn.GELU(), nn.Linear(output_width, output_width), Dropout(dropout))
        self.norm = nn.LayerNorm(output_width)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        linear = self.linear(self.tokens(tokens_BTD, lengths_B))
        projected: Tensor = self.norm(self.residual(linear) + linear)
        return projected


def _mean(values: Tensor, is_token: Tensor | None) -> Tensor:
    """Average over the tokens of each item: of (B, T, D), or of the (N, D) tokens selected by a mask -> (B, D)."""
    if is_token is None:
        return values.squeeze(1) if values.shape[1] == 1 else values.mean(dim=1)
    padded_BTD = values.new_zeros(*is_token.shape, values.shape[-1]).masked_scatter(is_token[..., None], values)
    return padded_BTD.sum(dim=1) / is_token.sum(dim=1, keepdim=True)
