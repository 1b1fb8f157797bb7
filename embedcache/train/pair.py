"""The aligned pair as a task: two towers trained by a contrastive loss, validated by retrieval in both directions.

The objective takes a loaded batch to its loss: mixup, both towers, embeddings gathered over processes, regularizer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from embedcache.arrays import blocks, check_finite
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.devices import autocast
from embedcache.errors import DataError
from embedcache.metrics.ranking import best_ranks, recall_at
from embedcache.modalities import directions
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import project
from embedcache.train.batches import Loader
from embedcache.train.distributed import gather_rows
from embedcache.train.losses import LOSSES, TILE_ROWS
from embedcache.train.pair_batches import LoadedBatch, LoadedInputs
from embedcache.train.settings import LossSettings

_KS = (1, 5, 10)
_MAX_SAMPLES = 5000


@dataclass(kw_only=True)
class PairTask:
    """The aligned pair as a `Task`.

    Args:
        module: the pair.
        validation: None on all processes but the first.
        keys: key of every sample, to name those of a batch with a bad loss.
        forward_flops: operations of a forward pass of one batch.
    """

    unit: ClassVar[str] = "pairs"

    module: AlignedPair
    loader: Loader
    validation: "Validation | None"
    loss: LossSettings
    precision: str
    keys: Sequence[str]
    forward_flops: float

    @property
    def parts(self) -> dict[str, Sequence[str]]:
        """The towers by modality, and the temperature."""
        return pair_parts(self.module)

    @cached_property
    def objective(self) -> "Objective":
        """The loss of a batch."""
        return Objective(self.module, self.loss, precision=self.precision)

    def count(self, batch: LoadedBatch) -> int:
        """Return the number of samples of the epoch in a batch, without those added as hard negatives."""
        return len(batch.batch.samples) - batch.batch.num_hard

    def measure(self) -> dict[str, float]:
        """Compute the validation recalls."""
        if self.validation is None:
            raise AssertionError("only the first process has validation pairs")
        return self.validation.recalls(self.module)

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the mean of R@1, R@5 and R@10 over both directions."""
        return fmean(measures.values())

    def watch(self) -> dict[str, float]:
        """Return the temperature."""
        return {"temperature": self.module.temperature.item()}

    def explain(self, batch: LoadedBatch, *, loss: float, step: int) -> DataError:
        """Return an error that names the values, or else the samples, of a bad loss."""
        for name, inputs in zip(self.module.modalities, (batch.first, batch.second), strict=True):
            values = inputs.values.float().cpu().numpy()
            check_finite(values, f"at step {step}, the {name} feature", rows=inputs.rows)
        keys = [self.keys[sample] for sample in batch.batch.samples[:5].tolist()]
        return DataError(
            f"the loss is {loss} at step {step} with temperature {self.module.temperature.item():.4g}, in the batch of "
            f"the {len(batch.batch.samples):,} keys {', '.join(keys)} …; lower --lr, or check the features "
            "with: embedcache inspect"
        )


def pair_parts(pair: AlignedPair) -> dict[str, Sequence[str]]:
    """Return the parts of a pair: `image`, `text` and `temperature` of images and texts."""
    return {**{modality: (modality,) for modality in pair.modalities}, "temperature": ("log_scale",)}


class Validation:
    """Retrieval in both directions on the validation pairs, of at most 5,000 evenly spaced samples."""

    def __init__(self, pairs: Pairs, first: Reader, second: Reader, *, device: str) -> None:
        samples = pairs.samples
        if len(samples) > _MAX_SAMPLES:
            samples = samples[np.linspace(0, len(samples) - 1, _MAX_SAMPLES).astype(np.int64)]
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
        of_first, of_second = self._positives
        there, back = directions(pair.modalities)
        ranks = {
            there: best_ranks(first, second, (of_first, of_second)),
            back: best_ranks(second, first, (of_second, of_first)),
        }
        return {f"{direction} r@{k}": recall_at(ranks[direction], k) for direction in ranks for k in _KS}


MAX_VECTORS = 32_768
"""Vectors per forward pass of a tower; a larger batch is processed in parts, which the backward pass recomputes."""


class Objective(nn.Module):
    """All trained parameters, and the loss of a batch.

    Memory: two embeddings per modality, the activations of `MAX_VECTORS` vectors, and the tiles of the loss. Parameters
    of the loss are trained with those of the pair. The precision is that of matrix products only.

    With `widths` the loss is a sum over prefixes of the shared space, each of them and the whole, all of weight 1:
    "Matryoshka Representation Learning", Kusupati et al. 2022, equation 1.
    """

    def __init__(self, pair: AlignedPair, settings: LossSettings, *, precision: str) -> None:
        super().__init__()
        self.pair = pair
        self.loss = LOSSES.load(settings.name)()
        self._structure = settings.structure
        self._widths = sorted({*settings.widths, pair.towers[0].output_width})
        self._precision = precision

    def forward(self, loaded: LoadedBatch) -> Tensor:
        """Return the loss, a scalar."""
        inputs = [_mix(side, loaded.batch.mix) for side in (loaded.first, loaded.second)]
        outputs = [
            gather_rows(self._embed(tower, side), side.num_items)
            for tower, side in zip(self.pair.towers, inputs, strict=True)
        ]
        loss = outputs[0].new_zeros(())
        for width in self._widths:
            images, texts = (unit_rows(output[:, :width]) for output in outputs)
            with self._autocast(images):
                loss = loss + self.loss(images, texts, self.pair.scale, loaded.positives)
        if not self._structure:
            return loss
        divergences = [
            structure(gather_rows(side.values.float(), side.num_items), output)
            for side, output in zip(inputs, outputs, strict=True)
        ]
        return loss + self._structure * (divergences[0] + divergences[1]) / 2

    def _embed(self, tower: nn.Module, inputs: LoadedInputs) -> Tensor:
        """Project this process's items: (b, P) float32, not normalized."""
        num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
        part_rows = max(1, MAX_VECTORS // num_tokens)
        if len(inputs.values) <= part_rows or has_batch_norm(tower):  # a batch that is normalized must not be divided
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
        divisors_B1, result_BP = lengths_B1.clamp_min(_MIN_LENGTH), torch.empty_like(unit_BP)
        for rows in blocks(len(unit_BP), _ROWS_PER_BLOCK):
            unit, divisors, gradient = unit_BP[rows], divisors_B1[rows], gradient_BP[rows]
            of_lengths = (unit / divisors).mul_(gradient).sum(dim=-1, keepdim=True)
            of_lengths.masked_fill_(lengths_B1[rows] < _MIN_LENGTH, 0.0)
            torch.div(gradient, divisors, out=result_BP[rows])
            result_BP[rows].sub_(unit * of_lengths)
        return result_BP


def _mix(inputs: LoadedInputs, mix: float | None) -> LoadedInputs:
    """Mix the first half of the items with the second, vectors of length 1; lambda is that of both modalities.

    FuseMix: "Data-Efficient Multimodal Fusion on a Single GPU" (CVPR 2024), section 4.
    """
    if mix is None:
        return inputs
    first, second = normalize(inputs.values.float()).chunk(2)
    return replace(inputs, values=mix * first + (1 - mix) * second)


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
    before_BD, after_BP = (normalize(side - side.mean(dim=0), dim=1) for side in (inputs_BD, outputs_BP))
    result: Tensor = _Divergence.apply(before_BD, after_BP, temperature)  # type: ignore[no-untyped-call]
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
            q, slopes = log_q.exp(), log_q - log_middle  # slopes: derivative of twice the divergence by q
            weights = q * (slopes - (q * slopes).sum(dim=1, keepdim=True))
            total.addmm_(weights.T, after[rows])
            total[rows].addmm_(weights, after)
        return None, total * (gradient / (2 * len(after) * ctx.temperature)), None


def _neighborhoods(before: Tensor, after: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Iterate over tiles of T rows: (T, B) logarithms of both neighborhoods and of their mean."""
    for rows in blocks(len(after), TILE_ROWS):
        log_p, log_q = (torch.log_softmax(side[rows] @ side.T / temperature, dim=1) for side in (before, after))
        yield rows, log_p, log_q, torch.logaddexp(log_p, log_q) - math.log(2)
