"""Towers, which map a frozen feature of width D into the shared space of width P, and their projectors.

A tower prepares the input of a projector: normalization, centering, dropout. A projector of one vector per item is
built as `Projector(input_width, output_width)` and maps a (B, D) float tensor x to (B, P) float32. A projector with a
linear branch can be initialized with a closed form (`set_linear_map`).

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
training. The projectors `token`, `cls_token` and `token_mlp` come from "From Unimodal to Multimodal: Scaling up
Projectors to Align Modalities" (CVPR 2025): T(x) = A x' + C gelu(B x') with x' = dropout(layernorm(x)) maps each token,
followed by the mean over an item's tokens. A and C are linear, so the mean of T is A mean(x') + C mean(gelu(B x')), and
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
    """Build a tower and its projector from the names of classes in this file.

    Example:
        >>> tower = build_tower("Tower", "LinearProjector", {"bias": True}, 8, 4)
        >>> tower(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """
    module = globals()[projector](input_width, output_width, **parameters)
    built: AnyTower = globals()[tower](module, input_width, output_width)
    return built


class Tower(nn.Module):
    """Scale each vector to length 1, subtract the mean of the training vectors, and project.

    The projector then sees only how an item differs from the average item. All projectors of one vector per item use
    this tower, except those with raw input, which use `RawTower`.

    Args:
        projector: the trained module, (B, D) -> (B, P).
        input_width: D.
        output_width: P.
        dropout: fraction of the centered input that is set to zero in training.

    Attributes:
        mean: (D,) float32, mean of the training vectors after scaling; zero until the initialization sets it.

    Example:
        >>> tower = Tower(IdentityProjector(2, 2), 2, 2)
        >>> tower(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    mean: Tensor

    def __init__(self, projector: nn.Module, input_width: int, output_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_width = input_width
        self.output_width = output_width
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
    """Project vectors as the encoder returned them, divided by one number.

    open_clip puts its heads on the encoder's output, without normalization in between. A projector that is exported to
    open_clip is therefore trained on such vectors. It is marked by the class attribute `has_raw_input`.

    Args:
        projector: the trained module, (B, D) -> (B, P).
        input_width: D.
        output_width: P.
        dropout: fraction of the input that is set to zero in training.

    Example:
        >>> tower = RawTower(IdentityProjector(2, 2), 2, 2)
        >>> tower.length.fill_(5)
        tensor(5.)
        >>> tower(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    length: Tensor
    """Root mean square length of the training vectors. An export folds it into the first linear layer."""

    def __init__(self, projector: nn.Module, input_width: int, output_width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_width = input_width
        self.output_width = output_width
        self.dropout = Dropout(dropout)
        self.register_buffer("length", torch.ones(()))
        self.projector: Any = projector

    def forward(self, vectors_BD: Tensor, lengths_B: None = None) -> Tensor:
        """Project a batch: (B, D) any float -> (B, P) float32, not normalized."""
        del lengths_B
        projected: Tensor = self.projector(self.dropout(vectors_BD.float() / self.length))
        return projected


class TokenTower(nn.Module):
    """Project all tokens of an item, as the encoder returned them, to one vector.

    A token projector normalizes its input, so the tower adds neither normalization nor dropout.

    Args:
        projector: the trained module, (B, T, D) with (B,) lengths -> (B, P).
        input_width: D.
        output_width: P.

    Example:
        >>> tower = TokenTower(MeanTokenProjector(8, 4), 8, 4)
        >>> tower(torch.ones(2, 5, 8), torch.tensor([5, 3])).shape
        torch.Size([2, 4])
    """

    def __init__(self, projector: nn.Module, input_width: int, output_width: int) -> None:
        super().__init__()
        self.input_width = input_width
        self.output_width = output_width
        self.projector: Any = projector

    def forward(self, values: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Project a batch: (B, T, D), or (B, D) as one token per item -> (B, P) float32, not normalized."""
        tokens_BTD = values.float() if values.ndim == 3 else values.float()[:, None]
        projected: Tensor = self.projector(tokens_BTD, lengths_B)
        return projected


AnyTower: TypeAlias = Tower | RawTower | TokenTower


class LinearProjector(nn.Module):
    """y = W x, or y = W x + b with a bias.

    The smallest projector with parameters. Without any training, it can be a closed form.

    Args:
        input_width: D.
        output_width: P.
        bias: whether b is added.

    Example:
        >>> projector = LinearProjector(2, 1)
        >>> projector.set_linear_map(torch.tensor([[1.0], [10.0]]))
        >>> projector(torch.tensor([[2.0, 3.0]])).tolist()
        [[32.0]]
    """

    def __init__(self, input_width: int, output_width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=bias)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.linear(vectors_BD)
        return projected

    @torch.no_grad()
    def set_linear_map(self, weights_DP: Tensor) -> None:
        """Set the projector to x @ weights."""
        self.linear.weight.copy_(weights_DP.T)
        if self.linear.bias is not None:
            self.linear.bias.zero_()


class IdentityProjector(nn.Module):
    """y = x, without parameters.

    The shared space is then the space of this feature, and only the other tower is trained, as in
    `identity+sharelock`.

    Args:
        input_width: D.
        output_width: P, equal to D.

    Raises:
        ValueError: the shared width differs from the feature's.

    Example:
        >>> IdentityProjector(2, 2)(torch.tensor([[2.0, 3.0]])).tolist()
        [[2.0, 3.0]]
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

    V starts at zero, so that training starts from the linear map, such as a closed form. The linear branch in place of
    an identity skip follows the token projector of "From Unimodal to Multimodal" (CVPR 2025).

    Args:
        input_width: D.
        output_width: P.
        hidden: width of the hidden layer.
        hidden_dropout: fraction of the hidden layer that is set to zero in training.

    Example:
        >>> projector = MlpProjector(2, 1, hidden=16)
        >>> projector.set_linear_map(torch.tensor([[1.0], [10.0]]))
        >>> projector(torch.tensor([[2.0, 3.0]])).tolist()  # the hidden layer adds zero until it is trained
        [[32.0]]
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
        """Set the projector to x @ weights, with a hidden layer that adds zero."""
        self.linear.weight.copy_(weights_DP.T)
        self.output.weight.zero_()


class GluProjector(nn.Module):
    """y = V (relu6(U x') * W x') with x' = layernorm(x): a gated layer, much wider than its input.

    The projector of SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025). Both
    towers for 2,048 and 4,096 -> 1,024 have 386.0 M parameters together. It has no linear branch for a closed form.

    Args:
        input_width: D.
        output_width: P.
        expansion: width of the hidden layer, in multiples of D.

    Example:
        >>> projector = GluProjector(8, 4, expansion=2)
        >>> projector.gate.out_features, projector(torch.ones(3, 8)).shape
        (16, torch.Size([3, 4]))
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
        # relu6 bounds only the gate, so the product is clamped.
        gated = (relu6(self.gate(normed)) * self.value(normed)).clamp(-1e3, 1e3)
        projected: Tensor = self.output(gated)
        return projected


class FuseMixProjector(nn.Module):
    """y = W f(x) + b, where f is a stack of residual blocks x + V gelu(U layernorm(x)).

    The projector of FuseMix, "Data-Efficient Multimodal Fusion on a Single GPU" (CVPR 2024), with the dropout of its
    configuration. Both towers for 1,536 and 1,024 -> 512 have 110.4 M parameters together. Unlike `MlpProjector`, it
    changes the vector at the width of the feature and projects it last.

    Args:
        input_width: D.
        output_width: P.
        num_blocks: number of residual blocks.
        expansion: width of the hidden layer of a block, in multiples of D.
        hidden_dropout: fraction of a hidden layer that is set to zero in training.

    Example:
        >>> projector = FuseMixProjector(8, 4, num_blocks=2)
        >>> len(projector.blocks), projector(torch.ones(3, 8)).shape
        (2, torch.Size([3, 4]))
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
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            self.blocks.append(_FuseMixBlock(input_width, expansion * input_width, hidden_dropout))
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

    The text head of ShareLock, "Better Language Models Exhibit Higher Visual Alignment" (TMLR 2026). The paper leaves
    the image feature as it is, so use `identity+sharelock`. For 4,096 -> 1,024 the head has 54.6 M parameters.

    Args:
        input_width: D.
        output_width: P.
        hidden: width of each hidden layer.
        num_layers: number of linear layers.
        hidden_dropout: fraction of each hidden layer that is set to zero in training.

    Example:
        >>> projector = ShareLockProjector(8, 4, hidden=16, num_layers=3)
        >>> [layer.out_features for layer in projector.layers if isinstance(layer, nn.Linear)]
        [16, 16, 4]
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
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.BatchNorm1d(next_width), nn.ReLU(), Dropout(hidden_dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], output_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.layers(vectors_BD)
        return projected


class AsifProjector(nn.Module):
    """Describe an item by its cosine similarities to P anchors, raised to a power.

    The anchors of both towers are the same training pairs, so entry j of a vector says how close an item is to pair j,
    whichever modality the item has. Only the largest cosines are kept, and negative ones become zero. Nothing is
    trained.

    This is the sparse relative representation of "ASIF: Coupled Data Turns Unimodal Models to Multimodal Without
    Training" (NeurIPS 2023), with its numbers. Unlike the paper, cosines are between centered vectors, as a tower
    centers its input. Until anchors are set, every item is projected to zero.

    Args:
        input_width: D.
        output_width: P, the number of anchors.
        num_kept: number of largest cosines of an item that are kept.
        power: exponent of the cosines; a higher one lets the closest anchors decide.

    Example:
        >>> projector = AsifProjector(2, 3, num_kept=2, power=2)
        >>> projector.set_anchors(torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]]))
        >>> projector(torch.tensor([[0.0, 2.0]]))
        tensor([[0.0000, 0.6400, 1.0000]])
    """

    anchors: Tensor

    def __init__(self, input_width: int, output_width: int, *, num_kept: int = 800, power: int = 8) -> None:
        super().__init__()
        self.num_kept = num_kept
        self.power = power
        self.register_buffer("anchors", torch.zeros(output_width, input_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        cosines_BP = normalize(vectors_BD, dim=-1) @ self.anchors.T
        largest_BK, anchors_BK = cosines_BP.topk(min(self.num_kept, len(self.anchors)), dim=-1)
        weights_BK = largest_BK.float().clamp(min=0) ** self.power
        return torch.zeros_like(cosines_BP, dtype=torch.float32).scatter(-1, anchors_BK, weights_BK)

    @torch.no_grad()
    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Set the anchors to P vectors of any length."""
        self.anchors.copy_(normalize(anchors_PD, dim=-1))


class OpenClipHead(nn.Module):
    """Layers that open_clip can load as the head of an encoder, for runs that are exported to it.

    Args:
        layers: the layers, applied in order.

    Example:
        >>> OpenClipHead(nn.Linear(8, 4), nn.GELU())(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    has_raw_input = True

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        projected: Tensor = self.layers(vectors_BD)
        return projected


class OpenClipLinear(OpenClipHead):
    """y = W x, open_clip's `linear` head for images and for texts.

    Example:
        >>> OpenClipLinear(8, 4)(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__(nn.Linear(input_width, output_width, bias=False))


class OpenClipImageMlp(OpenClipHead):
    """y = V gelu(U x + b) with hidden width 2 P, open_clip's `timm_proj: mlp`.

    Example:
        >>> [tuple(weights.shape) for weights in OpenClipImageMlp(8, 4).parameters()]
        [(8, 8), (8,), (4, 8)]
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        width = 2 * output_width
        super().__init__(nn.Linear(input_width, width), nn.GELU(), nn.Linear(width, output_width, bias=False))


class OpenClipTextMlp(OpenClipHead):
    """y = V gelu(U x) with hidden width (D + P) / 2, open_clip's `hf_proj_type: mlp`.

    Example:
        >>> [tuple(weights.shape) for weights in OpenClipTextMlp(8, 4).parameters()]
        [(6, 8), (4, 6)]
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        width = (input_width + output_width) // 2
        first = nn.Linear(input_width, width, bias=False)
        second = nn.Linear(width, output_width, bias=False)
        super().__init__(first, nn.GELU(), second)


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits per number on the CPU, where drawing takes a third of its time.

    The fraction set to zero is `p` to within 1 / 65,536. On a GPU it is `nn.Dropout`.

    Example:
        >>> values = Dropout(0.5)(torch.ones(1000))
        >>> values.unique().tolist(), 400 < values.count_nonzero() < 600
        ([0.0, 2.0], tensor(True))
    """

    def forward(self, values: Tensor) -> Tensor:
        """Set a fraction of the numbers of any shape to zero, and scale up the others. Only in training."""
        if not self.training or not 0 < self.p < 1 or values.device.type != "cpu":
            return super().forward(values)

        # One random int64 is four random int16.
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        integers = bits.view(torch.int16)[: values.numel()].view(values.shape)

        # In place, the comparison gives 0 or 1 as int16; bools take twice as long to convert.
        is_kept = integers.ge_(round(self.p * 2**16) - 2**15)
        return values * is_kept.to(values.dtype).div_(1 - self.p)


class MeanTokenProjector(nn.Module):
    """Map each token of an item with T, and average the results.

    The projector `token`. T is defined at the top of this file. All tokens of an item count equally; if the first one
    is a CLS token, `ClsTokenProjector` maps it separately.

    Args:
        input_width: D.
        output_width: P.
        dropout: fraction of each normalized token that is set to zero in training.

    Example:
        >>> projector = MeanTokenProjector(8, 4).eval()
        >>> tokens = torch.randn(1, 3, 8)
        >>> padded = torch.cat([tokens, torch.zeros(1, 2, 8)], dim=1)
        >>> torch.allclose(projector(padded, torch.tensor([3])), projector(tokens, None), atol=1e-6)
        True
    """

    has_token_input = True

    def __init__(self, input_width: int, output_width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.LayerNorm(input_width), Dropout(dropout))
        self.linear = nn.Linear(input_width, output_width)
        self.hidden = nn.Linear(input_width, output_width)
        self.output = nn.Linear(output_width, output_width)

    def forward(self, tokens_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
        is_token_BT = None
        if lengths_B is not None:
            is_token_BT = torch.arange(tokens_BTD.shape[1], device=tokens_BTD.device) < lengths_B[:, None]

        # Padding is left out before the layers, so that no time is spent on it.
        normed = self.norm(tokens_BTD if is_token_BT is None else tokens_BTD[is_token_BT])
        hidden = gelu(self.hidden(normed))
        projected: Tensor = self.linear(_mean(normed, is_token_BT)) + self.output(_mean(hidden, is_token_BT))
        return projected


class ClsTokenProjector(nn.Module):
    """Add T of the first token, the encoder's CLS, to the mean of a second T over the other tokens.

    The projector `cls_token`, which is the paper's vision head. The CLS token and the patches are mapped by separate
    weights. An item of one token has only the first summand.

    Args:
        input_width: D.
        output_width: P.
        dropout: fraction of each normalized token that is set to zero in training.

    Example:
        >>> projector = ClsTokenProjector(8, 4).eval()
        >>> tokens = torch.randn(1, 3, 8)
        >>> torch.equal(projector(tokens[:, :1], None), projector.cls(tokens[:, :1], None))
        True
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

        # The mean over no tokens would be NaN.
        has_patches = lengths_B > 1
        patches = self.patches(tokens_BTD[has_patches, 1:], lengths_B[has_patches] - 1)
        return cls.index_add(0, torch.nonzero(has_patches)[:, 0], patches)


class TokenMlpProjector(nn.Module):
    """Compute layernorm(dropout(V gelu(p)) + p) with p = U t, where t is the mean of T over the tokens of an item.

    The projector `token_mlp`, which is the paper's text head. It is `MeanTokenProjector` followed by a residual layer.

    Args:
        input_width: D.
        output_width: P.
        dropout: fraction of each normalized token, and of the output of V, that is set to zero in training.

    Example:
        >>> projector = TokenMlpProjector(8, 4).eval()
        >>> projector(torch.randn(2, 5, 8), torch.tensor([5, 2])).mean(dim=1).abs().max() < 1e-6  # layernorm is last
        tensor(True)
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


def _mean(values: Tensor, is_token_BT: Tensor | None) -> Tensor:
    """Average (B, T, D) tokens, or the (N, D) tokens that a mask selected, over each item: (B, D)."""
    if is_token_BT is None:
        return values.squeeze(1) if values.shape[1] == 1 else values.mean(dim=1)

    padded_BTD = values.new_zeros(*is_token_BT.shape, values.shape[-1])
    padded_BTD = padded_BTD.masked_scatter(is_token_BT[..., None], values)
    return padded_BTD.sum(dim=1) / is_token_BT.sum(dim=1, keepdim=True)
