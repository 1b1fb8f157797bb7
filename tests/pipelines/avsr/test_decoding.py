"""Beam search against exhaustive search and plain beam searches; batches against single items."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.avsr.attention import AttentionDecoder
from pipelines.avsr.decoding import decode_attention, decode_hybrid
from pipelines.sequence import LayerSizes
from tests.pipelines.avsr.oracles import (
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
