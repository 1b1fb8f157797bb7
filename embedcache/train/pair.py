"""The aligned pair as a task: two towers trained by a contrastive loss, validated by retrieval in both directions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from embedcache.arrays import blocks
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.metrics import best_ranks, recall_at
from embedcache.modalities import directions
from embedcache.processes import autocast
from embedcache.projectors.base import project
from embedcache.projectors.pair import AlignedPair
from embedcache.registry import bind
from embedcache.train.batches import Batch, BatchInput, PairBatches, PairTargets, load_pairs
from embedcache.train.data import DrawnViews
from embedcache.train.distributed import gather_rows
from embedcache.train.losses import LOSSES, TILE_ROWS
from embedcache.train.settings import LossSettings, TrainSettings

_KS = (1, 5, 10)
_MAX_SAMPLES = 5000


@dataclass(kw_only=True)
class PairTask:
    """The aligned pair as a `Task`.

    Args:
        network: the pair.
        plan: which pairs are in which batch.
        readers: modality -> reader of its feature, or of the views that are drawn.
        validation: None on all processes but the first.
        keys: key of every sample.
        about: numbers of samples, for the report.
    """

    network: AlignedPair
    plan: PairBatches
    readers: Mapping[str, Reader | DrawnViews]
    validation: "Validation | None"
    settings: TrainSettings
    keys: Sequence[str]
    about: Mapping[str, Any]

    @cached_property
    def module(self) -> "PairObjective":
        """The pair with its loss, at the temperature that training begins with."""
        if self.settings.loss.temperature is not None:
            self.network.set_temperature(self.settings.loss.temperature)
        return PairObjective(self.network, self.settings.loss, precision=self.settings.machine.precision)

    @property
    def num_steps(self) -> int:
        """Batches per epoch; none for towers without parameters, such as those of asif."""
        has_parameters = any(True for tower in self.network.towers for _ in tower.parameters())
        return self.plan.num_steps if has_parameters else 0

    def batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Iterate over the batches of an epoch, from a step on."""
        for rows in self.plan.epoch(epoch, first_step=first_step):
            yield load_pairs(rows, self.readers, self.settings.machine.device)

    def measure(self) -> dict[str, float]:
        """Compute the validation recalls; the score is the mean of R@1, R@5 and R@10 over both directions."""
        assert self.validation is not None
        recalls = self.validation.recalls(self.network)
        return {**recalls, "score": fmean(recalls.values())}


class Validation:
    """Retrieval in both directions on the validation pairs, of at most 5,000 evenly spaced samples."""

    def __init__(self, pairs: Pairs, first: Reader, second: Reader, *, device: str) -> None:
        samples = pairs.samples
        if len(samples) > _MAX_SAMPLES:
            samples = samples[np.linspace(0, len(samples) - 1, _MAX_SAMPLES).astype(np.int64)]

        # The items are read once, as every epoch is measured on the same ones.
        pairs = pairs.select(samples)
        self._inputs = first(pairs.first.rows), second(pairs.second.rows)
        self._positives = pairs.positives()
        self._device = device

    def recalls(self, pair: AlignedPair) -> dict[str, float]:
        """Compute validation recall, such as `i2t r@1` to `t2i r@10`, each from 0 to 1."""
        pair.eval()
        first, second = (
            project(tower, inputs, device=self._device) for tower, inputs in zip(pair.towers, self._inputs, strict=True)
        )

        first_positions, second_positions = self._positives
        forward_name, backward_name = directions(pair.modalities)
        ranks = {
            forward_name: best_ranks(first, second, (first_positions, second_positions)),
            backward_name: best_ranks(second, first, (second_positions, first_positions)),
        }
        return {f"{direction} r@{k}": recall_at(ranks[direction], k) for direction in ranks for k in _KS}


MAX_VECTORS = 32_768
"""Vectors per forward pass of a tower; a larger batch is processed in parts, which the backward pass recomputes."""


class PairObjective(nn.Module):
    """A pair and its loss, with all parameters that are trained.

    Memory: two embeddings per modality, the activations of `MAX_VECTORS` vectors, and the tiles of the loss. Parameters
    of the loss are trained with those of the pair. The precision is that of matrix products only.

    With `widths` the loss is a sum over prefixes of the shared space, each of them and the whole, all of weight 1:
    "Matryoshka Representation Learning", Kusupati et al. 2022, equation 1.
    """

    def __init__(self, pair: AlignedPair, settings: LossSettings, *, precision: str) -> None:
        super().__init__()
        self.pair = pair
        self.contrast = bind(LOSSES, settings.name)()
        self._structure = settings.structure
        self._widths = sorted({*settings.widths, pair.towers[0].output_width})
        self._precision = precision

    def scalars(self) -> dict[str, float]:
        """Return the temperature, to be logged."""
        return {"temperature": self.pair.temperature.item()}

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar."""
        # Inputs are mixed before a tower, with the same weight on both sides.
        targets: PairTargets = batch.targets
        inputs = [_mix(side, targets.mix) for side in batch.inputs.values()]

        # The items of all processes are negatives of each other, so the embeddings are gathered.
        counts = list(targets.num_items.values())
        outputs = [
            gather_rows(self._embed(tower, side), count)
            for tower, side, count in zip(self.pair.towers, inputs, counts, strict=True)
        ]

        # A prefix is scaled to length 1 by itself.
        loss = outputs[0].new_zeros(())
        for width in self._widths:
            first, second = (unit_rows(output[:, :width]) for output in outputs)
            with self._autocast(first):
                loss = loss + self.contrast(first, second, self.pair.scale, targets.positives)
        if not self._structure:
            return loss

        divergences = [
            structure(gather_rows(side.values.float(), count), output)
            for side, output, count in zip(inputs, outputs, counts, strict=True)
        ]
        return loss + self._structure * (divergences[0] + divergences[1]) / 2

    def _embed(self, tower: nn.Module, inputs: BatchInput) -> Tensor:
        """Project this process's items: (b, P) float32, not normalized."""
        num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
        part_rows = max(1, MAX_VECTORS // num_tokens)

        # A batch that is normalized must not be divided.
        if len(inputs.values) <= part_rows or has_batch_norm(tower):
            return self._project(tower, inputs.values, inputs.lengths)

        return torch.cat(
            [
                checkpoint(
                    self._project,
                    tower,
                    inputs.values[rows],
                    None if inputs.lengths is None else inputs.lengths[rows],
                    use_reentrant=False,
                )
                for rows in blocks(len(inputs.values), part_rows)
            ]
        )

    def _project(self, tower: nn.Module, values: Tensor, lengths: Tensor | None) -> Tensor:
        with self._autocast(values):
            projected: Tensor = tower(values, lengths)
        return projected.float()

    def _autocast(self, values: Tensor) -> torch.autocast:
        return autocast(values.device.type, self._precision)


def has_batch_norm(tower: nn.Module) -> bool:
    """Return whether a tower normalizes over the items of a batch, of which there must be two."""
    return any(isinstance(module, nn.BatchNorm1d) for module in tower.modules())


_MIN_LENGTH = 1e-12  # of `normalize`
_ROWS_PER_BLOCK = 256  # of width 512, in float32: half of a core's cache


def unit_rows(vectors_BP: Tensor) -> Tensor:
    """Scale rows to length 1, as `normalize` does: to the same bits, in half the time on a CPU."""
    if vectors_BP.device.type != "cpu":
        return normalize(vectors_BP)
    unit_BP: Tensor = _UnitRows.apply(vectors_BP)  # type: ignore[no-untyped-call]
    return unit_BP


class _UnitRows(torch.autograd.Function):
    # Autograd's backward pass of `normalize` goes nine times through memory; here blocks of rows stay in the cache.
    @staticmethod
    def forward(ctx: Any, vectors_BP: Tensor) -> Tensor:
        lengths_B1 = vectors_BP.norm(dim=-1, keepdim=True)
        unit_BP: Tensor = vectors_BP / lengths_B1.clamp_min(_MIN_LENGTH)
        ctx.save_for_backward(unit_BP, lengths_B1)
        return unit_BP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BP: Tensor) -> Tensor:
        unit_BP, lengths_B1 = ctx.saved_tensors
        divisors_B1 = lengths_B1.clamp_min(_MIN_LENGTH)
        result_BP = torch.empty_like(unit_BP)
        for rows in blocks(len(unit_BP), _ROWS_PER_BLOCK):
            unit = unit_BP[rows]
            divisors = divisors_B1[rows]
            gradient = gradient_BP[rows]

            # Below the least length the divisor is constant, so no gradient flows through the length.
            length_gradients = (unit / divisors).mul_(gradient).sum(dim=-1, keepdim=True)
            length_gradients.masked_fill_(lengths_B1[rows] < _MIN_LENGTH, 0.0)

            torch.div(gradient, divisors, out=result_BP[rows])
            result_BP[rows].sub_(unit * length_gradients)
        return result_BP


def _mix(inputs: BatchInput, mix: float | None) -> BatchInput:
    """Mix the first half of the items with the second, vectors of length 1; lambda is that of both modalities.

    FuseMix: "Data-Efficient Multimodal Fusion on a Single GPU" (CVPR 2024), section 4.
    """
    if mix is None:
        return inputs
    first, second = normalize(inputs.values.float()).chunk(2)
    return inputs._replace(values=mix * first + (1 - mix) * second)


def structure(inputs_BD: Tensor, outputs_BP: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Compute how much the neighborhoods of a batch change by projection, from 0 to log 2: the STRUCTURE regularizer.

    "With Limited Data for Multimodal Alignment, Let the STRUCTURE Guide You" (2025): inputs and outputs are centered
    over the batch and scaled to length 1; an item's neighborhood is the softmax over its similarities, itself included;
    the result is the mean Jensen-Shannon divergence between both neighborhoods of an item, in nats.

    Only the paper's first level: level l compares the l-th powers of both (B, B) matrices, at a cost cubic in B. The
    authors' code scales before it centers.

    No (B, B) matrix is held: the backward pass recomputes each tile. Memory: about fifteen tiles of `TILE_ROWS`
    × B. No gradient flows into the (B, D) inputs; the (B, P) outputs have any length. 1 or 2 items give 0. The
    temperature is the authors' setting.
    """
    unit_inputs_BD, unit_outputs_BP = (normalize(side - side.mean(dim=0), dim=1) for side in (inputs_BD, outputs_BP))
    result: Tensor = _Divergence.apply(unit_inputs_BD, unit_outputs_BP, temperature)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    # One node for all tiles: with a checkpoint per tile, long-lived tensors between them kept malloc from reusing freed
    # tiles, and a batch of 16,384 took as much memory as the (B, B) matrix.
    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(before, after)
        ctx.temperature = temperature
        total = after.new_zeros(())
        for _, log_p, log_q, log_middle in _neighborhoods(before, after, temperature):
            total += (log_p.exp() * (log_p - log_middle)).sum() + (log_q.exp() * (log_q - log_middle)).sum()
        return total / (2 * len(after))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        before, after = ctx.saved_tensors
        total = torch.zeros_like(after)
        for rows, _, log_q, log_middle in _neighborhoods(before, after, ctx.temperature):
            q = log_q.exp()
            slopes = log_q - log_middle  # derivative of twice the divergence by q

            # A similarity is of two items: the gradient of the tile goes to its columns, and to its rows.
            weights = q * (slopes - (q * slopes).sum(dim=1, keepdim=True))
            total.addmm_(weights.T, after[rows])
            total[rows].addmm_(weights, after)
        return None, total * (gradient / (2 * len(after) * ctx.temperature)), None


def _neighborhoods(before: Tensor, after: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Iterate over tiles of T rows: (T, B) logarithms of both neighborhoods and of their mean."""
    for rows in blocks(len(after), TILE_ROWS):
        log_p, log_q = (torch.log_softmax(side[rows] @ side.T / temperature, dim=1) for side in (before, after))
        yield rows, log_p, log_q, torch.logaddexp(log_p, log_q) - math.log(2)
