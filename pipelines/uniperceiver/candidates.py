"""Candidate sets and the classifier over them: every task asks which candidate belongs to an input.

    p(y | x) = exp(scale · cosine(f(x), f(y))) / Σ over candidates z of exp(scale · cosine(f(x), f(z)))

Classification, language modeling and CLIP's loss differ only in their candidates. "Uni-Perceiver: Pre-training Unified
Architecture for Generic Perception for Zero-shot and Few-shot Tasks" (CVPR 2022).
"""

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, normalize

from embedcache.arrays import Floats, Ints, blocks, distinct

Positives: TypeAlias = tuple[Tensor, Tensor]
"""Two (E,) int64, queries and candidates that belong together. Each query has at least one candidate."""

_BLOCK_LOGITS = 2**20
_SCALE = 1 / 0.07
_MAX_SCALE = 100.0


class CandidateSample(NamedTuple):
    """Some of the candidates, in ascending order, and the positions of M positives.

    Args:
        numbers_C: (C,) int64, number of each among all candidates.
        positives_M: (M,) int64, position of each positive in `numbers_C`.
        log_weights_C: (C,) float32, added to their logits. None if all candidates are in the sample.
    """

    numbers_C: Ints
    positives_M: Ints
    log_weights_C: Floats | None


def draw_candidates(num_candidates: int, positives_M: Ints, *, limit: int, rng: np.random.Generator) -> CandidateSample:
    """Draw candidates for one step if there are too many: all positives of the batch and random negatives.

    A drawn negative represents all negatives that were left out: its logit gets log(number of negatives / number
    drawn), so that the expected sum over the drawn candidates is the sum over all candidates.

    Args:
        num_candidates: number of all candidates.
        positives_M: numbers of the positives of a batch.
        limit: largest number of candidates, unless there are more positives.
        rng: generator of the draw.
    """
    positives_U = distinct(positives_M)
    if num_candidates <= max(limit, len(positives_U)):
        return CandidateSample(np.arange(num_candidates), positives_M, None)

    num_negatives = num_candidates - len(positives_U)
    draws = rng.choice(num_negatives, size=max(1, limit - len(positives_U)), replace=False, shuffle=False)

    # A draw is a rank among the negatives. Its number is larger by the positives that are below it.
    negatives = draws + np.searchsorted(positives_U - np.arange(len(positives_U)), draws, side="right")

    numbers_C = np.sort(np.concatenate([positives_U, negatives]))

    # Positives are all there, so only negatives stand for others.
    log_weights_C = np.where(np.isin(numbers_C, positives_U), 0.0, math.log(num_negatives / len(negatives)))
    return CandidateSample(numbers_C, np.searchsorted(numbers_C, positives_M), log_weights_C.astype(np.float32))


class CosineClassifier(nn.Module):
    """A classifier over candidates: a softmax of cosine similarities, divided by a learned temperature.

    The scale is the inverse of the temperature. It is learned as its logarithm, starting at 1 / 0.07, and clipped to
    100, as in CLIP.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))

    @property
    def scale(self) -> Tensor:
        """The factor of the cosines, a scalar."""
        highest = math.log(_MAX_SCALE)

        # The value is clipped and the gradient is not, so that a scale at its limit can fall again.
        clipped = self.log_scale + (self.log_scale.clamp(max=highest) - self.log_scale).detach()
        return clipped.exp()

    def scaled(self, queries_BP: Tensor, candidates_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and candidates whose dot products are the logits."""
        return self.scale * normalize(queries_BP, dim=-1), normalize(candidates_CP, dim=-1)

    def logits(self, queries_BP: Tensor, candidates_CP: Tensor) -> Tensor:
        """Compute the logits of all candidates: (B, C)."""
        scaled_BP, vectors_CP = self.scaled(queries_BP, candidates_CP)
        return scaled_BP @ vectors_CP.T


def cross_entropy_over(
    queries_BP: Tensor, candidates_CP: Tensor, positives: Positives, *, bias_C: Tensor | None = None
) -> Tensor:
    """Compute the cross-entropy between targets and the softmax of query · candidate + bias, averaged over queries.

    The target of a query is uniform over its positives. The value and the gradients equal
    `torch.nn.functional.cross_entropy` on (B, C) logits. Only a block of rows of these logits, about 2^20 values, is
    ever in memory; the backward pass recomputes it.
    """
    query_E, candidate_E = positives
    bias_C = candidates_CP.new_zeros(len(candidates_CP)) if bias_C is None else bias_C.to(candidates_CP.dtype)
    log_sums_B: Tensor = _LogSumExp.apply(queries_BP, candidates_CP, bias_C)  # type: ignore[no-untyped-call]

    # `embedding` adds up gradients in one order; indexing adds them in any order with several threads.
    logits_E = (embedding(query_E, queries_BP) * embedding(candidate_E, candidates_CP)).sum(dim=1)
    logits_E = logits_E + bias_C[candidate_E]

    weights_E = torch.bincount(query_E, minlength=len(queries_BP))[query_E].to(logits_E.dtype).reciprocal()
    return log_sums_B.mean() - (weights_E * logits_E).sum() / len(queries_BP)


class _LogSumExp(torch.autograd.Function):
    """log Σ exp(query · candidate + bias) over the candidates: (B,)."""

    @staticmethod
    def forward(ctx: Any, queries_BP: Tensor, candidates_CP: Tensor, bias_C: Tensor) -> Tensor:
        log_sums_B = queries_BP.new_empty(len(queries_BP))
        for rows in blocks(len(queries_BP), _block_rows(candidates_CP)):
            log_sums_B[rows] = torch.addmm(bias_C, queries_BP[rows], candidates_CP.T).logsumexp(dim=1)
        ctx.save_for_backward(queries_BP, candidates_CP, bias_C, log_sums_B)
        return log_sums_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries_BP, candidates_CP, bias_C, log_sums_B = ctx.saved_tensors
        query_gradients = torch.empty_like(queries_BP)
        candidate_gradients = torch.zeros_like(candidates_CP)
        bias_gradients = torch.zeros_like(bias_C)

        for rows in blocks(len(queries_BP), _block_rows(candidates_CP)):
            # The logits of the forward pass were not kept; they are recomputed block by block.
            logits = torch.addmm(bias_C, queries_BP[rows], candidates_CP.T)
            weights = logits.sub_(log_sums_B[rows, None]).exp_().mul_(gradient_B[rows, None])
            query_gradients[rows] = weights @ candidates_CP
            candidate_gradients.addmm_(weights.T, queries_BP[rows])
            bias_gradients += weights.sum(dim=0)
        return query_gradients, candidate_gradients, bias_gradients


def _block_rows(candidates_CP: Tensor) -> int:
    return max(1, _BLOCK_LOGITS // max(1, len(candidates_CP)))
