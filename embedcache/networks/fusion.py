"""Fusion of streams with the same frames, such as audio and lips: by concatenation, or by a gate per frame.

Streams may be missing: learned vectors stand for them, which training draws at random ("modality dropout").
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from embedcache.errors import SettingError
from embedcache.networks.sequence import FrameAdapter, LayerSizes, Transformer

FusionKind: TypeAlias = Literal["concat", "gated"]
_GATE_FRAMES = 5  # frames that the gate sees around each frame, 0.2 s at 25 Hz


class Fusion(nn.Module):
    """Joins the encoded streams of each item and attends over the result.

    `concat`, as in the paper of `SequenceEncoder`:  H = Enc(PE + W₂ · ReLU(MLN(W₁ · [LN(H_a); LN(H_v)])))

    `gated`: H = a · Enc(PE + W₂ · ReLU(MLN(W₁ · 2 [g_a · LN(H_a); g_v · LN(H_v)]))) + g_a · H_a + g_v · H_v, where
    (g_a, g_v), per frame, is a softmax over the streams of a small network that sees both streams around the frame, and
    a, per channel, starts at 0.1. Readouts that start from a run of one stream therefore begin with what they know, and
    where the gate closes a stream, those of the other one are left.

    Each stream has a normalization of its own. A missing stream is a learned vector, of weight 0 in the gate.

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
        self.streams, self.kind = streams, kind
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
            encoded: stream -> (B, T, P); one that is absent is missing for all items.
            is_valid_BT: (B, T) bool.
            is_missing: stream -> (B,) bool, items that are treated as if they had no such stream.
        """
        some = next(iter(encoded.values()))
        parts, gone = [], []
        for name in self.streams:
            is_gone_B = torch.zeros(len(some), dtype=torch.bool, device=some.device)
            if name not in encoded:
                is_gone_B |= True
            elif is_missing is not None and name in is_missing:
                is_gone_B = is_missing[name]
            stand_in = self.missing[name].to(some.dtype)
            normed = self.norms[name](encoded[name]) if name in encoded else torch.zeros_like(some)
            parts.append(torch.where(is_gone_B[:, None, None], stand_in, normed))
            gone.append(is_gone_B)
        if self.kind == "concat":
            return self._attend(parts, is_valid_BT)
        weights = self.weights(parts, is_valid_BT, torch.stack(gone, dim=1)).chunk(len(parts), dim=-1)
        weighted = [len(parts) * weight * part for weight, part in zip(weights, parts, strict=True)]
        kept = [weight * encoded[name] for name, weight in zip(self.streams, weights, strict=True) if name in encoded]
        return self.gain * self._attend(weighted, is_valid_BT) + torch.stack(kept).sum(dim=0)

    def _attend(self, parts: Sequence[Tensor], is_valid_BT: Tensor) -> Tensor:
        fused_BTP: Tensor = self.transformer(self.adapter(torch.cat(list(parts), dim=-1), is_valid_BT), is_valid_BT)
        return fused_BTP

    def weights(self, parts: list[Tensor], is_valid_BT: Tensor, is_gone_BS: Tensor) -> Tensor:
        """Compute the weight of each stream per frame: (B, T, number of streams), rows sum to 1."""
        joined_BDT = torch.cat(parts, dim=-1).masked_fill(~is_valid_BT[..., None], 0).transpose(1, 2)
        logits_BTS: Tensor = self.gate(joined_BDT).transpose(1, 2)
        is_gone_BS = is_gone_BS & ~is_gone_BS.all(dim=1, keepdim=True)
        return logits_BTS.masked_fill(is_gone_BS[:, None], -torch.inf).softmax(dim=-1)
