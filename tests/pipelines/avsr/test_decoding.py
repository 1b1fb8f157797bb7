"""Decoding and CTC against enumeration of all paths, plain searches and PyTorch's loss, and the errors of words."""

import doctest
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedcache.errors import DataError
from pipelines.avsr import edits
from pipelines.avsr.attention import AttentionDecoder
from pipelines.avsr.ctc import CtcPrefixes, WordTime, align_ctc, decode_ctc, word_times
from pipelines.avsr.decoding import decode_attention, decode_hybrid
from pipelines.avsr.edits import count_word_errors
from pipelines.avsr.transcripts import BLANK, SYMBOLS, encode_transcript
from pipelines.sequence import LayerSizes

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
    """The plain search scores each prefix from scratch, as the tests of prefixes check, to the longest length."""
    log_probs, letters = random_log_probs(np.random.default_rng(seed), num_frames, 5), (1, 2, 3)
    decoder = Decoder(5, seed)

    @cache
    def ctc(prefix: tuple[int, ...]) -> tuple[list[float], float]:
        prefixes = prefix_of(log_probs, prefix)
        return prefixes.score_extensions()[0, 0].tolist(), prefixes.score_ends().item()

    @cache
    def attention(prefix: tuple[int, ...]) -> float:
        return attention(prefix[:-1]) + decoder.next_log_probs(0, prefix[:-1])[prefix[-1]].item() if prefix else 0.0

    expected, score = plain_beam(
        lambda prefix: mixed(ctc(prefix[:-1])[0][prefix[-1]], attention(prefix), weight),
        lambda prefix: mixed(ctc(prefix)[1], attention((*prefix, 4)), weight),
        letters,
        beam=beam,
        cap=num_frames,
    )
    (found,) = decode_hybrid(log_probs[None], torch.tensor([num_frames]), decoder, ctc_weight=weight, beam=beam)
    assert tuple(found.symbols.tolist()) == expected
    assert found.score == pytest.approx(score, abs=1e-9)


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


Transcript = tuple[int, ...]


def random_log_probs(rng: np.random.Generator, *shape: int, zeros: float = 0.0, stop: float = -3.0) -> Tensor:
    """Return log-probabilities over the last axis, some of them -inf, never all.

    Blank and END have logits that are higher by `stop`: a negative one makes long transcripts probable.
    """
    logits = rng.normal(0, 2, shape)
    logits[..., [0, -1]] += stop
    is_zero = rng.random(shape) < zeros
    np.put_along_axis(is_zero, rng.integers(shape[-1], size=(*shape[:-1], 1)), values=False, axis=-1)
    return torch.from_numpy(np.where(is_zero, -np.inf, logits)).log_softmax(dim=-1)


def transcript_probs(log_probs_TC: Tensor) -> dict[Transcript, float]:
    """Return the probability of each transcript: the sum over all paths that read it, END being a blank."""
    end = log_probs_TC.shape[1] - 1
    probs: dict[Transcript, float] = defaultdict(float)
    for path in itertools.product(range(end + 1), repeat=len(log_probs_TC)):
        prob = math.prod(log_probs_TC[t, symbol].exp().item() for t, symbol in enumerate(path))
        probs[read(path, end)] += prob
    return probs


def read(path: Sequence[int], end: int) -> Transcript:
    """Return the transcript that a path reads."""
    merged = [symbol for symbol, _ in itertools.groupby(BLANK if symbol == end else symbol for symbol in path)]
    return tuple(symbol for symbol in merged if symbol != BLANK)


def log(prob: float) -> float:
    return math.log(prob) if prob > 0 else -math.inf


class Decoder:
    """A step decoder whose log-probabilities are random numbers that depend on the item and the symbols so far."""

    def __init__(self, num_symbols: int, seed: int, *, zeros: float = 0.0) -> None:
        self.num_symbols, self.seed, self.zeros = num_symbols, seed, zeros
        self.hypotheses: list[tuple[int, Transcript]] = []

    def next_log_probs(self, item: int, prefix: Transcript) -> Tensor:
        rng = np.random.default_rng([self.seed, item, *prefix])
        return random_log_probs(rng, self.num_symbols, zeros=self.zeros)

    def log_prob(self, item: int, transcript: Transcript) -> float:
        """Return the log-probability of a whole transcript, END included."""
        symbols = (*transcript, self.num_symbols - 1)
        return sum(self.next_log_probs(item, symbols[:n])[symbol].item() for n, symbol in enumerate(symbols))

    def __call__(self, symbols_N: Tensor, parents_N: Tensor) -> Tensor:
        children = list(zip(symbols_N.tolist(), parents_N.tolist(), strict=True))
        if not self.hypotheses:
            assert {symbol for symbol, _ in children} == {self.num_symbols - 1}
            self.hypotheses = [(parent, ()) for _, parent in children]
        else:
            assert all(BLANK < symbol < self.num_symbols - 1 for symbol, _ in children)
            parents = self.hypotheses
            self.hypotheses = [(parents[row][0], (*parents[row][1], symbol)) for symbol, row in children]
        return torch.stack([self.next_log_probs(*hypothesis) for hypothesis in self.hypotheses])


def plain_beam(
    score: Callable[[Transcript], float],
    complete_score: Callable[[Transcript], float],
    letters: Sequence[int],
    *,
    beam: int,
    cap: int,
) -> tuple[Transcript, float]:
    """Return the best completed hypothesis of a beam search to the longest length, without an early stop."""
    hypotheses: list[Transcript] = [()]
    best: tuple[Transcript, float] = ((), -math.inf)
    for _ in range(cap + 1):
        for hypothesis in hypotheses:
            if complete_score(hypothesis) > best[1]:
                best = hypothesis, complete_score(hypothesis)
        extensions = [(*hypothesis, letter) for hypothesis in hypotheses for letter in letters]
        hypotheses = sorted(extensions, key=score, reverse=True)[:beam]
    return best


def prefix_of(log_probs: torch.Tensor, symbols: tuple[int, ...]) -> CtcPrefixes:
    """Return the scorer of one item after some symbols."""
    prefixes = CtcPrefixes(log_probs[None], torch.tensor([len(log_probs)]))
    for symbol in symbols:
        prefixes.extend(torch.tensor([[0]]), torch.tensor([[symbol]]))
    return prefixes


@pytest.mark.slow
@settings(max_examples=30)
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.4]))
def test_prefix_scores_are_sums_over_paths(seed: int, num_frames: int, num_letters: int, zeros: float) -> None:
    log_probs = random_log_probs(np.random.default_rng(seed), num_frames, num_letters + 2, zeros=zeros)
    probs = transcript_probs(log_probs)
    for length in range(num_frames + 1):
        for prefix in itertools.product(range(1, num_letters + 1), repeat=length):
            prefixes = prefix_of(log_probs, prefix)
            assert prefixes.score_ends().item() == pytest.approx(log(probs.get(prefix, 0.0)), abs=1e-9)
            extended = prefixes.score_extensions()[0, 0]
            for letter in range(1, num_letters + 1):
                begins = (*prefix, letter)
                expected = sum(prob for text, prob in probs.items() if text[: length + 1] == begins)
                assert extended[letter].item() == pytest.approx(log(expected), abs=1e-9)
            assert extended[[0, -1]].tolist() == [-math.inf, -math.inf]


def ctc_loss(log_probs: Tensor, symbols: Sequence[int]) -> float:
    """Return PyTorch's loss of one item without padding."""
    sizes = (len(log_probs),), (len(symbols),)
    targets = torch.tensor([symbols], dtype=torch.int64)
    return torch.nn.functional.ctc_loss(log_probs[:, None], targets, *sizes, reduction="sum").item()


@pytest.mark.slow
@given(SEEDS, st.integers(1, 30), st.lists(st.integers(1, 5), max_size=12))
def test_transcript_score_is_ctc_loss(seed: int, num_frames: int, symbols: list[int]) -> None:
    log_probs = random_log_probs(np.random.default_rng(seed), num_frames, 6)
    without_end = torch.cat([log_probs, torch.full((num_frames, 1), -torch.inf)], dim=1)
    prefixes = prefix_of(without_end, tuple(symbols))
    assert prefixes.score_ends().item() == pytest.approx(-ctc_loss(log_probs, symbols), abs=1e-9)

    # What begins with a prefix is the prefix alone or begins with one of its extensions.
    begins = prefixes.score_extensions()[0, 0, 1:6]
    prefixes.extend(torch.zeros(1, 5, dtype=torch.int64), torch.arange(1, 6)[None])
    parts = torch.cat([prefixes.score_ends()[0, :, None], prefixes.score_extensions()[0]], dim=1)
    torch.testing.assert_close(begins, parts.logsumexp(dim=1), atol=1e-9, rtol=0)


def test_improbable_frames_of_a_long_item_stay_exact() -> None:
    """A second of near-impossible frames at each symbol would underflow in probabilities."""
    log_probs = random_log_probs(np.random.default_rng(0), 400, 6)
    log_probs[:, :-1] -= 30
    log_probs[:, -1] = -torch.inf
    symbols = (1, 2, 2, 3, 4, 1)
    loss = ctc_loss(log_probs[:, :-1], symbols)
    assert loss > 12_000
    assert prefix_of(log_probs, symbols).score_ends().item() == pytest.approx(-loss, rel=1e-12)


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 4), st.integers(1, 12))
def test_best_path_is_read(seed: int, num_items: int, num_frames: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs = random_log_probs(rng, num_items, num_frames, 4).float()
    lengths = torch.from_numpy(rng.integers(1, num_frames + 1, num_items))
    decoded = decode_ctc(log_probs, lengths)
    for item, length in enumerate(lengths.tolist()):
        frames = log_probs[item, :length].exp()
        frames[:, 0] += frames[:, -1]
        assert tuple(decoded[item].tolist()) == read(frames[:, :-1].argmax(dim=1).tolist(), 3)
        assert decoded[item].dtype == np.int64


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 5), st.lists(st.integers(1, 2), max_size=4), st.sampled_from([0.0, 0.3]))
def test_alignment_is_the_best_path(seed: int, num_frames: int, symbols: list[int], zeros: float) -> None:
    log_probs = random_log_probs(np.random.default_rng(seed), num_frames, 4, zeros=zeros)
    frames = log_probs.exp()
    frames[:, 0] += frames[:, -1]
    paths = [path for path in itertools.product(range(3), repeat=num_frames) if read(path, 3) == tuple(symbols)]
    scores = [math.prod(frames[t, symbol].item() for t, symbol in enumerate(path)) for path in paths]
    numbers = np.array(symbols, dtype=np.int64)
    if not any(scores):
        with pytest.raises(DataError, match="frames for|of probability 0"):
            align_ctc(log_probs, numbers)
        return
    spans = align_ctc(log_probs, numbers)
    assert spans.shape == (len(symbols), 2)
    path = [0] * num_frames
    for symbol, (start, stop) in zip(symbols, spans, strict=True):
        assert start < stop
        path[start:stop] = [symbol] * (stop - start)
    assert read(path, 3) == tuple(symbols)
    assert math.prod(frames[t, symbol].item() for t, symbol in enumerate(path)) == pytest.approx(max(scores))


def test_words_last_from_their_first_to_their_last_letter() -> None:
    """Letters are on known frames, with repeated letters and a letter that lasts for two frames."""
    path = [BLANK] * 16
    for symbol, frame in zip(encode_transcript("set b 11"), (2, 4, 5, 6, 8, 9, 12, 14), strict=True):
        path[frame] = int(symbol)
    path[15] = path[14]
    log_probs = torch.full((16, len(SYMBOLS)), -6.0)
    log_probs[torch.arange(16), torch.tensor(path)] = -0.1
    expected = [WordTime("SET", 0.08, 0.24), WordTime("B", 0.32, 0.36), WordTime("11", 0.48, 0.64)]
    assert word_times(log_probs, encode_transcript("Set b 11"), 25.0) == expected
    assert word_times(log_probs, encode_transcript(""), 25.0) == []


WORDS = st.lists(st.sampled_from(["A", "BE", "C"]), max_size=9)


def test_docstring_examples() -> None:
    assert doctest.testmod(edits).failed == 0


@pytest.mark.parametrize(
    ("hypothesis", "errors"),
    [
        ("A B C", [0, 0, 0]),
        ("A D C", [0, 1, 0]),
        ("A C", [0, 1, 0]),
        ("A X Y B C", [2, 0, 0]),
        ("X A B C Y", [1, 0, 1]),
        ("", [1, 1, 1]),
    ],
)
def test_errors_belong_to_words(hypothesis: str, errors: list[int]) -> None:
    assert count_word_errors(["A", "A B C"], ["A", hypothesis]).tolist() == [0, *errors]


def test_references_without_words_raise() -> None:
    with pytest.raises(DataError):
        count_word_errors(["A", " "], ["A", "B"])
