"""Decoding of transcripts from CTC and an attention decoder: hybrid beam search in one pass, or attention greedily.

The attention decoder is a function that extends hypotheses by one symbol, so that it can keep keys and values of the
symbols before. Symbol 0 is CTC's blank, which no transcript contains. The last symbol, END, starts and ends each.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pipelines.avsr.ctc import CtcPrefixes
from pipelines.avsr.transcripts import BLANK
from pipelines.beam import Hypothesis, StepDecoder, search_beam

Decoder: TypeAlias = Literal["hybrid", "ctc", "attention"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How transcripts are decoded.

    Args:
        decoder: `hybrid`, a beam search over CTC and attention; `ctc`, the best path of CTC; or `attention`, greedily.
        beam: hypotheses that the hybrid decoder keeps.
        ctc_weight: weight of CTC in the hybrid decoder, 0.1 in the paper. Attention has the rest.
    """

    decoder: Decoder = "hybrid"
    beam: int = 5
    ctc_weight: float = 0.1


@torch.no_grad()
def decode_hybrid(
    log_probs_BTC: Tensor,
    lengths_B: Tensor,
    step: StepDecoder | None,
    *,
    ctc_weight: float = 0.1,
    beam: int = 5,
) -> list[Hypothesis]:
    """Search the most probable transcript of each of B items by CTC and an attention decoder in one pass.

        argmax_y λ log p_ctc(y | X) + (1 - λ) log p_att(y | X)

    Extensions are scored by the probability of all transcripts that begin with them, see `search_beam`. "Hybrid
    CTC/Attention Architecture for End-to-End Speech Recognition" (IEEE J. Sel. Top. Signal Process. 2017).

    Args:
        log_probs_BTC: (B, T, C) log-probabilities of CTC per frame, any float, on any device that has float64.
        lengths_B: (B,) int, number of frames of each item, from 1 to T. Transcripts are not longer.
        step: the attention decoder, with log-probabilities on the same device; not called if `ctc_weight` is 1.
        ctc_weight: λ, from 0 (attention only, and CTC is not computed) to 1 (CTC only).
        beam: number of hypotheses kept per item.

    Returns:
        The best hypothesis of each item.

    Raises:
        DataError: lengths or log-probabilities of an unexpected shape, or NaN.
    """
    ctc = CtcPrefixes(log_probs_BTC, lengths_B) if ctc_weight > 0 else None
    return search_beam(step, lengths_B, num_symbols=log_probs_BTC.shape[2], beam=beam, ctc=ctc, ctc_weight=ctc_weight)


@torch.no_grad()
def decode_attention(step: StepDecoder, lengths_B: Tensor, *, num_symbols: int) -> list[Hypothesis]:
    """Decode B items with the attention decoder only: take the most probable symbol at each step.

    Args:
        step: the attention decoder, with log-probabilities on the device of the lengths.
        lengths_B: (B,) int, longest transcript of each item: usually its number of frames.
        num_symbols: C; symbol 0 is never chosen and C - 1 is END.

    Returns:
        A hypothesis of each item. At its longest length it is ended by END, whatever END's probability.
    """
    end = num_symbols - 1
    device = lengths_B.device
    symbols_BL = torch.full((len(lengths_B), max(lengths_B.tolist(), default=0) + 1), end, device=device)
    score_B = torch.zeros(len(lengths_B), dtype=torch.float64, device=device)

    items_N = torch.arange(len(lengths_B), device=device)
    symbols_N = torch.full_like(items_N, end)
    parents_N = items_N
    is_blank_C = torch.arange(num_symbols, device=device) == BLANK
    is_end_C = torch.arange(num_symbols, device=device) == end

    for length in range(symbols_BL.shape[1]):
        is_last_N1 = lengths_B[items_N, None] <= length
        next_NC = step(symbols_N, parents_N).double().masked_fill(is_blank_C | (is_last_N1 & ~is_end_C), -torch.inf)
        best_N, symbols_N = next_NC.max(dim=1)
        score_B[items_N] += best_N

        # Only hypotheses that go on are extended; the padding of finished ones is END already.
        parents_N = torch.nonzero((symbols_N != end) & (best_N > -torch.inf))[:, 0]
        items_N = items_N[parents_N]
        symbols_N = symbols_N[parents_N]
        symbols_BL[items_N, length] = symbols_N
        if not len(items_N):
            break
    num_symbols_B = (symbols_BL != end).sum(dim=1).tolist()
    return [
        Hypothesis(row[:length].copy(), score, None, score)
        for row, length, score in zip(symbols_BL.cpu().numpy(), num_symbols_B, score_B.tolist(), strict=True)
    ]
