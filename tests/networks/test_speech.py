"""The network of speech recognition: sequences, fusion, attention, losses, and what its decoders find."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embedcache.derive.rules import Block
from embedcache.errors import SettingError
from embedcache.networks.ctc import CtcPrefixes
from embedcache.networks.decoding import decode_hybrid
from embedcache.networks.sequence import FrameAdapter, Fusion, MaskedNorm, sinusoids, valid_frames
from embedcache.networks.settings import DecodingSettings
from embedcache.networks.speech import (
    PAPER,
    EncodedSpeech,
    Frames,
    SpeechBatch,
    SpeechNetwork,
    SpeechObjective,
    check_decoder,
    pad_transcripts,
    recognize,
    stack_frames,
    to_text,
)
from embedcache.networks.transcripts import END, SYMBOLS, encode_transcript

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


def batch(streams: Mapping[str, Frames], **options: Any) -> SpeechBatch:
    targets, lengths = pad_transcripts([encode_transcript(text) for text in TEXTS])
    return SpeechBatch(streams, torch.from_numpy(targets), torch.from_numpy(lengths), **options)


def test_masked_norm_is_layer_norm_over_valid_frames_and_channels() -> None:
    values = torch.randn(3, 9, 5)
    normed = MaskedNorm()(values, valid_frames(LENGTHS, 9))
    for row, length in enumerate(LENGTHS.tolist()):
        expected = nn.functional.layer_norm(values[row, :length], (length, 5))
        torch.testing.assert_close(normed[row, :length], expected)
        assert not normed[row, length:].any()


def test_a_layer_on_stacked_frames_is_a_strided_convolution() -> None:
    values = torch.randn(8, 6)
    adapter, convolution = FrameAdapter(12, 16), nn.Conv1d(6, 16, 2, stride=2)
    with torch.no_grad():
        convolution.weight.copy_(adapter.first.weight.view(16, 2, 6).transpose(1, 2))
        convolution.bias.copy_(adapter.first.bias)  # type: ignore[union-attr]
    stacked = torch.from_numpy(stack_frames(values.numpy(), 2))
    torch.testing.assert_close(adapter.first(stacked), convolution(values.T[None])[0].T)


def test_stacking_repeats_the_last_frame() -> None:
    assert stack_frames(np.arange(5)[:, None], 2).tolist() == [[0, 1], [2, 3], [4, 4]]


def test_positions_match_the_formula() -> None:
    positions = sinusoids(4, 6)
    assert positions[3, 2].item() == pytest.approx(np.sin(3 / 10_000 ** (2 / 6)), abs=1e-6)
    assert positions[3, 5].item() == pytest.approx(np.cos(3 / 10_000 ** (4 / 6)), abs=1e-6)


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


def test_one_item_misses_a_stream_alone() -> None:
    module, streams = network(), inputs()
    partly = module.encode(streams, is_missing={"audio": torch.tensor([False, True, False])}).frames_BTP
    whole = module.encode(streams).frames_BTP
    torch.testing.assert_close(partly[0], whole[0])
    assert not torch.allclose(partly[1, :4], whole[1, :4])


def test_the_gate_weighs_streams_and_gives_a_missing_one_nothing() -> None:
    fusion = network(fusion="gated").fusion
    assert isinstance(fusion, Fusion)
    parts, gone = [torch.randn(3, 9, 16), torch.randn(3, 9, 16)], torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()
    weights = fusion.weights(parts, valid_frames(LENGTHS, 9), gone)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 9))
    assert weights[0, :, 1].abs().max() == 0
    assert weights[1, :, 0].abs().max() == 0
    assert weights[2].min() > 0


def test_streams_of_other_lengths_follow_the_first() -> None:
    module, streams = network(), inputs()
    shorter = Frames(streams["video"].values_BTD[:, :7], torch.tensor([6, 4, 7]))
    encoded = module.encode({**streams, "video": shorter})
    assert encoded.is_valid_BT.sum(dim=1).tolist() == LENGTHS.tolist()
    assert encoded.frames_BTP.isfinite().all()


def test_derived_states_replace_the_encoders() -> None:
    module, streams = network(fusion="gated"), inputs(lengths_B=torch.tensor([7, 7, 7]))
    states = {}
    for name, (values, lengths) in streams.items():
        raw = values.numpy().reshape(3, -1, STREAMS[name]["width"])
        block = Block(raw.reshape(-1, raw.shape[-1]), np.full(3, raw.shape[1]))
        outputs = module.compute_outputs([block], [f"{name}-states"])
        states[name] = Frames(torch.from_numpy(np.stack(outputs[f"{name}-states"])), lengths)
        assert module.output_sides(f"{name}-states") == [name]
    torch.testing.assert_close(module.encode(states, is_encoded=True)[0], module.encode(streams)[0], atol=1e-5, rtol=0)


def test_decoding_step_by_step_equals_the_whole_transcript() -> None:
    module, streams = network(), inputs()
    encoded = module.encode(streams)
    symbols = torch.randint(1, END, (3, 6))
    symbols[:, 0] = END
    expected = module.attention(symbols, *encoded).log_softmax(dim=-1)
    steps, parents = module.attention.steps(*encoded), torch.arange(3)
    for position in range(6):
        torch.testing.assert_close(steps(symbols[:, position], parents), expected[:, position], atol=1e-5, rtol=1e-4)


def test_hypotheses_may_be_reordered_and_doubled() -> None:
    module = network()
    encoded = module.encode(inputs())
    steps = module.attention.steps(*encoded)
    steps(torch.full((3,), END), torch.arange(3))
    steps(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 0, 2, 1]))
    found = steps(torch.tensor([9, 3]), torch.tensor([3, 1]))
    for row, (item, prefix) in enumerate([(1, [END, 8, 9]), (0, [END, 6, 3])]):
        frames = encoded.frames_BTP[item : item + 1], encoded.is_valid_BT[item : item + 1]
        expected = module.attention(torch.tensor([prefix]), *frames)[0, -1].log_softmax(dim=-1)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_a_later_symbol_does_not_change_an_earlier_one() -> None:
    module = network()
    encoded = module.encode(inputs())
    symbols = torch.randint(1, END, (3, 6))
    changed = symbols.clone()
    changed[:, 4:] = 1
    before, after = module.attention(symbols, *encoded), module.attention(changed, *encoded)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


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
    torch.testing.assert_close(SpeechObjective(module)(loaded), 0.2 * of_ctc + 0.8 * of_attention)
    torch.testing.assert_close(SpeechObjective(module, ctc_weight=1)(loaded), of_ctc)
    torch.testing.assert_close(SpeechObjective(module, ctc_weight=0)(loaded), of_attention)


def test_a_transcript_that_does_not_fit_into_its_frames_has_no_loss_and_no_nan() -> None:
    streams = inputs(lengths_B=torch.tensor([1, 1, 1]))
    loss = SpeechObjective(network().train(), ctc_weight=1)(batch(streams))
    loss.backward()
    assert loss.isfinite()


def test_parts_hold_every_parameter_once() -> None:
    module = network()
    assert list(module.parts()) == ["audio", "video", "fusion", "ctc", "attention"]
    for name, _ in module.named_parameters():
        assert sum(name.startswith(f"{path}.") for paths in module.parts().values() for path in paths) == 1


def test_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        streams = {"audio": {"width": 1024, "stack": 2}, "video": {"width": 2048, "stack": 1}}
        module = SpeechNetwork(streams=streams, **PAPER)
    assert len(module.encoders["audio"].transformer.layers.layers) == 6  # type: ignore[union-attr, arg-type]
    assert module.attention.readout.linears[-1].out_features == len(SYMBOLS) == 40


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "got none"), (("points",), "expected the streams audio, got points")],
)
def test_unknown_streams_are_refused(names: tuple[str, ...], message: str) -> None:
    streams = {name: Frames(torch.zeros(1, 2, 12), torch.tensor([2])) for name in names}
    with pytest.raises(SettingError, match=message):
        network(names=("audio",)).encode(streams)


def test_widths_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(SettingError, match="multiple of 4, got .* 18"):
        network(width=18)


@pytest.mark.parametrize("name", ["num_layers", "fusion_layers", "decoder_layers"])
def test_two_streams_without_layers_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}: expected at least 1, got 0; streams: audio, video"):
        network(**{name: 0})


def test_an_unknown_fusion_is_refused() -> None:
    with pytest.raises(SettingError, match="concat or gated, got 'sum'"):
        network(fusion="sum")


@pytest.fixture
def module() -> SpeechNetwork:
    return network()


def encode(module: SpeechNetwork) -> EncodedSpeech:
    with torch.no_grad():
        return module.encode(inputs())


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_utterance_is_recognized_the_same_alone(module: SpeechNetwork, decoder: Any) -> None:
    encoded, decoding = encode(module), DecodingSettings(decoder=decoder)
    for number, (hypothesis, length) in enumerate(zip(recognize(module, encoded, decoding), LENGTHS, strict=True)):
        one = EncodedSpeech(*(values[number : number + 1, :length] for values in encoded))
        (alone,) = recognize(module, one, decoding)
        assert alone.symbols.tolist() == hypothesis.symbols.tolist()
        assert alone.score == pytest.approx(hypothesis.score, abs=1e-4)


def test_score_of_ctc_is_the_probability_of_the_transcript(module: SpeechNetwork) -> None:
    encoded = encode(module)
    log_probs = module.ctc_log_probs(encoded)
    for number, hypothesis in enumerate(recognize(module, encoded, DecodingSettings(decoder="ctc"))):
        prefixes = CtcPrefixes(log_probs[number : number + 1], LENGTHS[number : number + 1])
        for symbol in hypothesis.symbols.tolist():
            prefixes.extend(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[symbol]]))
        assert hypothesis.score == pytest.approx(float(prefixes.score_ends()), rel=1e-9)


@pytest.mark.parametrize(("ctc_weight", "beam"), [(0.1, 5), (0.7, 3), (0.0, 40), (1.0, 2)])
def test_hybrid_has_the_weight_and_the_beam_of_its_settings(
    module: SpeechNetwork, ctc_weight: float, beam: int
) -> None:
    encoded = encode(module)
    found = recognize(module, encoded, DecodingSettings(ctc_weight=ctc_weight, beam=beam))
    steps = module.attention.steps(*encoded)
    expected = decode_hybrid(module.ctc_log_probs(encoded), LENGTHS, steps, ctc_weight=ctc_weight, beam=beam)
    assert [best.score for best in found] == [best.score for best in expected]
    assert [best.symbols.tolist() for best in found] == [best.symbols.tolist() for best in expected]


def test_text_has_single_spaces() -> None:
    assert to_text(torch.tensor([1, 3, 1, 1, 4, 1]).numpy()) == "B C"
    assert to_text(encode_transcript("")) == ""


@pytest.mark.parametrize(
    ("ctc_weight", "decoding", "untrained"),
    [
        (0.0, DecodingSettings(decoder="ctc"), "ctc"),
        (0.0, DecodingSettings(), "ctc"),
        (0.0, DecodingSettings(ctc_weight=0), None),
        (0.0, DecodingSettings(decoder="attention"), None),
        (1.0, DecodingSettings(), "attention"),
        (1.0, DecodingSettings(ctc_weight=1), None),
        (0.2, DecodingSettings(), None),
    ],
)
def test_decoder_of_an_untrained_head_is_an_error(
    ctc_weight: float, decoding: DecodingSettings, untrained: str | None
) -> None:
    if untrained is None:
        check_decoder({"ctc_weight": ctc_weight}, decoding)
        return
    with pytest.raises(SettingError, match=f"so its {untrained} part is untrained"):
        check_decoder({"ctc_weight": ctc_weight}, decoding)
