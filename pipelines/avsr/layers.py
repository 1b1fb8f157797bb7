"""Networks on sequences of frames: encoders of one stream, the fusion of several, and readouts per frame.

A padded batch and its items alone give the same values, to float32 rounding: nothing looks at a frame of padding.
Streams, such as audio and lips, have the same frames. One may be missing: a learned vector stands for it, which
training draws at random ("modality dropout").
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from embedcache.errors import SettingError
from pipelines.sequence import LayerSizes, StandardizedInput, sinusoids

FusionKind: TypeAlias = Literal["concat", "gated"]
_GATE_FRAMES = 5  # frames that the gate sees around each frame, 0.2 s at 25 Hz


class MaskedNorm(nn.Module):
    """Layer normalization without scale and shift, over all channels and valid frames of each item together."""

    def forward(self, values_BTD: Tensor, is_valid_BT: Tensor) -> Tensor:
        """Normalize each item to mean 0 and variance 1; frames of padding become 0: (B, T, D)."""
        is_valid_BT1 = is_valid_BT[..., None]
        count_B11 = (is_valid_BT.sum(dim=1) * values_BTD.shape[-1]).clamp(min=1)[:, None, None]
        mean_B11 = values_BTD.masked_fill(~is_valid_BT1, 0).sum(dim=(1, 2), keepdim=True) / count_B11

        centered_BTD = (values_BTD - mean_B11).masked_fill(~is_valid_BT1, 0)
        variance_B11 = centered_BTD.square().sum(dim=(1, 2), keepdim=True) / count_B11
        return centered_BTD * torch.rsqrt(variance_B11 + 1e-5)


class Transformer(nn.Module):
    """A transformer encoder over valid frames, with the normalization before each block and after the last one.

    Args:
        width: width of the frames.
        num_layers: number of layers.
    """

    def __init__(self, width: int, num_layers: int, sizes: LayerSizes) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, sizes.num_heads, sizes.feed_forward, sizes.dropout, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, values_BTD: Tensor, is_valid_BT: Tensor) -> Tensor:
        """Attend over the valid frames of each item: (B, T, D)."""
        outputs_BTD: Tensor = self.layers(values_BTD, src_key_padding_mask=~is_valid_BT)
        return outputs_BTD


class FrameAdapter(nn.Module):
    """A linear layer on (stacked) frames, `MaskedNorm`, ReLU, a linear layer, and sinusoidal positions.

    A convolution whose kernel and stride are r is a linear layer on r stacked frames.
    """

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(input_width, width)
        self.norm = MaskedNorm()
        self.second = nn.Linear(width, width)

    def forward(self, values_BTD: Tensor, is_valid_BT: Tensor) -> Tensor:
        """Map frames to the width of a transformer: (B, T, P)."""
        hidden_BTP = self.second(torch.relu(self.norm(self.first(values_BTD), is_valid_BT)))
        positions_TP = sinusoids(hidden_BTP.shape[1], hidden_BTP.shape[2], device=hidden_BTP.device)
        return torch.as_tensor(hidden_BTP + positions_TP)


class SequenceEncoder(StandardizedInput):
    """The encoder of one stream: standardized channels, stacked frames, a `FrameAdapter` and a `Transformer`.

    H = Enc(PE + W₂ · ReLU(MLN(W₁ · x))) with r frames side by side in x, as in "Leveraging Unimodal Self-Supervised
    Learning for Multimodal Audio-Visual Speech Recognition" (ACL 2022). Unlike there, each encoder normalizes before
    its blocks and ends with a separate normalization, so that it can be frozen. It also standardizes the channels of
    the feature first, so that CTC learns to align in a third of the steps.

    Args:
        input_width: width of the feature.
        stack: number of its frames side by side.
        width: width of the output.
    """

    def __init__(self, input_width: int, stack: int, width: int, num_layers: int, sizes: LayerSizes) -> None:
        super().__init__(input_width)
        self.adapter = FrameAdapter(stack * input_width, width)
        self.transformer = Transformer(width, num_layers, sizes)

    def forward(self, values_BTD: Tensor, is_valid_BT: Tensor) -> Tensor:
        """Encode stacked frames: (B, T, stack · D) -> (B, T, P)."""
        shape_BTSD = (*values_BTD.shape[:2], -1, len(self.mean))
        standard_BTD = ((values_BTD.view(shape_BTSD) - self.mean) * self.scale).flatten(2)
        encoded_BTP: Tensor = self.transformer(self.adapter(standard_BTD, is_valid_BT), is_valid_BT)
        return encoded_BTP


class Fusion(nn.Module):
    """Joins the encoded streams of each item and attends over the result.

    `concat`, as in the paper of `SequenceEncoder`:  H = Enc(PE + W₂ · ReLU(MLN(W₁ · [LN(H_a); LN(H_v)])))

    `gated`: H = a · Enc(PE + W₂ · ReLU(MLN(W₁ · 2 [g_a · LN(H_a); g_v · LN(H_v)]))) + g_a · H_a + g_v · H_v, where
    (g_a, g_v), per frame, is a softmax over the streams of a small network that sees both streams around the frame, and
    a, per channel, starts at 0.1. Readouts that start from a run of one stream therefore work from the beginning, and
    a closed gate leaves them the states of the other stream.

    Each stream has a separate normalization. A learned vector of weight 0 in the gate replaces a missing stream.

    Args:
        streams: names of the streams, in the order of concatenation.
        width: width of each stream and of the output.
        kind: `concat` or `gated`.
    """

    def __init__(
        self,
        streams: tuple[str, ...],
        width: int,
        *,
        kind: FusionKind,
        num_layers: int,
        sizes: LayerSizes,
    ) -> None:
        super().__init__()
        if kind not in ("concat", "gated"):
            raise SettingError(f"fusion: expected concat or gated, got {kind!r}")
        self.streams = streams
        self.kind = kind
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in streams})
        self.missing = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in streams})

        joined = width * len(streams)
        if kind == "gated":
            padding = _GATE_FRAMES // 2
            self.gate = nn.Sequential(
                nn.Conv1d(joined, width, _GATE_FRAMES, padding=padding), nn.ReLU(), nn.Conv1d(width, len(streams), 1)
            )
            self.gain = nn.Parameter(torch.full((width,), 0.1))

        self.adapter = FrameAdapter(joined, width)
        self.transformer = Transformer(width, num_layers, sizes)

    def forward(
        self, encoded: Mapping[str, Tensor], is_valid_BT: Tensor, is_missing: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Join the streams: (B, T, P).

        Args:
            encoded: stream -> (B, T, P); an absent stream is missing for all items.
            is_valid_BT: (B, T) bool.
            is_missing: stream -> (B,) bool, items that are treated as if they had no such stream.
        """
        # Any stream gives the shape, device and type of the ones that are missing.
        any_BTP = next(iter(encoded.values()))
        parts = []
        absences = []
        for name in self.streams:
            is_absent_B = torch.zeros(len(any_BTP), dtype=torch.bool, device=any_BTP.device)
            if name not in encoded:
                is_absent_B |= True
            elif is_missing is not None and name in is_missing:
                is_absent_B = is_missing[name]
            stand_in = self.missing[name].to(any_BTP.dtype)
            normed = self.norms[name](encoded[name]) if name in encoded else torch.zeros_like(any_BTP)
            parts.append(torch.where(is_absent_B[:, None, None], stand_in, normed))
            absences.append(is_absent_B)
        if self.kind == "concat":
            return self._attend(parts, is_valid_BT)

        weights = self.weights(parts, is_valid_BT, torch.stack(absences, dim=1)).chunk(len(parts), dim=-1)
        weighted = [len(parts) * weight * part for weight, part in zip(weights, parts, strict=True)]
        residuals = [
            weight * encoded[name] for name, weight in zip(self.streams, weights, strict=True) if name in encoded
        ]
        return self.gain * self._attend(weighted, is_valid_BT) + torch.stack(residuals).sum(dim=0)

    def _attend(self, parts: Sequence[Tensor], is_valid_BT: Tensor) -> Tensor:
        fused_BTP: Tensor = self.transformer(self.adapter(torch.cat(list(parts), dim=-1), is_valid_BT), is_valid_BT)
        return fused_BTP

    def weights(self, parts: list[Tensor], is_valid_BT: Tensor, is_absent_BS: Tensor) -> Tensor:
        """Compute the weight of each stream per frame, (B, T, number of streams); rows sum to 1."""
        joined_BDT = torch.cat(parts, dim=-1).masked_fill(~is_valid_BT[..., None], 0).transpose(1, 2)
        logits_BTS: Tensor = self.gate(joined_BDT).transpose(1, 2)

        # Without any stream all would be -inf, and the softmax NaN.
        is_absent_BS = is_absent_BS & ~is_absent_BS.all(dim=1, keepdim=True)
        return logits_BTS.masked_fill(is_absent_BS[:, None], -torch.inf).softmax(dim=-1)


class FrameReadout(nn.Module):
    """Four linear layers per frame with layer normalization and ReLU between them: widths P, P, P/2, P/2, C.

    The readout of CTC in the paper normalizes over all frames of an item (`MaskedNorm`). CTC learns more slowly then.
    """

    def __init__(self, width: int, num_symbols: int) -> None:
        super().__init__()
        widths = (width, width, width // 2, width // 2, num_symbols)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in widths[1:-1])

    def forward(self, values_BTP: Tensor) -> Tensor:
        """Compute logits: (B, T, C)."""
        for linear, norm in zip(self.linears, self.norms, strict=False):
            values_BTP = torch.relu(norm(linear(values_BTP)))
        logits_BTC: Tensor = self.linears[-1](values_BTP)
        return logits_BTC
