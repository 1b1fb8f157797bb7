"""From a loaded batch to a loss: mixup, both towers, embeddings gathered over processes, the loss, its regularizer."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from embedcache.arrays import blocks
from embedcache.projectors.pair import AlignedPair
from embedcache.train.distributed import gather_rows
from embedcache.train.loader import LoadedBatch, LoadedSide
from embedcache.train.losses import LOSSES, structure
from embedcache.train.settings import LossSettings

PART_VECTORS = 32_768
"""Vectors that a tower takes at once: a larger batch goes through it in parts, which backward makes again."""


class Objective(nn.Module):
    """All that is trained, and the loss of a batch.

    Memory: two embeddings a side, what the towers keep of `PART_VECTORS` vectors, and the loss's tiles.

    Args:
        pair: the towers and the temperature.
        settings: which loss; parameters of its own are trained with the pair's.
        precision: `bfloat16` takes the matrix products of the towers and of the loss in it; the rest stays float32.
    """

    def __init__(self, pair: AlignedPair, settings: LossSettings, *, precision: str) -> None:
        super().__init__()
        self.pair = pair
        self.loss = LOSSES.load(settings.name)()
        self._structure = settings.structure
        self._bfloat16 = precision == "bfloat16"

    def forward(self, loaded: LoadedBatch) -> Tensor:
        """Give the loss, a scalar."""
        sides = [_mixed(side, loaded.batch.share) for side in (loaded.image, loaded.text)]
        outputs = [
            gather_rows(self._embed(tower, side), side.count)
            for tower, side in zip((self.pair.image, self.pair.text), sides, strict=True)
        ]
        images, texts = (normalize(output, dim=-1) for output in outputs)
        with self._autocast(images):
            loss: Tensor = self.loss(images, texts, self.pair.scale, loaded.related)
        if not self._structure:
            return loss
        kept = [
            structure(gather_rows(side.values.float(), side.count), output)
            for side, output in zip(sides, outputs, strict=True)
        ]
        return loss + self._structure * (kept[0] + kept[1]) / 2

    def _embed(self, tower: nn.Module, side: LoadedSide) -> Tensor:
        num_tokens = side.values.shape[1] if side.values.ndim == 3 else 1
        part_rows = max(1, PART_VECTORS // num_tokens)
        if len(side.values) <= part_rows or _sees_whole_batch(tower):
            return self._run(tower, side.values, side.lengths)
        return torch.cat(
            [
                checkpoint(
                    self._run,
                    tower,
                    side.values[rows],
                    None if side.lengths is None else side.lengths[rows],
                    use_reentrant=False,
                )
                for rows in blocks(len(side.values), part_rows)
            ]
        )

    def _run(self, tower: nn.Module, values: Tensor, lengths: Tensor | None) -> Tensor:
        with self._autocast(values):
            projected: Tensor = tower(values, lengths)
        return projected.float()

    def _autocast(self, values: Tensor) -> torch.autocast:
        return torch.autocast(values.device.type, dtype=torch.bfloat16, enabled=self._bfloat16)


def _sees_whole_batch(tower: nn.Module) -> bool:
    """Say whether a tower has batch normalization, which parts of a batch would change."""
    return any(isinstance(module, nn.BatchNorm1d) for module in tower.modules())


def _mixed(side: LoadedSide, share: float | None) -> LoadedSide:
    """Mix the first half of the items into the second, rows of length 1.

    Latent mixup with one share for both sides, as in FuseMix, "Data-Efficient Multimodal Fusion on a Single GPU"
    (CVPR 2024), section 4.
    """
    if share is None:
        return side
    first, second = normalize(side.values.float(), dim=-1).chunk(2)
    return replace(side, values=share * first + (1 - share) * second)
