"""A linear map.

The feature as it is.

A residual multi-layer perceptron.

A gated perceptron, wide.

Inverted bottlenecks, and a linear map.

A plain deep perceptron with batch normalization.

Similarities to known pairs, in place of a learned map.

The heads that open_clip has, so that a trained pair can be exported to it as it is.

They take vectors as the encoder gave them: open_clip neither scales nor centers what a head gets.

Dropout that costs a CPU little.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu6

from embedcache.errors import SettingError


class LinearProjector(nn.Module):
    """y = W x: (B, D) -> (B, P) float32.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=False)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.linear(vectors_BD)
        return projected

    @torch.no_grad()
    def start_from(self, weights_DP: Tensor) -> None:
        """Make the projector compute exactly x @ weights."""
        self.linear.weight.copy_(weights_DP.T)


class IdentityProjector(nn.Module):
    """y = x: (B, D) -> (B, D) float32. Nothing is learned on this side.

    Args:
        input_width: D.
        output_width: the same.

    Raises:
        SettingError: the shared space has another width.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        if input_width != output_width:
            raise SettingError(
                f"the projector identity keeps the feature's width of {input_width}, and the shared space has "
                f"{output_width}; use --shared-width {input_width}"
            )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Give the batch."""
        return vectors_BD


_HIDDEN_WIDTH = 512
_DROPOUT = 0.1


class MlpProjector(nn.Module):
    """y = W x + V gelu(U layernorm(x)): (B, D) -> (B, P) float32.

    V starts at zero, so that training starts from the linear map. The linear branch in place of an identity skip
    follows the token projector of "From Unimodal to Multimodal" (CVPR 2025).

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_width, output_width, bias=False)
        self.hidden = nn.Sequential(
            nn.LayerNorm(input_width),
            nn.Linear(input_width, _HIDDEN_WIDTH),
            nn.GELU(),
            Dropout(_DROPOUT),
        )
        self.output = nn.Linear(_HIDDEN_WIDTH, output_width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.linear(vectors_BD) + self.output(self.hidden(vectors_BD))
        return projected

    @torch.no_grad()
    def start_from(self, weights_DP: Tensor) -> None:
        """Make the projector compute exactly x @ weights."""
        self.linear.weight.copy_(weights_DP.T)
        self.output.weight.zero_()


_TIMES_INPUT = 8
_LARGEST = 1e3


class GluProjector(nn.Module):
    """y = V (relu6(U x') ⊙ W x') with x' = layernorm(x), 8 times as wide as the input inside: (B, D) -> (B, P) float32.

    The projector of SAIL, "Assessing and Learning Alignment of Unimodal Vision and Language Models" (CVPR 2025): for
    2,048 and 4,096 -> 1,024 the two have 386.0 M parameters. It has no linear branch that a closed form could start.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        hidden_width = _TIMES_INPUT * input_width
        self.norm = nn.LayerNorm(input_width)
        self.gate = nn.Linear(input_width, hidden_width)
        self.value = nn.Linear(input_width, hidden_width)
        self.output = nn.Linear(hidden_width, output_width)
        for linear in (self.gate, self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        normed = self.norm(vectors_BD)
        gated = (relu6(self.gate(normed)) * self.value(normed)).clamp(-_LARGEST, _LARGEST)
        projected: Tensor = self.output(gated)
        return projected


_NUM_BLOCKS = 4
_fusemix_TIMES_INPUT = 4
_fusemix_DROPOUT = 0.6


class FuseMixProjector(nn.Module):
    """Four residual blocks x + V gelu(U layernorm(x)), 4 times as wide inside, then a linear map: (B, D) -> (B, P).

    The projector of FuseMix, "Data-Efficient Multimodal Fusion on a Single GPU" (CVPR 2024), with the dropout of its
    configuration: for 1,536 and 1,024 -> 512 the two have 110.4 M parameters.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(input_width) for _ in range(_NUM_BLOCKS))
        self.linear = nn.Linear(input_width, output_width)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        for block in self.blocks:
            vectors_BD = vectors_BD + block(vectors_BD)
        projected: Tensor = self.linear(vectors_BD)
        return projected

    @torch.no_grad()
    def start_from(self, weights_DP: Tensor) -> None:
        """Make the projector compute exactly x @ weights: its blocks add nothing yet."""
        self.linear.weight.copy_(weights_DP.T)
        self.linear.bias.zero_()
        for block in self.blocks:
            block.output.weight.zero_()  # type: ignore[union-attr, operator]
            block.output.bias.zero_()  # type: ignore[union-attr, operator]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, _fusemix_TIMES_INPUT * width), nn.GELU(), Dropout(_fusemix_DROPOUT)
        )
        self.output = nn.Linear(_fusemix_TIMES_INPUT * width, width)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        added: Tensor = self.output(self.hidden(vectors_BD))
        return added


_sharelock_HIDDEN_WIDTH = 4096
_NUM_LAYERS = 4
_sharelock_DROPOUT = 0.2


class ShareLockProjector(nn.Module):
    """Four linear layers, 4,096 wide, with batch normalization, ReLU and dropout between them: (B, D) -> (B, P).

    The text side of ShareLock, "Better Language Models Exhibit Higher Visual Alignment" (TMLR 2026), whose image side
    is the frozen feature itself: name the pair `identity+sharelock`. For 4,096 -> 1,024 it has 54.6 M parameters.

    Args:
        input_width: D.
        output_width: P.
    """

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        widths = [input_width, *[_sharelock_HIDDEN_WIDTH] * (_NUM_LAYERS - 1)]
        hidden: list[nn.Module] = []
        for before, after in pairwise(widths):
            hidden += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), Dropout(_sharelock_DROPOUT)]
        self.layers = nn.Sequential(*hidden, nn.Linear(_sharelock_HIDDEN_WIDTH, output_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected


_NUM_KEPT = 800
_POWER = 8


class AsifProjector(nn.Module):
    """Cosines to P anchors, the 800 largest kept, negatives zero, to the power 8: (B, D) -> (B, P) float32.

    The sparse relative representation of "ASIF: Coupled Data Turns Unimodal Models to Multimodal Without Training"
    (NeurIPS 2023) with its 800 and 8: both sides hold the vectors of the same pairs, so that entry j says how near
    an item is to pair j. Nothing is learned. We differ in that cosines are taken of centered vectors, as a tower
    gives them.

    Args:
        input_width: D.
        output_width: P, the number of anchors. Until they are set, every item is projected to zero.
    """

    anchors: Tensor

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.zeros(output_width, input_width))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        cosines_BP = normalize(vectors_BD, dim=-1) @ self.anchors.T
        largest_BK, where_BK = cosines_BP.topk(min(_NUM_KEPT, len(self.anchors)), dim=-1)
        kept_BK = largest_BK.float().clamp(min=0) ** _POWER
        return torch.zeros_like(cosines_BP, dtype=torch.float32).scatter(-1, where_BK, kept_BK)

    @torch.no_grad()
    def set_anchors(self, anchors_PD: Tensor) -> None:
        """Take the vectors of P pairs as anchors, of any length."""
        self.anchors.copy_(normalize(anchors_PD, dim=-1))


class OpenClipLinear(nn.Module):
    """y = W x: (B, D) -> (B, P) float32. open_clip's `linear`, of images and of texts.

    Args:
        input_width: D.
        output_width: P.
    """

    takes_vectors_as_they_are = True

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_width, output_width, bias=False))

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected


class OpenClipImageMlp(nn.Module):
    """y = V gelu(U x + b), 2 P wide inside: (B, D) -> (B, P) float32. open_clip's `timm_proj: mlp`.

    Args:
        input_width: D.
        output_width: P.
    """

    takes_vectors_as_they_are = True

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        hidden_width = 2 * output_width
        self.layers = nn.Sequential(
            nn.Linear(input_width, hidden_width), nn.GELU(), nn.Linear(hidden_width, output_width, bias=False)
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected


class OpenClipTextMlp(nn.Module):
    """y = V gelu(U x), (D + P) / 2 wide inside: (B, D) -> (B, P) float32. open_clip's `hf_proj_type: mlp`.

    Args:
        input_width: D.
        output_width: P.
    """

    takes_vectors_as_they_are = True

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        hidden_width = (input_width + output_width) // 2
        self.layers = nn.Sequential(
            nn.Linear(input_width, hidden_width, bias=False),
            nn.GELU(),
            nn.Linear(hidden_width, output_width, bias=False),
        )

    def forward(self, vectors_BD: Tensor) -> Tensor:
        """Project a batch."""
        projected: Tensor = self.layers(vectors_BD)
        return projected


class Dropout(nn.Dropout):
    """`nn.Dropout` with sixteen random bits a number on CPU, where drawing them is a third of its time.

    The share set to zero is `p` to within 1 / 65,536.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Set some numbers to zero and scale the others up, in training: any shape -> the same."""
        if not self.training or not 0 < self.p < 1 or values.device.type != "cpu":
            return super().forward(values)
        bits = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        is_kept = bits.view(torch.int16)[: values.numel()].view(values.shape) >= round(self.p * 2**16) - 2**15
        return values * is_kept.to(values.dtype).div_(1 - self.p)
