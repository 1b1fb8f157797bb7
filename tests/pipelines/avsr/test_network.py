"""The network of speech recognition: sequences, fusion, attention, losses, and what its decoders find."""

from collections.abc import Mapping
from string import ascii_uppercase, digits
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedcache.errors import DataError
from embedcache.train.batches import Batch, BatchInput
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.layers import MaskedNorm
from pipelines.avsr.network import EncodedSpeech, Frames, SpeechNetwork, recognize
from pipelines.avsr.train import SpeechObjective, SpeechTargets, pad_transcripts
from pipelines.avsr.transcripts import END, decode_symbols, encode_transcript
from pipelines.sequence import valid_frames

STREAMS: Mapping[str, Mapping[str, int]] = {"audio": {"width": 6, "stack": 2}, "video": {"width": 5, "stack": 1}}
SMALL: Mapping[str, Any] = {"width": 16, "num_layers": 1, "decoder_layers": 1, "num_heads": 2, "feed_forward": 32}
LENGTHS = torch.tensor([7, 4, 9])
TEXTS = ("BIN", "AT 2", "O")
DECODERS = ("ctc", "attention", "hybrid")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def network(*, names: tuple[str, ...] = ("audio", "video"), **options: Any) -> SpeechNetwork:
    streams = {name: STREAMS[name] for name in names}
    return SpeechNetwork(streams=streams, **{**SMALL, "fusion_layers": len(names) - 1, **options}).eval()


def inputs(*, names: tuple[str, ...] = ("audio", "video"), lengths_B: torch.Tensor = LENGTHS) -> dict[str, Frames]:
    shape = (len(lengths_B), int(lengths_B.max()))
    return {n: Frames(torch.randn(*shape, STREAMS[n]["width"] * STREAMS[n]["stack"]), lengths_B) for n in names}


def batch(streams: Mapping[str, Frames]) -> Batch:
    symbols, lengths = pad_transcripts([encode_transcript(text) for text in TEXTS])
    return Batch(
        samples=np.arange(len(TEXTS)),
        num_samples=len(TEXTS),
        inputs={name: BatchInput(*frames) for name, frames in streams.items()},
        targets=SpeechTargets(torch.from_numpy(symbols), torch.from_numpy(lengths)),
    )


def test_masked_norm_is_layer_norm_over_valid_frames_and_channels() -> None:
    values = torch.randn(3, 9, 5)
    normed = MaskedNorm()(values, valid_frames(LENGTHS, 9))
    for row, length in enumerate(LENGTHS.tolist()):
        expected = nn.functional.layer_norm(values[row, :length], (length, 5))
        torch.testing.assert_close(normed[row, :length], expected)
        assert not normed[row, length:].any()


@pytest.mark.parametrize("kind", ["concat", "gated"])
def test_padding_changes_nothing(kind: str) -> None:
    module, streams = network(fusion=kind), inputs()
    together = module.encode(streams)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = module.encode({n: Frames(v[row : row + 1, :length], k[row : row + 1]) for n, (v, k) in streams.items()})
        torch.testing.assert_close(together.frames_BTP[row, :length], alone.frames_BTP[0], atol=1e-5, rtol=1e-4)
        probs = module.ctc_log_probs(together)[row, :length]
        torch.testing.assert_close(probs, module.ctc_log_probs(alone)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["concat", "gated"])
def test_an_absent_stream_is_a_missing_one(kind: str) -> None:
    module, streams = network(fusion=kind), inputs()
    is_missing = {"video": torch.ones(3, dtype=torch.bool)}
    dropped = module.encode(streams, is_missing=is_missing).frames_BTP
    alone = module.encode({"audio": streams["audio"]}).frames_BTP
    is_valid = valid_frames(LENGTHS, 9)
    torch.testing.assert_close(dropped[is_valid], alone[is_valid])
    assert not torch.allclose(dropped[is_valid], module.encode(streams).frames_BTP[is_valid])


def test_the_loss_is_that_of_its_docstring() -> None:
    module, streams = network(), inputs()
    loaded = batch(streams)
    encoded = module.encode(streams)
    log_probs = module.ctc_log_probs(encoded)
    ctc, uniform, nll, mean = [], [], [], []
    for row, text in enumerate(TEXTS):
        target, length = torch.from_numpy(encode_transcript(text)), int(LENGTHS[row])
        lengths = torch.tensor(length), torch.tensor(len(target))
        loss = nn.CTCLoss(reduction="sum")(log_probs[row, :length], target, *lengths)
        ctc.append(loss / len(target))
        uniform += [-log_probs[row, :length].flatten()]
        prefix = torch.cat([torch.tensor([END]), target])[None]
        frames = encoded.frames_BTP[row : row + 1, :length], encoded.is_valid_BT[row : row + 1, :length]
        following = module.attention(prefix, *frames)[0].log_softmax(dim=-1)
        nll.append(-following[torch.arange(len(target) + 1), torch.cat([target, torch.tensor([END])])])
        mean.append(-following.mean(dim=-1))
    of_ctc = 0.99 * torch.stack(ctc).mean() + 0.01 * torch.cat(uniform).mean()
    of_attention = 0.99 * torch.cat(nll).mean() + 0.01 * torch.cat(mean).mean()
    torch.testing.assert_close(SpeechObjective(module).loss(loaded), 0.2 * of_ctc + 0.8 * of_attention)
    torch.testing.assert_close(SpeechObjective(module, ctc_weight=1).loss(loaded), of_ctc)
    torch.testing.assert_close(SpeechObjective(module, ctc_weight=0).loss(loaded), of_attention)


@pytest.fixture
def module() -> SpeechNetwork:
    return network()


def encode(module: SpeechNetwork) -> EncodedSpeech:
    with torch.no_grad():
        return module.encode(inputs())


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_utterance_is_recognized_the_same_alone(module: SpeechNetwork, decoder: Any) -> None:
    encoded, decoding = encode(module), Decoding(decoder=decoder)
    for number, (hypothesis, length) in enumerate(zip(recognize(module, encoded, decoding), LENGTHS, strict=True)):
        one = EncodedSpeech(*(values[number : number + 1, :length] for values in encoded))
        (alone,) = recognize(module, one, decoding)
        assert alone.symbols.tolist() == hypothesis.symbols.tolist()
        assert alone.score == pytest.approx(hypothesis.score, abs=1e-4)


def test_symbols_have_stored_numbers() -> None:
    """Trained heads depend on the order, so it never changes."""
    text = f"{ascii_uppercase}{digits}'"
    assert encode_transcript(text).tolist() == list(range(2, 39))
    assert encode_transcript(" a\ta").tolist() == [2, 1, 2]
    assert decode_symbols([0, *range(2, 39), END, 4]) == text
    with pytest.raises(DataError, match="got ','"):
        encode_transcript("so, yes")
