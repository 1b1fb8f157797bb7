"""The token projector of "From Unimodal to Multimodal: Scaling up Projectors to Align Modalities" (CVPR 2025).

T(x) = A x' + C gelu(B x') with x' = dropout(layernorm(x)) maps each token, and the mean is taken behind it. As A and C
are linear, the mean of T is A mean(x') + C mean(gelu(B x')): only B is applied to every token."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from embedcache.projectors.heads import Dropout


class TokenProjector(nn.Module):
    """The mean over an item's tokens of T: (B, T, D) -> (B, P) float32.

    Args:
        input_width: D.
        output_width: P, also T's width inside.
        dropout: share of each normed token set to zero in training.
    """

    takes_tokens = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.LayerNorm(input_width), Dropout(dropout))
        self.linear = nn.Linear(input_width, output_width)
        self.hidden = nn.Linear(input_width, output_width)
        self.output = nn.Linear(output_width, output_width)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Project a batch."""
        is_token = None if lengths_B is None else _is_token(tokens_BTD, lengths_B)
        normed = self.norm(tokens_BTD if is_token is None else tokens_BTD[is_token])
        hidden = gelu(self.hidden(normed))
        projected: Tensor = self.linear(_mean(normed, is_token)) + self.output(_mean(hidden, is_token))
        return projected


class ClsTokenProjector(nn.Module):
    """T of the first token, the encoder's CLS, plus another T's mean over the others: (B, T, D) -> (B, P) float32.

    The paper's vision side. An item of one token has no such mean.

    Args:
        input_width: D.
        output_width: P.
        dropout: share of each normed token set to zero in training.
    """

    takes_tokens = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.cls = TokenProjector(input_width, output_width, dropout)
        self.patches = TokenProjector(input_width, output_width, dropout)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Project a batch."""
        cls: Tensor = self.cls(tokens_BTD[:, :1], None)
        if lengths_B is None:
            return cls if tokens_BTD.shape[1] == 1 else cls + self.patches(tokens_BTD[:, 1:], None)
        has_patches = lengths_B > 1
        patches = self.patches(tokens_BTD[has_patches, 1:], lengths_B[has_patches] - 1)
        return cls.index_add(0, torch.nonzero(has_patches)[:, 0], patches)


class TokenMlpProjector(nn.Module):
    """The mean over an item's tokens of T, then layernorm(dropout(V gelu(p)) + p) with p = U x: (B, T, D) -> (B, P).

    The paper's text side.

    Args:
        input_width: D.
        output_width: P.
        dropout: share of each normed token, and of the last layer's input, set to zero in training.
    """

    takes_tokens = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = TokenProjector(input_width, output_width, dropout)
        self.linear = nn.Linear(output_width, output_width)
        self.residual = nn.Sequential(nn.GELU(), nn.Linear(output_width, output_width), Dropout(dropout))
        self.norm = nn.LayerNorm(output_width)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """Project a batch."""
        linear = self.linear(self.tokens(tokens_BTD, lengths_B))
        projected: Tensor = self.norm(self.residual(linear) + linear)
        return projected


def _is_token(tokens_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Tell tokens from what lies behind an item's last one: (B, T) bool."""
    return torch.arange(tokens_BTD.shape[1], device=tokens_BTD.device) < lengths_B[:, None]


def _mean(values: Tensor, is_token: Tensor | None) -> Tensor:
    """Take each item's mean: of (B, T, D), or of the (N, D) tokens that a mask keeps, in order -> (B, D)."""
    if is_token is None:
        return values.mean(dim=1)
    padded_BTD = values.new_zeros(*is_token.shape, values.shape[-1]).masked_scatter(is_token[..., None], values)
    return padded_BTD.sum(dim=1) / is_token.sum(dim=1, keepdim=True)
