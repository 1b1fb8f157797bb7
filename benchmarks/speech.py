"""Decoding of speech relative to the encoder alone: CPU time of one thread, batches of 32 utterances of 3 s.

The network is untrained, of sound and lips, with 2 + 2 + 2 layers of width 128. An untrained network would decode
nothing, so its log-probabilities are moved to a random transcript of 25 symbols per utterance: CTC has each symbol on a
frame of its own between blanks, the attention decoder each in turn. Beams have 5 hypotheses; the hybrid gives CTC a
weight of 0.1. "Its attention steps alone" are the same calls of the attention decoder without the search.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks import speech_training
from benchmarks.measure import median_rates
from embedcache.arrays import Ints
from embedcache.cli.console import print_line, print_table
from embedcache.networks.ctc import decode_ctc, word_times
from embedcache.networks.decoding import Hypothesis, decode_attention, decode_hybrid
from embedcache.networks.speech import EncodedSpeech, Frames, SpeechNetwork
from embedcache.networks.transcripts import BLANK, END, SYMBOLS

BATCH, NUM_FRAMES, NUM_SYMBOLS = 32, 75, 25
STREAMS = {"audio": {"width": 384, "stack": 2}, "video": {"width": 64, "stack": 1}}
CERTAINTY = 6.0
"""What is added to the log-probabilities of the transcript before they are normalized again."""
RATE_HZ = 25.0
SPACE = SYMBOLS.index(" ")
REPEATS = 15


def main(*, quick: bool) -> None:
    """Print the tables of training and decoding."""
    speech_training.main(quick=quick)
    decoding(quick=quick)


def decoding(*, quick: bool) -> None:
    """Print the table of decoding."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        _decoding(1 if quick else REPEATS)


def _decoding(repeats: int) -> None:
    network = SpeechNetwork(streams=STREAMS, num_layers=2, fusion_layers=2, decoder_layers=2).eval()
    rng = np.random.default_rng(0)
    lengths = torch.from_numpy(rng.integers(NUM_FRAMES * 3 // 4, NUM_FRAMES + 1, BATCH))
    streams = {
        name: Frames(torch.randn(BATCH, NUM_FRAMES, size["width"] * size["stack"]), lengths)
        for name, size in STREAMS.items()
    }
    texts = rng.integers(2, END, (BATCH, NUM_SYMBOLS))
    texts[:, 4::5] = SPACE
    texts[:, -1] = 2
    encoded = network.encode(streams)
    log_probs = _move_to_text(network.ctc_log_probs(encoded), lengths, texts, rng)

    def hybrid(weight: float) -> list[Hypothesis]:
        steps = _RecordedSteps(network, encoded, texts)
        return decode_hybrid(log_probs, lengths, steps, ctc_weight=weight)

    recorded = _RecordedSteps(network, encoded, texts)
    found = decode_hybrid(log_probs, lengths, recorded)
    num_right = sum(hypothesis.symbols.tolist() == text for hypothesis, text in zip(found, texts.tolist(), strict=True))
    print_line(f"{num_right} of {BATCH} transcripts found, {recorded.num_hypotheses} hypotheses scored by attention")

    def steps_alone() -> None:
        steps = _RecordedSteps(network, encoded, texts)
        for symbols, parents in recorded.calls:
            steps(symbols, parents)

    calls: dict[str, Callable[[], object]] = {
        "encoders, fusion, CTC": lambda: network.ctc_log_probs(network.encode(streams)),
        "best path": lambda: decode_ctc(log_probs, lengths),
        "prefix beam": lambda: hybrid(1.0),
        "attention, greedy": lambda: decode_attention(
            _RecordedSteps(network, encoded, texts), lengths, num_symbols=len(SYMBOLS)
        ),
        "attention beam": lambda: hybrid(0.0),
        "hybrid beam": lambda: hybrid(0.1),
        "its attention steps alone": steps_alone,
        "times of words": lambda: [
            word_times(frames[:length], text, RATE_HZ)
            for frames, length, text in zip(log_probs, lengths, texts, strict=True)
        ],
    }
    rates = median_rates({name: _cpu_ms_per_utterance(call) for name, call in calls.items()}, repeats=repeats)
    floor, steps = rates["encoders, fusion, CTC"], rates["its attention steps alone"]
    print_table(
        ["CPU time of decoding", "ms per utterance", "ratio to the encoders", "ratio to the attention steps"],
        [[name, f"{ms:.2f}", f"{ms / floor:.2f}", f"{ms / steps:.2f}"] for name, ms in rates.items()],
    )


def _move_to_text(log_probs_BTC: Tensor, lengths_B: Tensor, texts_BL: Ints, rng: np.random.Generator) -> Tensor:
    """Return CTC's log-probabilities moved to a path through each text, on random frames with blanks between."""
    path_BT = torch.full(log_probs_BTC.shape[:2], BLANK)
    for row, (length, text) in enumerate(zip(lengths_B.tolist(), texts_BL, strict=True)):
        frames = np.sort(rng.choice(length // 2, NUM_SYMBOLS, replace=False)) * 2
        path_BT[row, frames] = torch.from_numpy(text)
    return (log_probs_BTC + CERTAINTY * one_hot(path_BT, len(SYMBOLS))).log_softmax(dim=-1)


class _RecordedSteps:
    """The attention decoder's steps with log-probabilities moved to the texts; keeps the calls."""

    def __init__(self, network: SpeechNetwork, encoded: EncodedSpeech, texts_BL: Ints) -> None:
        self._steps = network.attention.steps(*encoded)
        self._texts_BL = torch.nn.functional.pad(torch.from_numpy(texts_BL), (0, NUM_FRAMES), value=END)
        self._items_N = torch.arange(len(texts_BL))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, symbols_N: Tensor, parents_N: Tensor) -> Tensor:
        self._items_N = self._items_N[parents_N]
        next_N = self._texts_BL[self._items_N, len(self.calls)]
        self.calls.append((symbols_N, parents_N))
        return (self._steps(symbols_N, parents_N) + CERTAINTY * one_hot(next_N, len(SYMBOLS))).log_softmax(dim=-1)

    @property
    def num_hypotheses(self) -> int:
        return sum(len(symbols) for symbols, _ in self.calls)


def _cpu_ms_per_utterance(call: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        started = time.thread_time()
        call()
        return 1000 * (time.thread_time() - started) / BATCH

    return measure
