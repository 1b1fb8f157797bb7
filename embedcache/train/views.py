"""Views drawn per epoch: an item is read from one of several views of its feature, anew in each epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedcache.arrays import Array, Floats, Inputs, Ints
from embedcache.dataset.inputs import Reader
from embedcache.errors import SettingError
from embedcache.modalities import MODALITIES


def parse_views(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return modality -> view -> probability of words such as `image=plain:2,flip:1` or `audio=plain,noise`.

    Raises:
        SettingError: a word of another form, a modality twice, a view twice, or a weight that is not positive.
    """
    views: dict[str, dict[str, float]] = {}
    for word in words:
        modality, _, listed = word.partition("=")
        if modality not in MODALITIES or not listed or modality in views:
            reason = "one word per modality" if modality in views else f"a modality of {', '.join(MODALITIES)}"
            raise SettingError(f"views: expected {reason}, as in image=plain:0.5,flip:0.5, got {word!r}")
        weights: dict[str, float] = {}
        for part in listed.split(","):
            name, separator, number = part.partition(":")
            weight = _parse_weight(number) if separator else 1.0
            if not name or name in weights or weight is None:
                raise SettingError(
                    f"views: expected different views, with weights above 0, as in image=plain:1,flip:1, got {word!r}"
                )
            weights[name] = weight
        total = sum(weights.values())
        views[modality] = {name: weight / total for name, weight in weights.items()}
    return views


def _parse_weight(text: str) -> float | None:
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if 0 < weight < float("inf") else None


@dataclass(frozen=True, kw_only=True)
class DrawnViews:
    """Reads each row from a view that is drawn for it from the seed and the epoch, for any number of processes.

    Args:
        readers: view -> reader of its rows.
        probabilities: view -> probability, in the order of `readers`.
        num_rows: rows of the feature.
        seed: random seed.
        side: 0 or 1, so that the views of both sides of a pair are drawn independently.
    """

    readers: Mapping[str, Reader]
    probabilities: Mapping[str, float]
    num_rows: int
    seed: int
    side: int

    def draw(self, epoch: int) -> Ints:
        """Return the number of the view of each row in an epoch: (N,) int64."""
        rng = np.random.default_rng([self.seed, epoch, 1 + self.side])
        bounds: Floats = np.cumsum(list(self.probabilities.values()))[:-1]
        numbers: Ints = np.searchsorted(bounds, rng.random(self.num_rows), side="right")
        return numbers

    def read(self, rows: Ints, views: Ints) -> Inputs:
        """Read each row from the view of a number."""
        return read_views(self.readers, rows, views)


def read_views(readers: Mapping[str, Reader], rows: Ints, views: Ints) -> Inputs:
    """Read each row from the view of a number, in the order of `readers`; padded to the longest."""
    parts: list[tuple[Ints, Inputs]] = []
    for number, read in enumerate(readers.values()):
        positions = np.flatnonzero(views == number)
        if len(positions):
            parts.append((positions, read(rows[positions])))
    return merge_inputs(parts, len(rows), np.result_type(*(inputs.values.dtype for _, inputs in parts)))


def merge_inputs(parts: Sequence[tuple[Ints, Inputs]], count: int, dtype: np.dtype[Any]) -> Inputs:
    """Merge inputs that were read for some positions each into one, padded to the longest."""
    shape = np.max([inputs.values.shape[1:] for _, inputs in parts], axis=0)
    values: Array = np.zeros((count, *shape), dtype)
    lengths = None if parts[0][1].lengths is None else np.zeros(count, np.int64)
    for positions, inputs in parts:
        values[positions, : inputs.values.shape[1]] = inputs.values
        if lengths is not None and inputs.lengths is not None:
            lengths[positions] = inputs.lengths
    return Inputs(values, lengths)
