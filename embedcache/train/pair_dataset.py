"""The pairs of a cache as a dataset of PyTorch, for training loops and losses of the user's own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from embedcache.arrays import Ints, distinct
from embedcache.dataset.inputs import NamedFeatures
from embedcache.dataset.pairs import choose_language
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import Part
from embedcache.errors import DataError
from embedcache.progress import AnyProgress, to_progress
from embedcache.settings import replace_flat
from embedcache.train.data import Paths, TrainData, open_data

if TYPE_CHECKING:
    from embedcache.options import SplitOptions


class PairDataset(Dataset[dict[str, Tensor]]):
    """The pairs of items of one or several caches, such as images with each of their captions.

    `dataset[i]` is a pair: for each modality its item, (D,) or (T, D) float32, and `sample`, an int64 number that is
    equal for pairs of one sample, so that a loss can leave out false negatives. A slice, list or array of indices gives
    a batch, (B, D) or (B, T, D) and (B,). A `DataLoader` reads whole batches, in any number of forked or spawned
    workers:

        loader = DataLoader(dataset, batch_size=1024, shuffle=True, num_workers=2)
        for batch in loader:
            loss = my_loss(batch["image"], batch["text"], batch["sample"])

    With `sampler=BatchSampler(RandomSampler(dataset), 1024, False), batch_size=None` no tensor is made per pair.

    Features stay on disk and are mapped into memory, which workers share. Memory: 24 bytes per pair, and the commits of
    the features (under 100 bytes per item).

    Args:
        caches: one cache, or several made by the same encoders.
        feature: features of two modalities, as in `train_projectors`.
        part: `train`, `val` or `test` as `train_projectors` divides the samples. If None, all samples.
        language: language of the captions, or `any` for all. If None, chosen as in `train_projectors`.
        progress: progress of a strict split.
        options: how samples are divided, by the names of `SplitSettings` on the command line, such as `split="key"`.

    Raises:
        UnknownNameError: there is no feature or language of that name.
        UnfinishedError: a feature has missing chunks.
        FingerprintError: different encoders made the caches.
        DataError: no sample has both features, a part is empty, or the number of tokens of a feature varies.
        SettingError: not two modalities, or a split that leaves nothing for a part.

    Example:
        >>> dataset = embedcache.PairDataset("cache", part="train", split="key")
        >>> len(dataset), dataset[0]["image"].shape
        (39, torch.Size([48]))
        >>> batch = dataset[:8]
        >>> batch["text"].shape, batch["sample"].tolist()
        (torch.Size([8, 32]), [0, 1, 2, 4, 6, 7, 9, 10])
    """

    def __init__(
        self,
        caches: Paths,
        *,
        feature: NamedFeatures = None,
        part: Part | None = None,
        language: str | None = None,
        progress: AnyProgress = None,
        **options: Unpack["SplitOptions"],
    ) -> None:
        settings = replace_flat(SplitSettings(), options)
        data = open_data(caches, feature, memory_bytes=0)
        for side in (side for sides in data.sides.values() for side in sides):
            if len(distinct(side.lengths()[side.valid])) > 1:
                raise DataError(
                    f"feature {side.name}: expected the same number of tokens of all items, got several; use a vector, "
                    "or extract kmeans:K or grid:K"
                )
        pairs = data.pairs(choose_language(data.caches, data.sides, language))
        if part is not None:
            pairs = pairs.select(data.split(pairs, settings, progress=to_progress(progress)).rows(part))
        first, second = pairs.all_pairs()
        self.rows: dict[str, Ints] = dict(
            zip(data.features, (pairs.first.rows[first], pairs.second.rows[second]), strict=True)
        )
        self.samples: Ints = pairs.first.samples[first]
        paths = [str(cache.path.absolute()) for cache in data.caches]
        self._request = paths, {modality: feature.name for modality, feature in data.features.items()}
        self._data: TrainData | None = data

    def __repr__(self) -> str:
        paths, features = self._request
        return f"PairDataset({', '.join(paths)}: {len(self):,} pairs of {' and '.join(features.values())})"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice | Sequence[int] | Ints) -> dict[str, Tensor]:
        """Return one pair, or a batch of pairs."""
        indices = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        batch = self._read(np.atleast_1d(indices))
        return batch if indices.ndim else {name: values[0] for name, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several pairs, which are read at once; a `DataLoader` calls this."""
        batch = self._read(np.asarray(indices, np.int64))
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files; a worker process that is not forked opens them again."""
        return {**self.__dict__, "_data": None}

    def _read(self, indices: Ints) -> dict[str, Tensor]:
        if self._data is None:
            self._data = open_data(*self._request, memory_bytes=0)
        tensors = {
            modality: torch.from_numpy(np.require(read(self.rows[modality][indices]).values, np.float32, ["W"]))
            for modality, read in self._data.readers.items()
        }
        return {**tensors, "sample": torch.from_numpy(self.samples[indices])}
