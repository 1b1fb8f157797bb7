"""The aligned pair as a task: two towers trained by a contrastive loss, validated by retrieval in both directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import ClassVar

import numpy as np

from embedcache.arrays import check_finite
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Pairs
from embedcache.errors import DataError
from embedcache.metrics.ranking import best_ranks, recall_at
from embedcache.modalities import directions
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import project
from embedcache.train.batches import LoadedBatch
from embedcache.train.loader import Loader
from embedcache.train.objective import Objective
from embedcache.train.settings import LossSettings, Precision

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
    precision: Precision
    keys: Sequence[str]
    forward_flops: float

    @property
    def parts(self) -> dict[str, Sequence[str]]:
        """The towers by modality, and the temperature."""
        return pair_parts(self.module)

    @cached_property
    def objective(self) -> Objective:
        """The loss of a batch."""
        return Objective(self.module, self.loss, precision=self.precision)

    def count(self, batch: LoadedBatch) -> int:
        """Return the number of samples of a batch."""
        return len(batch.batch.samples)

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
