"""Beam search over symbols by a decoder that extends hypotheses by one symbol, with or without the scores of CTC.

The decoder is a function, so that it can keep keys and values of earlier symbols. No hypothesis contains symbol 0. The
last symbol, END, starts and ends a hypothesis.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from embedcache.arrays import Ints

_UNUSED = 0


class StepDecoder(Protocol):
    """A decoder with a memory of the hypotheses of its previous call."""

    def __call__(self, symbols_N: Tensor, parents_N: Tensor, /) -> Tensor:
        """Append a symbol to hypotheses and return the log-probabilities of the next one: (N, C) any float.

        Args:
            symbols_N: (N,) int64, symbol to append; END in the first call.
            parents_N: (N,) int64, number of the extended hypothesis in the previous call, or of the item in the first
                call. A hypothesis can be extended several times or not at all.
        """
        ...


class Hypothesis(NamedTuple):
    """A transcript and its score.

    Args:
        symbols: (L,) int64, without END.
        score: weighted sum of both scores; -inf if no transcript has a probability above 0.
        ctc_score: log-probability by CTC; None if CTC has no weight.
        attention_score: log-probability by the attention decoder, END included; None if it has no weight.
    """

    symbols: Ints
    score: float
    ctc_score: float | None
    attention_score: float | None


class PrefixScores(Protocol):
    """Scores of K prefixes per item, such as `pipelines.avsr.ctc.CtcPrefixes`."""

    def score_extensions(self) -> Tensor: ...

    def score_ends(self) -> Tensor: ...

    def extend(self, parents_BK: Tensor, symbols_BK: Tensor) -> None: ...

    def select(self, rows: Tensor) -> None: ...


@torch.no_grad()
def search_beam(
    step: StepDecoder | None,
    caps_B: Tensor,
    *,
    num_symbols: int,
    beam: int,
    ctc: PrefixScores | None = None,
    ctc_weight: float = 0.0,
) -> list[Hypothesis]:
    """Search the most probable hypothesis of each of B items together.

    At every length, each hypothesis is also considered complete, and the `beam` best extensions are kept. No
    log-probability can rise, so an item is finished once no hypothesis scores above its best completed one. A wide
    enough beam is an exact search. If scores are equal, the shorter hypothesis wins, then the one with lower symbols.

    Args:
        step: the decoder, which is not called if `ctc_weight` is 1.
        caps_B: (B,) int64, longest hypothesis of each item.
        num_symbols: C.
        beam: hypotheses kept per item.
        ctc: scores of CTC.
        ctc_weight: weight of CTC. The decoder has the rest.
    """
    search = _BeamSearch(ctc, step, caps_B, num_symbols, ctc_weight, beam)
    while search.is_running:
        next_BKC = search.attend()
        search.complete(next_BKC)
        search.extend(next_BKC)
    return search.results()


class _BeamSearch:
    """State of a beam search over N items: hypotheses of unfinished items, and the best completed ones of all items.

    B items are unfinished. Each has up to K hypotheses of one length; an item with fewer has rows that are not live.
    One step is `attend`, `complete`, `extend`.
    """

    def __init__(
        self,
        ctc: PrefixScores | None,
        step: StepDecoder | None,
        caps_B: Tensor,
        num_symbols: int,
        ctc_weight: float,
        beam: int,
    ) -> None:
        num_items = len(caps_B)
        device = caps_B.device
        self._ctc = ctc
        self._step = step
        self._ctc_weight = ctc_weight
        self._beam = beam
        self._num_symbols = num_symbols
        self._caps_B = caps_B

        self._items_B = torch.arange(num_items, device=device)  # number of each item among all N
        self._prefixes_BKL = torch.full((num_items, 1, 1), num_symbols - 1, device=device)  # END first
        self._attention_BK = torch.zeros((num_items, 1), dtype=torch.float64, device=device)
        self._is_live_BK = torch.ones((num_items, 1), dtype=torch.bool, device=device)

        # Number of the extended hypothesis in the attention decoder's last call, which has only live ones.
        self._parents_BK = self._items_B[:, None]

        # The best completed hypothesis of every item: score, score by CTC, score by attention; symbols; length.
        self._best_3N = torch.full((3, num_items), -torch.inf, dtype=torch.float64, device=device)
        self._best_NL = torch.zeros(
            (num_items, int(caps_B.max()) if num_items else 0), dtype=torch.int64, device=device
        )
        self._best_length_N = torch.zeros(num_items, dtype=torch.int64, device=device)

    @property
    def is_running(self) -> bool:
        return len(self._items_B) > 0

    @property
    def _length(self) -> int:
        """Number of symbols of each hypothesis."""
        return self._prefixes_BKL.shape[2] - 1

    @property
    def _best_score_B(self) -> Tensor:
        """Score of the best completed hypothesis of each unfinished item."""
        return self._best_3N[0, self._items_B]

    def attend(self) -> Tensor:
        """Return the attention decoder's log-probabilities of the next symbol: (B, K, C), -inf if not needed."""
        shape = (*self._is_live_BK.shape, self._num_symbols)
        if self._ctc_weight == 1 or self._step is None:
            return self._attention_BK.new_zeros(shape)

        symbols_N = self._prefixes_BKL[:, :, -1][self._is_live_BK]
        next_NC = self._step(symbols_N, self._parents_BK[self._is_live_BK])
        next_BKC = self._attention_BK.new_full(shape, -torch.inf)
        next_BKC[self._is_live_BK] = next_NC.to(next_BKC.dtype)
        return next_BKC

    def complete(self, next_BKC: Tensor) -> None:
        """Consider each hypothesis complete, and keep it if it is better than the best one so far."""
        attention_BK = self._attention_BK + next_BKC[:, :, -1]
        ctc_BK = torch.zeros_like(attention_BK) if self._ctc is None else self._ctc.score_ends()
        score_BK = self._mix(ctc_BK, attention_BK).masked_fill(~self._is_live_BK, -torch.inf)

        score_B, rank_B = score_BK.max(dim=1)
        rows = torch.nonzero(score_B > self._best_score_B)[:, 0]
        ranks = rank_B[rows]
        items = self._items_B[rows]
        self._best_3N[:, items] = torch.stack([score_B[rows], ctc_BK[rows, ranks], attention_BK[rows, ranks]])
        self._best_NL[items, : self._length] = self._prefixes_BKL[rows, ranks, 1:]
        self._best_length_N[items] = self._length

    def extend(self, next_BKC: Tensor) -> None:
        """Replace the hypotheses by their best extensions, and drop hypotheses that cannot win and finished items."""
        attention_BKC = self._attention_BK[:, :, None] + next_BKC
        rows, best_BK, can_win_BK = self._find_best_extensions(attention_BKC)
        parents_BK = best_BK // self._num_symbols
        symbols_BK = best_BK % self._num_symbols

        # Before the flags change: they decide the numbers in the decoder's last call.
        self._parents_BK = self._number_live()[rows].gather(1, parents_BK)
        self._is_live_BK = can_win_BK
        self._attention_BK = attention_BKC[rows].flatten(1).gather(1, best_BK)
        self._prefixes_BKL = torch.cat([self._prefixes_BKL[rows[:, None], parents_BK], symbols_BK[:, :, None]], dim=2)

        if self._ctc is not None and len(rows):
            if len(rows) < len(self._items_B):
                self._ctc.select(rows)
            self._ctc.extend(parents_BK, symbols_BK)

        self._items_B = self._items_B[rows]
        self._caps_B = self._caps_B[rows]

    def results(self) -> list[Hypothesis]:
        """Return the best completed hypothesis of every item."""
        symbols = self._best_NL.cpu().numpy()
        lengths = self._best_length_N.tolist()
        return [
            Hypothesis(
                row[:length].copy(),
                score,
                None if self._ctc_weight == 0 else ctc,
                None if self._ctc_weight == 1 else attention,
            )
            for row, length, score, ctc, attention in zip(symbols, lengths, *self._best_3N.tolist(), strict=True)
        ]

    def _find_best_extensions(self, attention_BKC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of remaining items, the best extensions of their hypotheses, and whether each can still win.

        Extension k C + c appends symbol c to hypothesis k; if scores are equal, the lower number is first. An item is
        finished once none scores above its best completed hypothesis.
        """
        score_BKC = self._score_extensions(attention_BKC)
        sorted_BK, order_BK = torch.sort(score_BKC.flatten(1), dim=1, descending=True, stable=True)
        score_BK = sorted_BK[:, : self._beam]
        best_BK = order_BK[:, : self._beam]

        can_win_BK = score_BK > self._best_score_B[:, None]

        rows = torch.nonzero(can_win_BK.any(dim=1))[:, 0]
        width = int(can_win_BK.sum(dim=1).max()) if len(can_win_BK) else 0
        return rows, best_BK[rows, :width], can_win_BK[rows, :width]

    def _number_live(self) -> Tensor:
        """Return the number of each live hypothesis in the attention decoder's last call: (B, K)."""
        return (self._is_live_BK.flatten().cumsum(0) - 1).view_as(self._is_live_BK)

    def _score_extensions(self, attention_BKC: Tensor) -> Tensor:
        """Return the score of each hypothesis with one more symbol: (B, K, C); -inf if it must not be extended."""
        ctc_BKC = torch.zeros_like(attention_BKC) if self._ctc is None else self._ctc.score_extensions()
        score_BKC = self._mix(ctc_BKC, attention_BKC).masked_fill(~self._is_live_BK[:, :, None], -torch.inf)
        score_BKC[:, :, [_UNUSED, self._num_symbols - 1]] = -torch.inf
        score_BKC[self._caps_B <= self._length] = -torch.inf
        return score_BKC

    def _mix(self, ctc: Tensor, attention: Tensor) -> Tensor:
        """Return the weighted sum; a score without weight is 0."""
        return self._ctc_weight * ctc + (1 - self._ctc_weight) * attention
