"""A speech recognizer on frozen features of sound, lips or both: encoders per stream, fusion, CTC and attention.

The network of "Leveraging Unimodal Self-Supervised Learning for Multimodal Audio-Visual Speech Recognition" (ACL 2022)
on top of its frozen front-ends. It is trained in three stages: audio, video, then the fusion of both with the encoders
of the first two stages. All streams have the frame rate of the slowest one, 25 per second in the paper.
`recognize` decodes utterances with a trained network by any of the decoders.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import ctc_loss

from embedcache.arrays import Floats, Ints
from embedcache.errors import SettingError
from embedcache.runs import Run
from embedcache.store.layout import Axis
from pipelines.avsr.attention import AttentionDecoder
from pipelines.avsr.ctc import decode_ctc
from pipelines.avsr.decoding import Decoding, decode_attention, decode_hybrid
from pipelines.avsr.layers import FrameReadout, Fusion, FusionKind, SequenceEncoder
from pipelines.avsr.transcripts import BLANK, END, SYMBOLS, decode_symbols
from pipelines.beam import Hypothesis
from pipelines.sequence import LayerSizes, valid_frames

PAPER: Mapping[str, Any] = {
    "width": 512,
    "num_layers": 6,
    "fusion_layers": 6,
    "decoder_layers": 6,
    "num_heads": 8,
    "feed_forward": 2048,
    "dropout": 0.1,
}
"""Sizes of the paper, as arguments of `SpeechNetwork`."""
KIND = "pipelines.avsr.network:SpeechNetwork"
"""What the config of a run names."""


class Frames(NamedTuple):
    """Stacked frames of one stream for B items.

    Args:
        values_BTD: (B, T, stack · D), any float.
        lengths_B: (B,) int64.
    """

    values_BTD: Tensor
    lengths_B: Tensor


class EncodedSpeech(NamedTuple):
    """Encoded frames of a batch, the input of both heads of a `SpeechNetwork`.

    Args:
        frames_BTP: encoded frames.
        is_valid_BT: whether a frame belongs to the item or is padding.
    """

    frames_BTP: Tensor
    is_valid_BT: Tensor


class SpeechNetwork(nn.Module):
    """Encoders of one or two streams, fusion of two, a CTC readout and an attention decoder over 40 symbols.

    Args:
        streams: name of a stream, `audio` or `video` -> `width` of its feature, and `stack`, the number of its frames
            per frame of the network: 2 for features at 50 Hz with lips at 25 Hz.
        width: width of all encoded frames.
        num_layers: layers of the encoder of each stream.
        fusion: `concat` or `gated`; only used with two streams.
        fusion_layers: layers after the fusion, at least one for two streams. With one stream they are further layers
            after the encoder, as a control with equal depth.
        decoder_layers: layers of the attention decoder.
    """

    def __init__(
        self,
        *,
        streams: Mapping[str, Mapping[str, int]],
        width: int = 128,
        num_layers: int = 2,
        fusion: FusionKind = "concat",
        fusion_layers: int = 0,
        decoder_layers: int = 2,
        num_heads: int = 4,
        feed_forward: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not streams or width % (2 * num_heads):
            raise SettingError(
                f"expected one or two streams and a width that is a multiple of {2 * num_heads}, got {list(streams)} "
                f"and {width}"
            )

        sizes = LayerSizes(num_heads, feed_forward, dropout)
        self.stacks = {name: int(stream["stack"]) for name, stream in streams.items()}
        self.widths = {name: int(stream["width"]) for name, stream in streams.items()}
        self.width = width

        self.encoders = nn.ModuleDict(
            {name: SequenceEncoder(self.widths[name], self.stacks[name], width, num_layers, sizes) for name in streams}
        )

        # One stream needs no fusion, unless it gets as many layers as a fusion for comparison.
        self.fusion = (
            Fusion(tuple(streams), width, kind=fusion, num_layers=fusion_layers, sizes=sizes)
            if len(streams) > 1 or fusion_layers
            else None
        )

        self.ctc = FrameReadout(width, len(SYMBOLS))
        self.attention = AttentionDecoder(width, len(SYMBOLS), decoder_layers, sizes)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams."""
        return tuple(self.stacks)

    def parts(self) -> dict[str, list[str]]:
        """Return the parts to load or train separately: each stream's encoder, `fusion`, `ctc` and `attention`."""
        parts = {name: [f"encoders.{name}"] for name in self.streams}
        parts |= {"fusion": ["fusion"]} if self.fusion is not None else {}
        return {**parts, "ctc": ["ctc"], "attention": ["attention"]}

    def standardize(self, name: str, frames_ND: Floats) -> None:
        """Standardize a stream's feature by the moments of some of its frames, (N, D)."""
        encoder = self.encoders[name]
        assert isinstance(encoder, SequenceEncoder)
        encoder.standardize(torch.from_numpy(frames_ND))

    def encode_stream(self, name: str, stream: Frames) -> Tensor:
        """Encode the stacked frames of one stream: (B, T, P)."""
        is_valid_BT = valid_frames(stream.lengths_B, stream.values_BTD.shape[1])
        encoded_BTP: Tensor = self.encoders[name](stream.values_BTD.float(), is_valid_BT)
        return encoded_BTP

    def encode(
        self,
        streams: Mapping[str, Frames],
        *,
        is_missing: Mapping[str, Tensor] | None = None,
        is_encoded: bool = False,
    ) -> EncodedSpeech:
        """Encode and join the streams of B items.

        Each stream is encoded at its own length. The items get the lengths of the first stream present; another stream
        is cut, or padded with its last frame.

        Args:
            streams: stream -> stacked frames. An absent stream is missing.
            is_missing: stream -> (B,) bool, items that are treated as if they had no such stream.
            is_encoded: the streams are outputs of `encode_stream`.

        Raises:
            SettingError: a stream is missing in a network without fusion, or is unknown.
        """
        unknown = [name for name in streams if name not in self.stacks]
        if unknown or not streams or (self.fusion is None and len(streams) < len(self.stacks)):
            raise SettingError(f"expected the streams {', '.join(self.streams)}, got {', '.join(streams) or 'none'}")

        # The first stream decides the lengths; the others are cut or padded to them after their encoders.
        first = next(streams[name] for name in self.streams if name in streams)
        is_valid_BT = valid_frames(first.lengths_B, first.values_BTD.shape[1])
        encoded = {}
        for name, stream in streams.items():
            values_BTP = stream.values_BTD.float() if is_encoded else self.encode_stream(name, stream)
            encoded[name] = values_BTP if stream is first else _with_lengths(values_BTP, stream.lengths_B, is_valid_BT)

        if self.fusion is None:
            return EncodedSpeech(next(iter(encoded.values())), is_valid_BT)
        return EncodedSpeech(self.fusion(encoded, is_valid_BT, is_missing), is_valid_BT)

    def ctc_log_probs(self, encoded: EncodedSpeech) -> Tensor:
        """Compute the log-probability of each symbol in each frame: (B, T, C) float32."""
        logits_BTC: Tensor = self.ctc(encoded.frames_BTP)
        return logits_BTC.float().log_softmax(dim=-1)

    def output_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        """Return the outputs that `embedcache derive --run` offers: `audio-states` and `video-states`."""
        del shapes
        return {f"{name}-states": (-1, self.width) for name in self.streams}

    def output_sides(self, name: str) -> Sequence[str]:
        """Return the streams that an output is computed from."""
        return [name.removesuffix("-states")]

    def output_axis(self, name: str, axes: Sequence[Axis | None]) -> Axis | None:
        """Return the axis of the frames of an output, which are the stacked frames of its stream."""
        stack = self.stacks[name.removesuffix("-states")]
        axis = axes[0]
        if axis is None or axis.rate_hz is None:
            return None

        middle_s = (axis.start_s or 0.0) + (stack - 1) / 2 / axis.rate_hz
        return Axis(kind="time", rate_hz=axis.rate_hz / stack, start_s=middle_s)

    def compute_outputs(self, inputs: Sequence[Any], names: Sequence[str]) -> Mapping[str, Any]:
        """Encode one stream of B items, one at a time because their lengths differ.

        Args:
            inputs: one `embedcache.derive.rules.Block`, of the feature of that stream.
            names: outputs.
        """
        outputs: dict[str, list[Floats]] = {}
        for name, block in zip(names, inputs, strict=True):
            stream = name.removesuffix("-states")
            outputs[name] = [self._encode_item(stream, item) for item in block.items()]
        return outputs

    @torch.no_grad()
    def _encode_item(self, stream: str, values_TD: np.ndarray) -> Floats:
        device = next(self.parameters()).device
        stacked_TD = torch.from_numpy(stack_frames(np.asarray(values_TD, np.float32), self.stacks[stream])).to(device)
        lengths_1 = torch.tensor([len(stacked_TD)], device=device)
        states: Floats = self.encode_stream(stream, Frames(stacked_TD[None], lengths_1))[0].cpu().numpy()
        return states


def load_network(run_path: Path | str, *, device: str = "cpu") -> tuple[SpeechNetwork, Run]:
    """Load a run of `pipelines.avsr.train.train_speech`, in evaluation mode.

    Raises:
        PathError: the folder is not a finished run.
        DataError: the run is not a speech recognizer.
        CorruptError: the weights have other bytes than were written.
    """
    run = Run.open(run_path, kind=KIND, device=device)
    network = run.module
    assert isinstance(network, SpeechNetwork)
    return network, run


def _with_lengths(values_BTP: Tensor, lengths_B: Tensor, is_valid_BT: Tensor) -> Tensor:
    """Cut each item to T frames, or pad it with its last frame."""
    frames_BT = torch.arange(is_valid_BT.shape[1], device=lengths_B.device).minimum(lengths_B[:, None] - 1)
    return values_BTP.gather(1, frames_BT[..., None].expand(-1, -1, values_BTP.shape[-1]))


def stack_frames(values_TD: np.ndarray, stack: int) -> np.ndarray:
    """Concatenate consecutive frames: (T, D) -> (⌈T / stack⌉, stack · D); the last frame fills the last row."""
    padding = np.repeat(values_TD[-1:], -len(values_TD) % stack, axis=0)
    return np.concatenate([values_TD, padding]).reshape(-1, stack * values_TD.shape[1])


@torch.no_grad()
def recognize(network: SpeechNetwork, encoded: EncodedSpeech, decoding: Decoding | None = None) -> list[Hypothesis]:
    """Return the best hypothesis of each of B encoded utterances.

    The score of CTC's best path is the log-probability of its transcript, summed over all paths.
    """
    decoding = decoding or Decoding()

    lengths_B = encoded.is_valid_BT.sum(dim=1)
    if decoding.decoder == "ctc":
        log_probs_BTC = network.ctc_log_probs(encoded)
        best_paths = decode_ctc(log_probs_BTC, lengths_B)
        scores = _score_ctc(log_probs_BTC, lengths_B, best_paths)
        return [Hypothesis(symbols, score, score, None) for symbols, score in zip(best_paths, scores, strict=True)]

    steps = network.attention.steps(*encoded)
    if decoding.decoder == "attention":
        return decode_attention(steps, lengths_B, num_symbols=len(SYMBOLS))
    return decode_hybrid(
        network.ctc_log_probs(encoded), lengths_B, steps, ctc_weight=decoding.ctc_weight, beam=decoding.beam
    )


def _score_ctc(log_probs_BTC: Tensor, lengths_B: Tensor, transcripts: Sequence[Ints]) -> list[float]:
    """Return the log-probability of each transcript. CTC's probability of END counts as blank, as in decoding."""
    folded_BTC = log_probs_BTC.double().clone()
    folded_BTC[..., BLANK] = torch.logaddexp(folded_BTC[..., BLANK], folded_BTC[..., END])

    losses_B = ctc_loss(
        folded_BTC.transpose(0, 1),
        torch.from_numpy(np.concatenate(transcripts)).to(folded_BTC.device),
        lengths_B,
        torch.tensor([len(symbols) for symbols in transcripts], device=folded_BTC.device),
        blank=BLANK,
        reduction="none",
    )
    return [-loss for loss in losses_B.tolist()]


def to_text(symbols: Ints) -> str:
    """Return the symbols of a hypothesis as text, with one space between words and none at the ends."""
    return " ".join(decode_symbols(symbols).split())


def check_decoder(training: Mapping[str, Any], decoding: Decoding) -> None:
    """Check that the heads of a decoder had a weight in the loss.

    Args:
        training: settings of the run.
        decoding: the decoder.

    Raises:
        SettingError: a head had no weight.
    """
    trained_weight = training["ctc_weight"]

    # A hybrid decoder with all weight on one head does not use the other.
    needs_ctc = decoding.decoder == "ctc" or (decoding.decoder == "hybrid" and decoding.ctc_weight > 0)
    needs_attention = decoding.decoder == "attention" or (decoding.decoder == "hybrid" and decoding.ctc_weight < 1)

    if (needs_ctc and trained_weight == 0) or (needs_attention and trained_weight == 1):
        trained = "ctc" if trained_weight else "attention"
        raise SettingError(
            f"decoder: the run was trained with ctc_weight {trained_weight:g}: expected {trained}, got "
            f"{decoding.decoder}"
        )
