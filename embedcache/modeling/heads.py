"""Towers, which map a frozen feature of width D into the shared space of width P, and their projectors.

A tower prepares the input of a projector: normalization, centering, dropout. A projector of one vector per item is
built as `Projector(input_width, output_width)` and maps a (B, D) float tensor x to (B, P) float32. Those with a linear
branch can be initialized with a closed form (`set_linear_map`).

    linear       W x, and W x + b as linear:bias=true
    identity     x
    mlp          W x + V gelu(U layernorm(x))
    glu          V (relu6(U x') * W x'),  x' = layernorm(x)             SAIL
    fusemix      W f(x),  f = four blocks x + V gelu(U layernorm(x))    FuseMix
    sharelock    four linear layers with batch normalization            ShareLock
    asif         sparse cosine similarities to anchor pairs             ASIF
    openclip-*   the heads of open_clip, for export

A projector of token features is built as `Projector(input_width, output_width, dropout=0.1)` and maps (B, T, D) float32
tokens with (B,) lengths to (B, P) float32. `dropout` is the fraction of each normalized token that is set to zero in
training. The projectors `token`, `cls_token` and `token_mlp` are those of "From Unimodal to Multimodal: Scaling up
Projectors to Align Modalities" (CVPR 2025): T(x) = A x' + C gelu(B x') with x' = dropout(layernorm(x)) maps each token,
followed by the mean over an item's tokens. As A and C are linear, the mean of T is A mean(x') + C mean(gelu(B x')):
only B is applied to every token.

The names and interfaces of projectors are in `embedcache.projectors.base`.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, relu6


def build_tower(
    tower: str, projector: str, parameters: Mapping[str, Any], input_width: int, output_width: int
) -> "AnyTower":
    """Build a tower and its projector from the names of classes in this file."""
    module = globals()[projector](input_width, output_width, **parameters)
    built: AnyTower = globals()[tower](module, input_width, output_width)
    return built


class Tower(nn.Module):
    """Scale each vector to length 1, subtract the mean of the training vectors, and project.

    `dropout` is the fraction of the centered input that is set to zero in training.
    """

    mean: Tensor

    def __init__(self, projector: nn.Module, input_width: int, output_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.dropout = Dropout(dropout)
        self.register_buffer("mean", torch.zeros(input_width))
        self.projector: Any = projector

    def forward(self, vectors_BD: Tensor, lengths_B: None = None) -> Tensor:
        """Project a batch: (B, D) any float -> (B, P) float32, not normalized."""
        del lengths_B
        centered = normalize(vectors_BD.float(), dim=-1) - self.mean
        projected: Tensor = self.projector(self.dropout(centered))
        return projected


class RawTower(nn.Module):
    """Project vectors as the encoder returned them, divided by one number, as in tools that put a head on encoders."""

    length: Tensor
    """Root mean square length of the training vectors; an export folds it into the first linear layer."""

    def __init__(self, projector: nn.Module, input_width: int, output_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.dropout = Dropout(dropout)
        self.register_buffer("length", torch.ones(()))
        self.projector: Any = projector

    def forward(self, vectors_BD: Tensor, lengths_B: None = None) -> Tensor:
        """Project a batch: (B, D) any float -> (B, P) float32, not normalized."""
        del lengths_B
        projected: Tensor = self.projector(self.dropout(vectors_BD.float() / self.length))
        return projected


class TokenTower(nn.Module):
    """Project all tokens of an item as the encoder returned them."""

    def __init__(self, projector: nn.Module, input_width: int, output_width: int) -> None:
        super().__init__()
        self.input_width, self.output_width = input_width, output_width
        self.projector: Any = projector

    def forward(self, values: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Project a batch: (B, T, D), or (B, D) as one token per item -> (B, P) float32, not normalized."""
        tokens_BTD = values.float() if values.ndim == 3 else values.float()[:, None]
        projected: Tensor = self.projector(tokens_BTD, lengths_B)
        return projected


AnyTower: TypeAlias = Tower | RawTower | TokenTower


class LinearProjector(nn.Module):
    """y = W x, or y = W x + b with a bias."""

    def __init__(self, input_width: int, output_width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=bias)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.linear(vectors_BD)
        return projected

    @torch.no_grad()
    def set_linear_map(self, weights_DP: Tensor) -> None:
        self.linear.weight.copy_(weights_DP.T)
        if self.linear.bias is not None:
            self.linear.bias.zero_()


class IdentityProjector(nn.Module):
    """y = x, without parameters.

    Raises:
        ValueError: the shared width differs from the feature's.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        if input_width != output_width:
            raise ValueError(
                f"expected a shared width equal to the feature's width {input_width}, got {output_width}; use "
                f"--shared-width {input_width}"
            )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        return vectors_BD


class MlpProjector(nn.Module):
    """y = W x + V gelu(U layernorm(x)), with dropout on the hidden layer.

    V starts at zero, so that training starts from the linear map. The linear branch in place of an identity skip
    follows the token projector of "From Unimodal to Multimodal" (CVPR 2025).
    """

    def __init__(self, input_width: int, output_width: int, *, hidden: int = 512, hidden_dropout: float = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=False)
        self.hidden = nn.Sequential(
            nn.LayerNorm(input_width), nn.Linear(input_width, hidden), nn.GELU(), Dropout(hidden_dropout)
        )
        self.output = nn.Linear(hidden, output_width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.linear(vectors_BD) + self.output(self.hidden(vectors_BD))
        return projected

    @torch.no_grad()
    def set_linear_map(self, weights_DP: Tensor) -> None:
        self.linear.weight.copy_(weights_DP.T)
        self.output.weight.zero_()


class GluProjector(nn.Module):
    """y = V (relu6(U x') * W x') with x' = layernorm(x), whose hidden width is `expansion` times D.

    The projector of SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025): the
    two for 2,048 and 4,096 -> 1,024 have 386.0 M parameters. It has no linear branch for a closed form.
    """

    def __init__(self, input_width: int, output_width: int, *, expansion: int = 8) -> None:
        super().__init__()
        hidden_width = expansion * input_width
        self.norm = nn.LayerNorm(input_width)
        self.gate = nn.Linear(input_width, hidden_width)
        self.value = nn.Linear(input_width, hidden_width)
        self.output = nn.Linear(hidden_width, output_width)
        for linear in (self.gate, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        normed = self.norm(vectors_BD)
        gated = (relu6(self.gate(normed)) * self.value(normed)).clamp(-1e3, 1e3)
        projected: Tensor = self.output(gated)
        return projected


class FuseMixProjector(nn.Module):
    """y = W f(x) + b, where f is some residual blocks x + V gelu(U layernorm(x)) of hidden width `expansion` times D.

    The projector of FuseMix, "Data-Efficient Multimodal Fusion on a Single GPU" (CVPR 2024), with the dropout of its
    configuration: the two for 1,536 and 1,024 -> 512 have 110.4 M parameters.
    """

    def __init__(
        self,
        input_width: int,
        output_width: int,
        *,
        num_blocks: int = 4,
        expansion: int = 4,
        hidden_dropout: float = 0.6,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _FuseMixBlock(input_width, expansion * input_width, hidden_dropout) for _ in range(num_blocks)
        )
        self.linear = nn.Linear(input_width, output_width)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        for block in self.blocks:
            vectors_BD = vectors_BD + block(vectors_BD)
        projected: Tensor = self.linear(vectors_BD)
        return projected

    @torch.no_grad()
    def set_linear_map(self, weights_DP: Tensor) -> None:
        """Set the projector to x @ weights, with blocks that add zero."""
        self.linear.weight.copy_(weights_DP.T)
        self.linear.bias.zero_()
        for block in self.blocks:
            block.output.weight.zero_()  # type: ignore[union-attr, operator]
            block.output.bias.zero_()  # type: ignore[union-attr, operator]


class _FuseMixBlock(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), Dropout(dropout))
        self.output = nn.Linear(hidden, width)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        added: Tensor = self.output(self.hidden(vectors_BD))
        return added


class ShareLockProjector(nn.Module):
    """Linear layers with batch normalization, ReLU and dropout between them.

    The text head of ShareLock, "Better Language Models Exhibit Higher Visual Alignment" (TMLR 2026), whose image side
    is the frozen feature itself: use `identity+sharelock`. For 4,096 -> 1,024 it has 54.6 M parameters.
    """

    def __init__(
        self,
        input_width: int,
        output_width: int,
        *,
        hidden: int = 4096,
        num_layers: int = 4,
        hidden_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        widths = [input_width, *[hidden] * (num_layers - 1)]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), Dropout(hidden_dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], output_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.layers(vectors_BD)
        return projected


class AsifProjector(nn.Module):
    """Cosine similarities to P anchors, to a power; only the `num_kept` largest are kept, negative ones become zero.

    The sparse relative representation of "ASIF: Coupled Data Turns Unimodal Models to Multimodal Without Training"
    (NeurIPS 2023) with its numbers: the anchors of both towers are the same training pairs, so that entry j measures
    how close an item is to pair j. Nothing is trained. Unlike the paper, cosines are between centered vectors, as a
    tower centers its input. Until anchors are set, every item is projected to zero.
    """

    anchors: Tensor

    def __init__(self, input_width: int, output_width: int, *, num_kept: int = 800, power: int = 8) -> None:
        super().__init__()
        self.num_kept = num_kept
        self.power = power
        self.register_buffer("anchors", torch.zeros(output_width, input_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        cosines_BP = normalize(vectors_BD, dim=-1) @ self.anchors.T
        largest_BK, where_BK = cosines_BP.topk(min(self.num_kept, len(self.anchors)), dim=-1)
        kept_BK = largest_BK.float().clamp(min=0) ** self.power
        return torch.zeros_like(cosines_BP, dtype=torch.float32).scatter(-1, where_BK, kept_BK)

    @torch.no_grad()
    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Set the anchors to P vectors of any length."""
        self.anchors.copy_(normalize(anchors_PD, dim=-1))


class OpenClipHead(nn.Module):
    has_raw_input = True

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.layers(vectors_BD)
        return projected


class OpenClipLinear(OpenClipHead):
    """y = W x: open_clip's `linear` head for images and for texts."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__(nn.Linear(input_width, output_width, bias=False))


class OpenClipImageMlp(OpenClipHead):
    """y = V gelu(U x + b), hidden width 2 P: open_clip's `timm_proj: mlp`."""

    def __init__(self, input_width: int, output_width: int) -> None:
        width = 2 * output_width
        super().__init__(nn.Linear(input_width, width), nn.GELU(), nn.Linear(width, output_width, bias=False))


class OpenClipTextMlp(OpenClipHead):
    """y = V gelu(U x), hidden width (D + P) / 2: open_clip's `hf_proj_type: mlp`."""

    def __init__(self, input_width: int, output_width: int) -> None:
        width = (input_width + output_width) // 2
        layers = nn.Linear(input_width, width, bias=False), nn.GELU(), nn.Linear(width, output_width, bias=False)
        super().__init__(*layers)


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits per number on the CPU, where drawing takes a third of its time.

    The fraction set to zero is `p` to within 1 / 65,536.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Set a fraction of the numbers to zero and scale up the others, in training; any shape."""
        if not self.training or not 0 < self.p < 1 or values.device.type != "cpu":
            return super().forward(values)
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        drawn = bits.view(torch.int16)[: values.numel()].view(values.shape)
        is_kept = drawn.ge_(round(self.p * 2**16) - 2**15)  # 0 or 1; bools take twice as long to convert
        return values * is_kept.to(values.dtype).div_(1 - self.p)


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
