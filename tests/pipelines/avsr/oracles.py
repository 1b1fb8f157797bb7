"""Slow reference implementations of decoding, and a small attention decoder."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BLANK = 0
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

    def __init__(self, num_symbols: int, seed: int, *, items: Sequence[int] = range(100), zeros: float = 0.0) -> None:
        self.num_symbols, self.seed, self.items, self.zeros = num_symbols, seed, items, zeros
        self.hypotheses: list[tuple[int, Transcript]] = []
        self.sizes: list[int] = []

    def next_log_probs(self, item: int, prefix: Transcript) -> Tensor:
        rng = np.random.default_rng([self.seed, item, *prefix])
        return random_log_probs(rng, self.num_symbols, zeros=self.zeros)

    def log_prob(self, item: int, transcript: Transcript) -> float:
        """Return the log-probability of a whole transcript, END included."""
        symbols = (*transcript, self.num_symbols - 1)
        return sum(self.next_log_probs(item, symbols[:n])[symbol].item() for n, symbol in enumerate(symbols))

    def __call__(self, symbols_N: Tensor, parents_N: Tensor) -> Tensor:
        children = list(zip(symbols_N.tolist(), parents_N.tolist(), strict=True))
        if not self.sizes:
            assert {symbol for symbol, _ in children} == {self.num_symbols - 1}
            self.hypotheses = [(self.items[parent], ()) for _, parent in children]
        else:
            assert all(BLANK < symbol < self.num_symbols - 1 for symbol, _ in children)
            parents = self.hypotheses
            self.hypotheses = [(parents[row][0], (*parents[row][1], symbol)) for symbol, row in children]
        self.sizes.append(len(children))
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


def prefix_log_probs(log_probs_TC: Tensor, prefix: Transcript) -> tuple[float, float]:
    """Return the log-probabilities of all transcripts that begin with a prefix, and of the prefix alone.

    In probabilities, frame by frame: the chance to have read the prefix for the first time, and to read exactly it.
    """
    probs = log_probs_TC.exp()
    blank = probs[:, BLANK] + probs[:, -1]
    paths = [1.0] + [0.0] * (2 * len(prefix))  # blank, letter, blank, …: where a path through the prefix is
    reached = 0.0 if prefix else 1.0
    for t in range(len(probs)):
        new = [0.0] * len(paths)
        for place in range(len(paths)):
            if place % 2 == 0:
                new[place] = (paths[place] + (paths[place - 1] if place else 0)) * blank[t].item()
                continue
            letter = prefix[place // 2]
            entering = paths[place - 1]
            if place > 1 and prefix[place // 2 - 1] != letter:
                entering += paths[place - 2]
            new[place] = (paths[place] + entering) * probs[t, letter].item()
            if place == len(paths) - 2:
                reached += entering * probs[t, letter].item()
        paths = new
    return log(reached), log(sum(paths[-2:]))
