"""Candidate sets and one likelihood: every task asks which of some candidates belongs to an input.

    p(y | x) = exp(scale · similarity(f(x), f(y))) / Σ over candidates z of exp(scale · similarity(f(x), f(z)))

A classifier, a vocabulary and CLIP's loss differ in their candidates alone. "Uni-Perceiver: Pre-training Unified
Architecture for Generic Perception for Zero-shot and Few-shot Tasks" (CVPR 2022).
"""

import math
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, normalize

from embedcache.arrays import Floats, Ints, blocks, distinct
from embedcache.errors import DataError, SettingError

Similarity: TypeAlias = Literal["cosine", "dot"]
Positives: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""(B,) int64, the candidate that belongs to each query; or two (E,) int64, queries and candidates that belong together,
where each query has at least one."""

_BLOCK_LOGITS = 2**20
_TEMPERATURE = 0.07


class Candidates(NamedTuple):
    """Representations that inputs are compared with.

    Args:
        vectors_CP: (C, P) representations.
        bias_C: (C,) added to the logits: a learned bias, or the log-weights of `draw_candidates`.
    """

    vectors_CP: Tensor
    bias_C: Tensor | None = None

    def logits(self, queries_BP: Tensor) -> Tensor:
        """Compute the dot products of queries with all candidates, plus the bias: (B, C)."""
        logits_BC = queries_BP @ self.vectors_CP.T
        return logits_BC if self.bias_C is None else logits_BC + self.bias_C


class NearestNeighbors(Protocol):
    """An index of all candidates, such as a FAISS index of inner products."""

    def search(self, queries_QP: Floats, k: int, /) -> tuple[Floats, Ints]:
        """Return scores and numbers of the k nearest candidates of each query, (Q, K); -1 where none was found."""
        ...


class MinedNegatives:
    """Hard negatives: the k candidates nearest to each positive.

    Args:
        index: index of `vectors_CP`.
        k: negatives per positive.
        vectors_CP: (C, P) float32 vector of each candidate. It need not be its representation in the network.

    Raises:
        SettingError: k is below 1.
    """

    def __init__(self, index: NearestNeighbors, k: int, vectors_CP: Floats) -> None:
        if k < 1:
            raise SettingError(f"k: expected at least 1 negative per positive, got {k}")
        self._index, self.k, self.vectors_CP = index, k, vectors_CP

    def find(self, positives_B: Ints) -> Ints:
        """Find the candidates nearest to each positive, without itself: (B, k) int64 numbers, -1 where there is none.

        They depend on nothing but the vectors and the index, so that a resumed run has the same negatives.
        """
        queries_BP = np.ascontiguousarray(self.vectors_CP[positives_B], np.float32)
        _, found_BK = self._index.search(queries_BP, self.k + 1)
        is_other_BK = found_BK != positives_B[:, None]
        order_BK = np.argsort(~is_other_BK, axis=1, kind="stable")  # itself comes last, wherever it was found
        return np.take_along_axis(found_BK, order_BK, axis=1)[:, : self.k].astype(np.int64)


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


def draw_candidates(
    num_candidates: int, positives_M: Ints, *, limit: int, rng: np.random.Generator, mined: Ints | None = None
) -> CandidateSample:
    """Draw candidates for one step if there are too many: all positives of the batch, and others at random.

    A drawn negative stands for as many as were left out: its logit gets log(number of negatives / number drawn), so
    that the sum over the candidates is that over all of them in the mean. Mined negatives stand for themselves.

    Args:
        num_candidates: number of all candidates.
        positives_M: numbers of the positives of a batch.
        limit: most candidates to use; more if there are more positives and mined negatives.
        rng: generator of the draw.
        mined: numbers of hard negatives that are used, too.
    """
    kept = distinct(positives_M if mined is None else np.concatenate([positives_M, mined]))
    if num_candidates <= max(limit, len(kept)):
        return CandidateSample(np.arange(num_candidates), positives_M, None)
    num_left = num_candidates - len(kept)
    drawn = rng.choice(num_left, size=max(1, limit - len(kept)), replace=False, shuffle=False)
    # The i-th number that is not kept: as many kept ones come before it as have at most i other numbers below them.
    others = drawn + np.searchsorted(kept - np.arange(len(kept)), drawn, side="right")
    numbers_C = np.sort(np.concatenate([kept, others]))
    log_weights_C = np.where(np.isin(numbers_C, kept), 0.0, math.log(num_left / len(others)))
    return CandidateSample(numbers_C, np.searchsorted(numbers_C, positives_M), log_weights_C.astype(np.float32))


class Likelihood(nn.Module):
    """The likelihood of candidates given inputs: a softmax over scaled similarities.

    Args:
        similarity: `cosine`, or `dot` for the dot product.
        scale: factor of the similarities, the inverse of the temperature; the initial one if it is learned.
        is_learned: whether the scale is trained, as its logarithm.
        max_scale: largest scale; a learned one is clipped to it, as in CLIP.
    """

    def __init__(
        self,
        *,
        similarity: Similarity = "cosine",
        scale: float = 1 / _TEMPERATURE,
        is_learned: bool = True,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if similarity not in ("cosine", "dot"):
            raise SettingError(f"similarity: expected cosine or dot, got {similarity!r}")
        if not 0 < scale <= max_scale:
            raise SettingError(f"scale: expected a number above 0 and up to {max_scale:g}, got {scale}")
        self.similarity, self.max_scale = similarity, max_scale
        log_scale = torch.tensor(math.log(scale))
        if is_learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The factor of the similarities, a scalar."""
        highest = math.log(self.max_scale)
        # The value is clipped and the gradient is not, so that a scale at its limit can fall again.
        clipped = self.log_scale + (self.log_scale.clamp(max=highest) - self.log_scale).detach()
        return clipped.exp()

    def scaled(self, queries_BP: Tensor, candidates_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and candidates whose dot products are the logits."""
        if self.similarity == "cosine":
            queries_BP, candidates_CP = normalize(queries_BP, dim=-1), normalize(candidates_CP, dim=-1)
        return self.scale * queries_BP, candidates_CP

    def logits(self, queries_BP: Tensor, candidates: Candidates) -> Tensor:
        """Compute the logits of all candidates: (B, C)."""
        scaled_BP, vectors_CP = self.scaled(queries_BP, candidates.vectors_CP)
        return Candidates(vectors_CP, candidates.bias_C).logits(scaled_BP)

    def forward(
        self, queries_BP: Tensor, candidates: Candidates, positives: Positives, *, smoothing: float = 0.0
    ) -> Tensor:
        """Compute the negative log-likelihood of the positives, the mean over queries; see `cross_entropy_over`."""
        scaled_BP, vectors_CP = self.scaled(queries_BP, candidates.vectors_CP)
        return cross_entropy_over(scaled_BP, vectors_CP, positives, bias_C=candidates.bias_C, smoothing=smoothing)


class LabelHead(nn.Module):
    """What prompt tuning adds to the logits of a closed set of candidates: w · logit + W · representation + b.

    It starts from w = 1, W = 0 and b = 0, where it changes nothing.
    """

    def __init__(self, width: int, num_candidates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(width, num_candidates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def extend(self, scaled_BP: Tensor, vectors_CP: Tensor, queries_BP: Tensor) -> tuple[Tensor, Candidates]:
        """Return queries and candidates whose logits are the new ones.

        Args:
            scaled_BP: queries that `Likelihood.scaled` returns.
            vectors_CP: candidates that it returns.
            queries_BP: representations of the inputs.
        """
        queries = torch.cat([self.weight * scaled_BP, queries_BP], dim=1)
        return queries, Candidates(torch.cat([vectors_CP, self.linear.weight], dim=1), self.linear.bias)


def cross_entropy_over(
    queries_BP: Tensor,
    candidates_CP: Tensor,
    positives: Positives,
    *,
    bias_C: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy between targets and the softmax of query · candidate + bias, the mean over queries.

    The target of a query is uniform over its positives, then smoothed: (1 - ε) · target + ε / C. The value and the
    gradients are those of `torch.nn.functional.cross_entropy` on (B, C) logits, of which only a block of rows is ever
    held, about 2^20 logits; the backward pass recomputes it.

    Raises:
        DataError: positives of another number of queries.
    """
    if not isinstance(positives, tuple):
        if len(positives) != len(queries_BP):
            raise DataError(f"positives: expected one of each of {len(queries_BP)} queries, got {len(positives)}")
        positives = torch.arange(len(positives), device=positives.device), positives
    of_query_E, of_candidate_E = positives
    bias_C = candidates_CP.new_zeros(len(candidates_CP)) if bias_C is None else bias_C.to(candidates_CP.dtype)
    log_sums_B: Tensor = _LogSumExp.apply(queries_BP, candidates_CP, bias_C)  # type: ignore[no-untyped-call]
    # `embedding` adds up gradients in one order; indexing does so in any order with several threads.
    logits_E = (embedding(of_query_E, queries_BP) * embedding(of_candidate_E, candidates_CP)).sum(dim=1)
    logits_E = logits_E + bias_C[of_candidate_E]
    weights_E = torch.bincount(of_query_E, minlength=len(queries_BP))[of_query_E].to(logits_E.dtype).reciprocal()
    loss = log_sums_B.mean() - (1 - smoothing) * (weights_E * logits_E).sum() / len(queries_BP)
    if smoothing:
        loss = loss - smoothing * (queries_BP.mean(dim=0) @ candidates_CP.mean(dim=0) + bias_C.mean())
    return loss


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
        of_candidates, of_bias = torch.zeros_like(candidates_CP), torch.zeros_like(bias_C)
        for rows in blocks(len(queries_BP), _block_rows(candidates_CP)):
            logits = torch.addmm(bias_C, queries_BP[rows], candidates_CP.T)
            weights = logits.sub_(log_sums_B[rows, None]).exp_().mul_(gradient_B[rows, None])
            of_queries[rows] = weights @ candidates_CP
            of_candidates.addmm_(weights.T, queries_BP[rows])
            of_bias += weights.sum(dim=0)
        return of_queries, of_candidates, of_bias


def _block_rows(candidates_CP: Tensor) -> int:
    return max(1, _BLOCK_LOGITS // max(1, len(candidates_CP)))
