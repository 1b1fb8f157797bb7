"""From a loaded batch to its loss: mixup, both towers, embeddings gathered over processes, loss and regularizer."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from embedcache.arrays import blocks
from embedcache.projectors.pair import AlignedPair
from embedcache.train.batches import LoadedBatch, LoadedInputs
from embedcache.train.distributed import gather_rows
from embedcache.train.losses import LOSSES, structure
from embedcache.train.settings import LossSettings

MAX_VECTORS = 32_768
"""Vectors per forward pass of a tower; a larger batch is processed in parts, which the backward pass recomputes."""


class Objective(nn.Module):
    """All trained parameters, and the loss of a batch.

    Memory: two embeddings per modality, the activations of `MAX_VECTORS` vectors, and the tiles of the loss. Parameters
    of the loss are trained with those of the pair. The precision `bfloat16` is that of matrix products only.
    """

    def __init__(self, pair: AlignedPair, settings: LossSettings, *, precision: str) -> None:
        super().__init__()
        self.pair = pair
        self.loss = LOSSES.load(settings.name)()
        self._structure = settings.structure
        self._bfloat16 = precision == "bfloat16"

    def forward(self, loaded: LoadedBatch) -> Tensor:
        """Return the loss, a scalar."""
        inputs = [_mix(values, loaded.batch.mix) for values in (loaded.first, loaded.second)]
        outputs = [
            gather_rows(self._embed(tower, values), values.num_items)
            for tower, values in zip(self.pair.towers, inputs, strict=True)
        ]
        images, texts = (normalize(output, dim=-1) for output in outputs)
        with self._autocast(images):
            loss: Tensor = self.loss(images, texts, self.pair.scale, loaded.positives)
        if not self._structure:
            return loss
        divergences = [
            structure(gather_rows(values.values.float(), values.num_items), output)
            for values, output in zip(inputs, outputs, strict=True)
        ]
        return loss + self._structure * (divergences[0] + divergences[1]) / 2

    def _embed(self, tower: nn.Module, inputs: LoadedInputs) -> Tensor:
        num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
        part_rows = max(1, MAX_VECTORS // num_tokens)
        has_batch_norm = any(isinstance(module, nn.BatchNorm1d) for module in tower.modules())
        if len(inputs.values) <= part_rows or has_batch_norm:  # a batch that is normalized must not be divided
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
        return torch.autocast(values.device.type, dtype=torch.bfloat16, enabled=self._bfloat16)


def _mix(inputs: LoadedInputs, mix: float | None) -> LoadedInputs:
    """Mix the first half of the items with the second, vectors of length 1; lambda is that of both modalities.

    FuseMix: "Data-Efficient Multimodal Fusion on a Single GPU" (CVPR 2024), section 4.
    """
    if mix is None:
        return inputs
    first, second = normalize(inputs.values.float(), dim=-1).chunk(2)
    return replace(inputs, values=mix * first + (1 - mix) * second)
