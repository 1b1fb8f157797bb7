"""Recognition by the three decoders: what they find, and heads that were not trained."""

from typing import Any

import pytest
import torch

from embedcache.errors import SettingError
from embedcache.networks.ctc import CtcPrefixes
from embedcache.networks.decoding import decode_hybrid
from embedcache.networks.recognition import check_decoder, recognize, to_text
from embedcache.networks.settings import DecodingSettings
from embedcache.networks.speech import EncodedSpeech, SpeechNetwork
from embedcache.networks.transcripts import encode_transcript
from tests.networks.test_speech import LENGTHS, inputs, network

DECODERS = ("ctc", "attention", "hybrid")


@pytest.fixture
def module() -> SpeechNetwork:
    torch.manual_seed(0)
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
