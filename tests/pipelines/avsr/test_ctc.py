"""CTC against enumeration of all paths, and against PyTorch's loss."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.errors import DataError
from pipelines.avsr.ctc import CtcPrefixes, WordTime, align_ctc, decode_ctc, word_times
from pipelines.avsr.transcripts import BLANK, SYMBOLS, encode_transcript
from tests.pipelines.avsr.oracles import log, random_log_probs, read, transcript_probs

SEEDS = st.integers(0, 2**32 - 1)


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


@pytest.mark.slow
@given(SEEDS, st.integers(1, 30), st.lists(st.integers(1, 5), max_size=12))
def test_transcript_score_is_ctc_loss(seed: int, num_frames: int, symbols: list[int]) -> None:
    log_probs = random_log_probs(np.random.default_rng(seed), num_frames, 6)
    without_end = torch.cat([log_probs, torch.full((num_frames, 1), -torch.inf)], dim=1)
    loss = torch.nn.functional.ctc_loss(
        log_probs[:, None], torch.tensor([symbols], dtype=torch.int64), (num_frames,), (len(symbols),), reduction="sum"
    )
    assert prefix_of(without_end, tuple(symbols)).score_ends().item() == pytest.approx(-loss.item(), abs=1e-9)


def test_extending_several_prefixes_of_several_items() -> None:
    """Check parents, repeated letters and padding at once: each prefix scores as it does alone."""
    log_probs = random_log_probs(np.random.default_rng(0), 3, 9, 5)
    lengths = torch.tensor([9, 4, 1])
    log_probs[1, 4:], log_probs[2, 1:] = torch.nan, torch.nan
    prefixes = CtcPrefixes(log_probs, lengths)
    prefixes.extend(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[1, 2], [2, 3], [3, 1]]))
    prefixes.extend(torch.tensor([[1, 0, 0], [0, 0, 1], [1, 1, 0]]), torch.tensor([[2, 1, 3], [2, 3, 3], [1, 2, 3]]))
    expected = [[(2, 2), (1, 1), (1, 3)], [(2, 2), (2, 3), (3, 3)], [(1, 1), (1, 2), (3, 3)]]
    prefixes.select(torch.tensor([2, 0]))
    for row, item in enumerate((2, 0)):
        for rank, symbols in enumerate(expected[item]):
            alone = prefix_of(log_probs[item, : lengths[item]], symbols)
            torch.testing.assert_close(prefixes.score_extensions()[row, rank], alone.score_extensions()[0, 0])
            torch.testing.assert_close(prefixes.score_ends()[row, rank], alone.score_ends()[0, 0])
    assert not prefixes.score_extensions().isnan().any()


def test_improbable_frames_of_a_long_item_stay_exact() -> None:
    """A second of near-impossible frames at each symbol would underflow in probabilities."""
    log_probs = random_log_probs(np.random.default_rng(0), 400, 6)
    log_probs[:, :-1] -= 30
    log_probs[:, -1] = -torch.inf
    symbols = (1, 2, 2, 3, 4, 1)
    loss = torch.nn.functional.ctc_loss(
        log_probs[:, None, :-1], torch.tensor([symbols]), (400,), (len(symbols),), reduction="sum"
    )
    assert loss > 12_000
    assert prefix_of(log_probs, symbols).score_ends().item() == pytest.approx(-loss.item(), rel=1e-12)


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
