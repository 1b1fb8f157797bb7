"""Beam search against exhaustive search and plain beam searches; batches against single items."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.errors import DataError, SettingError
from embedcache.networks.attention import AttentionDecoder
from embedcache.networks.decoding import decode_attention, decode_hybrid
from embedcache.networks.sequence import LayerSizes
from tests.networks.speech_oracles import (
    Decoder,
    log,
    plain_beam,
    prefix_log_probs,
    random_log_probs,
    transcript_probs,
)

SEEDS = st.integers(0, 2**32 - 1)
WEIGHTS = (0.0, 0.1, 0.5, 1.0)


def mixed(ctc: float, attention: float, weight: float) -> float:
    return (weight * ctc if weight else 0.0) + ((1 - weight) * attention if weight < 1 else 0.0)


@pytest.mark.slow
@settings(max_examples=40)
@given(SEEDS, st.integers(1, 4), st.integers(1, 2), st.sampled_from(WEIGHTS), st.sampled_from([0.0, 0.3]))
def test_wide_beam_is_exact(seed: int, num_frames: int, num_letters: int, weight: float, zeros: float) -> None:
    log_probs = random_log_probs(np.random.default_rng(seed), num_frames, num_letters + 2, zeros=zeros)
    decoder = Decoder(num_letters + 2, seed, zeros=zeros)
    probs = transcript_probs(log_probs)
    scores = {
        text: mixed(log(probs.get(text, 0.0)), decoder.log_prob(0, text), weight)
        for length in range(num_frames + 1)
        for text in itertools.product(range(1, num_letters + 1), repeat=length)
    }
    (found,) = decode_hybrid(log_probs[None], torch.tensor([num_frames]), decoder, ctc_weight=weight, beam=2**4)
    assert found.score == pytest.approx(max(scores.values()), abs=1e-9)
    symbols = tuple(found.symbols.tolist())
    assert scores[symbols] == pytest.approx(found.score, abs=1e-9)
    assert (found.ctc_score is None) == (weight == 0)
    assert (found.attention_score is None) == (weight == 1)
    if found.score > -math.inf and weight not in (0, 1):
        assert found.ctc_score == pytest.approx(log(probs[symbols]), abs=1e-9)
        assert found.attention_score == pytest.approx(decoder.log_prob(0, symbols), abs=1e-9)


@pytest.mark.slow
@settings(max_examples=25)
@given(SEEDS, st.integers(1, 8), st.integers(1, 4), st.sampled_from(WEIGHTS))
def test_narrow_beam_is_the_plain_beam(seed: int, num_frames: int, beam: int, weight: float) -> None:
    """The plain search scores each prefix from scratch and runs to the longest length."""
    log_probs, letters = random_log_probs(np.random.default_rng(seed), num_frames, 5), (1, 2, 3)
    decoder = Decoder(5, seed)

    @cache
    def ctc(prefix: tuple[int, ...]) -> tuple[float, float]:
        return prefix_log_probs(log_probs, prefix)

    @cache
    def attention(prefix: tuple[int, ...]) -> float:
        return attention(prefix[:-1]) + decoder.next_log_probs(0, prefix[:-1])[prefix[-1]].item() if prefix else 0.0

    expected, score = plain_beam(
        lambda prefix: mixed(ctc(prefix)[0], attention(prefix), weight),
        lambda prefix: mixed(ctc(prefix)[1], attention((*prefix, 4)), weight),
        letters,
        beam=beam,
        cap=num_frames,
    )
    (found,) = decode_hybrid(log_probs[None], torch.tensor([num_frames]), decoder, ctc_weight=weight, beam=beam)
    assert tuple(found.symbols.tolist()) == expected
    assert found.score == pytest.approx(score, abs=1e-9)


def test_beams_of_tests_differ_from_greedy() -> None:
    """The random problems above have long transcripts that a beam of 1 does not find."""
    log_probs, lengths = random_log_probs(np.random.default_rng(0), 40, 8, 5), torch.full((40,), 8)
    narrow, wide = (decode_hybrid(log_probs, lengths, Decoder(5, 0), beam=beam) for beam in (1, 4))
    assert np.mean([len(hypothesis.symbols) for hypothesis in wide]) > 2.5
    assert sum(one.symbols.tolist() != four.symbols.tolist() for one, four in zip(narrow, wide, strict=True)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_equals_one_by_one(weight: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    log_probs = random_log_probs(rng, 12, 20, 6, zeros=0.1).to(dtype)
    lengths = torch.from_numpy(rng.integers(1, 21, 12))
    for row, length in zip(log_probs, lengths, strict=True):
        row[length:] = torch.nan
    together = decode_hybrid(log_probs, lengths, Decoder(6, 1), ctc_weight=weight, beam=3)
    for item, length in enumerate(lengths.tolist()):
        decoder = Decoder(6, 1, items=[item])
        (alone,) = decode_hybrid(log_probs[[item], :length], lengths[[item]], decoder, ctc_weight=weight, beam=3)
        assert together[item].symbols.tolist() == alone.symbols.tolist()
        assert together[item].score == pytest.approx(alone.score, abs=1e-9)
        symbols = tuple(alone.symbols.tolist())
        ctc = prefix_log_probs(log_probs[item, :length].double(), symbols)[1]
        parts = mixed(ctc, decoder.log_prob(item, symbols), weight)
        assert alone.score == pytest.approx(parts, abs=1e-9)
    assert len({len(hypothesis.symbols) for hypothesis in together}) > 4


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_items_with_few_hypotheses_beside_items_with_many(weight: float) -> None:
    """One item allows a single letter, so most of its beam is empty while the other item fills its own."""
    log_probs = torch.tensor([[[0.6, 0.4, 0.0, 0.0, 0.0]] * 5, [[0.1, 0.3, 0.3, 0.3, 0.0]] * 5]).double().log()
    lengths = torch.tensor([5, 5])
    together = decode_hybrid(log_probs, lengths, Decoder(5, 0), ctc_weight=weight, beam=6)
    for item in range(2):
        decoder = Decoder(5, 0, items=[item])
        (alone,) = decode_hybrid(log_probs[[item]], lengths[[item]], decoder, ctc_weight=weight, beam=6)
        assert together[item].symbols.tolist() == alone.symbols.tolist()
        assert together[item].score == pytest.approx(alone.score, abs=1e-9)
    assert set(together[0].symbols) <= {1}


def test_attention_scores_are_those_of_the_whole_transcript() -> None:
    """The decoder's cached steps, as the beam reorders them, add up to one pass over the transcript."""
    torch.manual_seed(0)
    decoder = AttentionDecoder(16, 6, 2, LayerSizes(num_heads=2, feed_forward=16, dropout=0.0)).eval()
    frames, lengths = torch.randn(4, 9, 16), torch.tensor([9, 6, 3, 8])
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)  # an untrained decoder is the same for all prefixes
    is_valid = torch.arange(9) < lengths[:, None]
    log_probs = random_log_probs(np.random.default_rng(0), 4, 9, 6, stop=-9)
    found = decode_hybrid(log_probs, lengths, decoder.steps(frames, is_valid), ctc_weight=0.9, beam=4)
    assert max(len(hypothesis.symbols) for hypothesis in found) > 3
    for item, hypothesis in enumerate(found):
        symbols = torch.tensor([5, *hypothesis.symbols.tolist(), 5])
        with torch.no_grad():
            logits = decoder(symbols[None, :-1], frames[[item]], is_valid[[item]])
        score = logits[0].log_softmax(dim=1).gather(1, symbols[1:, None]).sum().item()
        assert hypothesis.attention_score == pytest.approx(score, abs=1e-4)


def test_ctc_alone_never_calls_the_decoder() -> None:
    log_probs = random_log_probs(np.random.default_rng(0), 2, 6, 4)
    decoder = Decoder(4, 0)
    with_decoder = decode_hybrid(log_probs, torch.tensor([6, 5]), decoder, ctc_weight=1)
    assert not decoder.sizes
    without = decode_hybrid(log_probs, torch.tensor([6, 5]), None, ctc_weight=1)
    assert [h.symbols.tolist() for h in with_decoder] == [h.symbols.tolist() for h in without]


def test_attention_alone_reads_only_lengths() -> None:
    lengths = torch.tensor([6, 5])
    found = [
        decode_hybrid(random_log_probs(np.random.default_rng(seed), 2, 6, 4), lengths, Decoder(4, 0), ctc_weight=0)
        for seed in (0, 1)
    ]
    assert [h.symbols.tolist() for h in found[0]] == [h.symbols.tolist() for h in found[1]]


def certain_decoder(texts: list[list[int]], num_symbols: int) -> tuple[Decoder, list[int]]:
    """Return a decoder that is nearly certain of one transcript per item."""
    decoder = Decoder(num_symbols, 0)

    def next_log_probs(item: int, prefix: tuple[int, ...]) -> torch.Tensor:
        symbols = (*texts[item], num_symbols - 1)
        logits = torch.zeros(num_symbols, dtype=torch.float64)
        logits[symbols[min(len(prefix), len(symbols) - 1)]] = 12.0
        return logits.log_softmax(dim=0)

    decoder.next_log_probs = next_log_probs  # type: ignore[method-assign]
    return decoder, decoder.sizes


def test_search_stops_when_nothing_can_win() -> None:
    """A decoder that is certain is asked once per symbol and END, and no longer for items that are finished."""
    texts = [[1, 2, 2, 1], [2], []]
    decoder, sizes = certain_decoder(texts, 4)
    log_probs = torch.full((3, 50, 4), 0.25, dtype=torch.float64).log()
    found = decode_hybrid(log_probs, torch.tensor([50, 50, 50]), decoder, ctc_weight=0, beam=5)
    assert [hypothesis.symbols.tolist() for hypothesis in found] == texts
    assert len(sizes) == 5
    assert sizes[0] == 3
    assert sizes[-1] == 1


def test_longest_length_ends_a_transcript() -> None:
    texts = [[1] * 30]
    log_probs, lengths = torch.full((1, 8, 3), 1 / 3).log(), torch.tensor([8])
    for max_length, expected in ((None, 8), (5, 5), (20, 8)):
        decoder, sizes = certain_decoder(texts, 3)
        (found,) = decode_hybrid(log_probs, lengths, decoder, ctc_weight=0, beam=1, max_length=max_length)
        # Ending early costs as much as ending at the longest length; the shorter transcript wins.
        assert len(found.symbols) == 0
        assert len(sizes) == expected + 1
    decoder, _ = certain_decoder(texts, 3)
    (found,) = decode_attention(decoder, lengths, num_symbols=3)
    assert found.symbols.tolist() == [1] * 8
    assert found.score == pytest.approx(-12, abs=1e-3)


def test_equal_scores_prefer_short_and_low() -> None:
    log_probs = torch.tensor([[[0.2, 0.0, 0.4, 0.4, 0.0]]]).log()
    for weight in (0.1, 1.0):
        decoder, _ = certain_decoder([[]], 5)
        decoder.next_log_probs = lambda item, prefix: torch.full((5,), 0.2).log()  # type: ignore[method-assign]
        (found,) = decode_hybrid(log_probs, torch.tensor([1]), decoder, ctc_weight=weight, beam=2)
        assert found.symbols.tolist() == ([2] if weight == 1 else [])
    uniform = torch.full((1, 3, 5), 0.2).log()
    (found,) = decode_hybrid(uniform, torch.tensor([3]), decoder, ctc_weight=0, beam=4)
    assert found.symbols.tolist() == []


def test_impossible_transcripts_score_minus_infinity() -> None:
    """Letters that CTC forbids and a decoder that never ends leave no transcript."""
    log_probs = torch.tensor([[[0.0, -math.inf, -math.inf]] * 4])
    decoder, _ = certain_decoder([[]], 3)
    decoder.next_log_probs = lambda item, prefix: torch.tensor([-math.inf, 0.0, -math.inf])  # type: ignore[method-assign]
    (found,) = decode_hybrid(log_probs, torch.tensor([4]), decoder)
    assert found.score == -math.inf
    assert found.symbols.tolist() == []


@pytest.mark.slow
@settings(max_examples=40)
@given(SEEDS, st.integers(1, 5), st.sampled_from([0.0, 0.3]))
def test_greedy_takes_the_best_symbol_each_time(seed: int, num_items: int, zeros: float) -> None:
    lengths = torch.from_numpy(np.random.default_rng(seed).integers(1, 9, num_items))
    decoder = Decoder(5, seed, zeros=zeros)
    found = decode_attention(Decoder(5, seed, zeros=zeros), lengths, num_symbols=5)
    for item, length in enumerate(lengths.tolist()):
        prefix: tuple[int, ...] = ()
        while len(prefix) < length:
            log_probs = decoder.next_log_probs(item, prefix)[1:]
            symbol = 1 + int(log_probs.argmax())
            if symbol == 4 or log_probs.max() == -math.inf:
                break
            prefix = (*prefix, symbol)
        assert tuple(found[item].symbols.tolist()) == prefix
        assert found[item].score == pytest.approx(decoder.log_prob(item, prefix), abs=1e-9)


def test_no_items_give_no_hypotheses() -> None:
    none, lengths = torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.int64)
    assert decode_hybrid(none, lengths, None, ctc_weight=1) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctc_weight": 1.5}, "ctc_weight: expected a number from 0 to 1, got 1.5"),
        ({"ctc_weight": 1, "beam": 0}, "of at least 1, got 0 and None"),
        ({"ctc_weight": 1, "max_length": 0}, "of at least 1, got 5 and 0"),
        ({"ctc_weight": 0.5}, "expected an attention decoder for ctc_weight=0.5, got none"),
    ],
)
def test_invalid_settings_raise(options: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        decode_hybrid(torch.zeros(1, 2, 3), torch.tensor([2]), None, **options)  # type: ignore[arg-type]


def test_decoder_of_other_symbols_raises() -> None:
    with pytest.raises(DataError, match=r"expected log-probabilities of shape \(1, 3\), got \(1, 4\)"):
        decode_hybrid(torch.zeros(1, 2, 3), torch.tensor([2]), lambda symbols_N, parents_N: torch.zeros(1, 4))
