"""Candidate sets and one likelihood: every task asks which of some candidates belongs to an input.

    p(y | x) = exp(scale · cosine(f(x), f(y))) / Σ over candidates z of exp(scale · cosine(f(x), f(z)))

A classifier, a vocabulary and CLIP's loss differ in their candidates alone. "Uni-Perceiver: Pre-training Unified
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
"""Two (E,) int64, queries and candidates that belong together, where each query has at least one."""

_BLOCK_LOGITS = 2**20
_SCALE, _MAX_SCALE = 1 / 0.07, 100.0


class CandidateSample(NamedTuple):
    """Some of the candidates, in ascending order, and where M positives are among them.

    Args:
        numbers_C: (C,) int64, number of each among all candidates.
        positives_M: (M,) int64, position of each positive in `numbers_C`.
        log_weights_C: (C,) float32, added to their logits; None: all candidates are in the sample.
    """

    numbers_C: Ints
    positives_M: Ints
    log_weights_C: Floats | None


def draw_candidates(num_candidates: int, positives_M: Ints, *, limit: int, rng: np.random.Generator) -> CandidateSample:
    """Draw candidates for one step if there are too many: all positives of the batch, and others at random.

    A drawn negative stands for as many as were left out: its logit gets log(number of negatives / number drawn), so
    that the sum over the candidates is that over all of them in the mean.

    Args:
        num_candidates: number of all candidates.
        positives_M: numbers of the positives of a batch.
        limit: most candidates to use; more if there are more positives.
        rng: generator of the draw.
    """
    kept = distinct(positives_M)
    if num_candidates <= max(limit, len(kept)):
        return CandidateSample(np.arange(num_candidates), positives_M, None)

    num_negatives = num_candidates - len(kept)
    drawn = rng.choice(num_negatives, size=max(1, limit - len(kept)), replace=False, shuffle=False)
    # The i-th number that is not kept: as many kept ones come before it as have at most i other numbers below them.
    negatives = drawn + np.searchsorted(kept - np.arange(len(kept)), drawn, side="right")

    numbers_C = np.sort(np.concatenate([kept, negatives]))
    log_weights_C = np.where(np.isin(numbers_C, kept), 0.0, math.log(num_negatives / len(negatives)))
    return CandidateSample(numbers_C, np.searchsorted(numbers_C, positives_M), log_weights_C.astype(np.float32))


class Likelihood(nn.Module):
    """The likelihood of candidates given inputs: a softmax over cosines, scaled by the inverse of a temperature.

    The scale is learned as its logarithm, from 1 / 0.07, and clipped to 100, as in CLIP.
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
    """Compute the cross-entropy between targets and the softmax of query · candidate + bias, the mean over queries.

    The target of a query is uniform over its positives. The value and the gradients are those of
    `torch.nn.functional.cross_entropy` on (B, C) logits, of which only a block of rows is ever in memory, about 2^20
    logits; the backward pass recomputes it.
    """
    of_query_E, of_candidate_E = positives
    bias_C = candidates_CP.new_zeros(len(candidates_CP)) if bias_C is None else bias_C.to(candidates_CP.dtype)
    log_sums_B: Tensor = _LogSumExp.apply(queries_BP, candidates_CP, bias_C)  # type: ignore[no-untyped-call]

    # `embedding` adds up gradients in one order; indexing does so in any order with several threads.
    logits_E = (embedding(of_query_E, queries_BP) * embedding(of_candidate_E, candidates_CP)).sum(dim=1)
    logits_E = logits_E + bias_C[of_candidate_E]

    weights_E = torch.bincount(of_query_E, minlength=len(queries_BP))[of_query_E].to(logits_E.dtype).reciprocal()
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
        of_queries = torch.empty_like(queries_BP)
        of_candidates = torch.zeros_like(candidates_CP)
        of_bias = torch.zeros_like(bias_C)

        for rows in blocks(len(queries_BP), _block_rows(candidates_CP)):
            logits = torch.addmm(bias_C, queries_BP[rows], candidates_CP.T)
            weights = logits.sub_(log_sums_B[rows, None]).exp_().mul_(gradient_B[rows, None])
            of_queries[rows] = weights @ candidates_CP
            of_candidates.addmm_(weights.T, queries_BP[rows])
            of_bias += weights.sum(dim=0)
        return of_queries, of_candidates, of_bias


def _block_rows(candidates_CP: Tensor) -> int:
    return max(1, _BLOCK_LOGITS // max(1, len(candidates_CP)))
