"""Connectionist temporal classification (CTC): best path, scores of prefixes, alignment and times of words.

Symbol 0 is always the blank, and the last symbol, END, ends a transcript. Only the attention decoder has END: CTC's
probability of it counts as blank, so that the probabilities of all transcripts sum to 1.

"Connectionist Temporal Classification" (ICML 2006) and "Hybrid CTC/Attention Architecture for End-to-End Speech
Recognition" (IEEE J. Sel. Top. Signal Process. 2017).
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Array, Ints
from embedcache.errors import DataError
from pipelines.avsr.transcripts import BLANK, SYMBOLS, decode_symbols

_SPACE = SYMBOLS.index(" ")


def decode_ctc(log_probs_BTC: Tensor, lengths_B: Tensor) -> list[Ints]:
    """Return the symbols on the most probable path of each item, repetitions merged and blanks removed.

    Args:
        log_probs_BTC: (B, T, C) log-probabilities of each frame's symbols, any float.
        lengths_B: (B,) int, number of frames of each item, from 1 to T.

    Returns:
        B arrays of int64.
    """
    best_BT = _fold_end(log_probs_BTC, lengths_B).argmax(dim=2)
    is_start_BT = best_BT != BLANK  # padded frames are blank
    is_start_BT[:, 1:] &= best_BT[:, 1:] != best_BT[:, :-1]
    return [row[starts].cpu().numpy() for row, starts in zip(best_BT, is_start_BT, strict=True)]


class CtcPrefixes:
    """Scores of K prefixes of transcripts per item, extended symbol by symbol from one empty prefix.

    For a prefix g extended by a symbol c to h, n_t(h) and b_t(h) are the log-probabilities of all paths over frames 1
    to t that read h and end in c or in a blank. ⊕ adds probabilities given as logarithms:

        φ_t    = b_{t-1}(g) ⊕ (-∞ if g ends in c else n_{t-1}(g))
        n_t(h) = (n_{t-1}(h) ⊕ φ_t) + log p_t(c)
        b_t(h) = (b_{t-1}(h) ⊕ n_{t-1}(h)) + log p_t(blank)
        ψ(h)   = ⊕_t (φ_t + log p_t(c))             of all transcripts that begin with h
        ω(g)   = n_T(g) ⊕ b_T(g)                    of the transcript g alone

    with b_0 = 0 for the empty prefix and -∞ for others, n_0 = -∞. ψ(h) needs only n and b of g, so all C extensions are
    one matrix product per item. Then n and b are computed for the extensions that are kept, for all frames at once, by
    a parallel scan. Scores are in float64. An extension e⁷⁰⁰ times less probable than its prefix has probability 0.

    Memory: 2 B T C + 2 B K T values.

    Args:
        log_probs_BTC: (B, T, C) log-probabilities of each frame's symbols, any float; -inf is allowed.
        lengths_B: (B,) int, number of frames of each item, from 1 to T.
    """

    def __init__(self, log_probs_BTC: Tensor, lengths_B: Tensor) -> None:
        self._log_probs_BTC = _fold_end(log_probs_BTC, lengths_B)
        self._probs_BTC = self._log_probs_BTC.exp()

        paths_BT = self._log_probs_BTC[:, :, BLANK].cumsum(dim=1)
        self._blank_BKT = torch.nn.functional.pad(paths_BT, (1, 0))[:, None]  # column t: after t frames
        self._symbol_BKT = torch.full_like(self._blank_BKT, -torch.inf)
        self._last_BK = torch.full((len(paths_BT), 1), BLANK, device=paths_BT.device)

    def score_extensions(self) -> Tensor:
        """Compute ψ of each prefix extended by each symbol: (B, K, C) float64; -inf for blank and END."""
        blank_BKT = self._blank_BKT[:, :, :-1]
        either_BKT = torch.logaddexp(blank_BKT, self._symbol_BKT[:, :, :-1])
        earlier_BKT = torch.cat([either_BKT, blank_BKT], dim=1)  # for other symbols than the last, then for the last

        # Divide by the largest probability of each prefix, or those of long prefixes would underflow.
        peak_BK = earlier_BKT.amax(dim=2, keepdim=True).clamp(min=torch.finfo(earlier_BKT.dtype).min)
        scores_BKC = torch.bmm((earlier_BKT - peak_BK).exp(), self._probs_BTC).log() + peak_BK

        # A symbol that repeats the last one needs a blank in between: its paths are the ones that end in a blank.
        other_BKC, same_BKC = scores_BKC.chunk(2, dim=1)
        last_BK1 = self._last_BK[:, :, None]
        extended_BKC = other_BKC.scatter(2, last_BK1, same_BKC.gather(2, last_BK1))

        extended_BKC[:, :, BLANK] = -torch.inf
        return extended_BKC

    def score_ends(self) -> Tensor:
        """Compute ω, the log-probability of each prefix as a whole transcript: (B, K) float64."""
        return torch.logaddexp(self._blank_BKT[:, :, -1], self._symbol_BKT[:, :, -1])

    def extend(self, parents_BK: Tensor, symbols_BK: Tensor) -> None:
        """Replace the prefixes by extensions of some of them.

        Args:
            parents_BK: (B, K) int64, number of the extended prefix among the item's present ones.
            symbols_BK: (B, K) int64, appended symbol.
        """
        index_BKT = parents_BK[:, :, None].expand(-1, -1, self._blank_BKT.shape[2])
        blank_BKT = self._blank_BKT.gather(1, index_BKT)
        symbol_BKT = self._symbol_BKT.gather(1, index_BKT)

        # A repeated symbol needs a blank before it.
        is_same_BK1 = (self._last_BK.gather(1, parents_BK) == symbols_BK)[:, :, None]
        earlier_BKT = torch.logaddexp(blank_BKT, symbol_BKT.masked_fill(is_same_BK1, -torch.inf))[:, :, :-1]

        index_BTK = symbols_BK[:, None].expand(-1, earlier_BKT.shape[2], -1)
        log_probs_BKT = self._log_probs_BTC.gather(2, index_BTK).mT
        self._symbol_BKT = _recur(log_probs_BKT, earlier_BKT)

        log_blank_BKT = self._log_probs_BTC[:, None, :, BLANK].expand_as(earlier_BKT)
        self._blank_BKT = _recur(log_blank_BKT, self._symbol_BKT[:, :, :-1])
        self._last_BK = symbols_BK

    def select(self, rows: Tensor) -> None:
        """Keep some of the items: (B,) bool or (n,) int64."""
        self._log_probs_BTC = self._log_probs_BTC[rows]
        self._probs_BTC = self._probs_BTC[rows]
        self._blank_BKT = self._blank_BKT[rows]
        self._symbol_BKT = self._symbol_BKT[rows]
        self._last_BK = self._last_BK[rows]


def num_ctc_frames(symbols_L: Ints) -> int:
    """Count the frames that a path of a transcript needs: one per symbol, and a blank between equal symbols."""
    return len(symbols_L) + int((symbols_L[1:] == symbols_L[:-1]).sum())


def align_ctc(log_probs_TC: Tensor, symbols_L: Ints) -> Ints:
    """Align a transcript with the frames by its most probable path: (L, 2) int64.

    CTC symbols are short: a trained network emits most of them on a single frame and blanks in between.

    Args:
        log_probs_TC: (T, C) log-probabilities of each frame's symbols, any float.
        symbols_L: (L,) symbols, without blanks and END.

    Returns:
        First frame of each symbol, and the frame after its last one.

    Raises:
        DataError: the transcript needs more frames, or has probability 0.
    """
    lengths_B = torch.tensor([len(log_probs_TC)], device=log_probs_TC.device)
    folded_TC: Array = _fold_end(log_probs_TC[None], lengths_B)[0].cpu().numpy()

    num_frames = len(folded_TC)
    num_needed = num_ctc_frames(symbols_L)
    if num_needed > num_frames:
        raise DataError(f"expected at least {num_needed} frames for {len(symbols_L)} symbols, got {num_frames}")

    states_S = np.full(2 * len(symbols_L) + 1, BLANK)  # blank, symbol, blank, …, symbol, blank
    states_S[1::2] = symbols_L
    path_T = _best_path(folded_TC[:, states_S], states_S)

    starts_L = np.searchsorted(path_T, 2 * np.arange(len(symbols_L)) + 1)
    stops_L = np.searchsorted(path_T, 2 * np.arange(len(symbols_L)) + 1, side="right")
    return np.stack([starts_L, stops_L], axis=1)


class WordTime(NamedTuple):
    """A word of a transcript and when it is said, in seconds from the first frame's start."""

    word: str
    start_s: float
    stop_s: float


def word_times(log_probs_TC: Tensor, symbols_L: Ints, rate_hz: float) -> list[WordTime]:
    """Compute when each word of a transcript is said, by `align_ctc`.

    A word lasts from the first frame of its first symbol to the last frame of its last one. CTC is trained without
    times, so these are the times at which the network is certain of the letters.

    Args:
        log_probs_TC: (T, C) log-probabilities of each frame's symbols.
        symbols_L: (L,) the transcript as it was decoded. A space at its ends has separate frames.
        rate_hz: frames per second.
    """
    seconds_L2 = align_ctc(log_probs_TC, symbols_L) / rate_hz
    spaces = np.flatnonzero(symbols_L == _SPACE).tolist()

    times = []
    for space, next_space in pairwise([-1, *spaces, len(symbols_L)]):
        if next_space - space > 1:
            word = decode_symbols(symbols_L[space + 1 : next_space])
            times.append(WordTime(word, float(seconds_L2[space + 1, 0]), float(seconds_L2[next_space - 1, 1])))
    return times


def _best_path(log_probs_TS: Array, states_S: Array) -> Ints:
    """Return the number of the state at each frame on the most probable path from the start to the end: (T,)."""
    # A path may skip the blank between two symbols that differ.
    may_skip_S: Array = np.zeros(len(states_S), bool)
    may_skip_S[3::2] = states_S[3::2] != states_S[1:-2:2]

    num_steps_TS: Array = np.zeros(log_probs_TS.shape, np.int64)
    score_S = np.where(np.arange(len(states_S)) < 2, log_probs_TS[0], -np.inf)

    # At each frame a path stays, or moves on by one or two states.
    for frame in range(1, len(log_probs_TS)):
        moves_3S = np.full((3, len(states_S)), -np.inf)
        moves_3S[0] = score_S
        moves_3S[1, 1:] = score_S[:-1]
        moves_3S[2, 2:] = np.where(may_skip_S[2:], score_S[:-2], -np.inf)
        num_steps_TS[frame] = moves_3S.argmax(axis=0)
        score_S = moves_3S.max(axis=0) + log_probs_TS[frame]

    # A path ends in the last symbol or in the blank after it.
    state = max(range(max(0, len(states_S) - 2), len(states_S)), key=lambda state: score_S[state])
    if score_S[state] == -np.inf:
        raise DataError("expected a transcript that the log-probabilities allow, got one of probability 0")

    path_T: Ints = np.empty(len(log_probs_TS), np.int64)
    for frame in reversed(range(len(path_T))):
        path_T[frame] = state
        state -= num_steps_TS[frame, state]
    return path_T


def _fold_end(log_probs_BTC: Tensor, lengths_B: Tensor) -> Tensor:
    """Add END's probability to the blank's, and fill padding with certain blanks: (B, T, C) float64."""
    folded_BTC = log_probs_BTC.detach().double().clone()
    folded_BTC[:, :, BLANK] = torch.logaddexp(folded_BTC[:, :, BLANK], folded_BTC[:, :, -1])
    folded_BTC[:, :, -1] = -torch.inf

    is_padded_BT = torch.arange(folded_BTC.shape[1], device=lengths_B.device) >= lengths_B[:, None]

    # Padding that is certainly blank changes neither paths nor scores.
    folded_BTC[is_padded_BT] = -torch.inf
    folded_BTC[:, :, BLANK].masked_fill_(is_padded_BT, 0.0)
    return folded_BTC


def _recur(log_probs_BKT: Tensor, inputs_BKT: Tensor) -> Tensor:
    """Compute x_t = (x_{t-1} ⊕ input_t) + log p_t from x_0 = -∞: (B, K, T + 1).

    A parallel scan: after the round with distance d, an entry sums the inputs of the last 2 d frames. No differences
    are taken, so -∞ stays -∞.
    """
    log_factors = log_probs_BKT
    sums = inputs_BKT + log_probs_BKT
    num_frames = sums.shape[2]

    distance = 1
    while distance < num_frames:
        later = log_factors[:, :, distance:]
        added = torch.logaddexp(sums[:, :, distance:], later + sums[:, :, :-distance])
        sums = torch.cat([sums[:, :, :distance], added], dim=2)
        log_factors = torch.cat([log_factors[:, :, :distance], later + log_factors[:, :, :-distance]], dim=2)
        distance *= 2

    return torch.nn.functional.pad(sums, (1, 0), value=-torch.inf)
