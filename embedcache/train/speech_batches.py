"""Batches of utterances: which are in a batch, which view and item of each is read, and how both are augmented."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.dataset.inputs import PLAIN
from embedcache.train.utterances import Utterances, stack_inputs

_BUCKET_BATCHES = 8  # batches whose utterances are sorted by length together
_LONGEST_SPAN = 10  # frames that are masked at once, 0.4 s


@dataclass(frozen=True, kw_only=True)
class SpeechAugmentation:
    """What training changes in each utterance, drawn anew in every epoch.

    Args:
        views: stream -> view -> probability.
        missing: stream -> probability that an utterance is treated as if it had no such stream. One stream always
            stays.
        shift_s: lips are early or late by up to this many seconds.
        swapped: probability that the lips are those of another utterance.
        masked: mean fraction of the frames of each stream that are replaced by their mean, in spans of up to 0.4 s.
    """

    views: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)
    shift_s: float = 0.0
    swapped: float = 0.0
    masked: float = 0.0


class DrawnBatch(NamedTuple):
    """Utterances of a batch, and what was drawn for them: a pure function of seed, epoch and step.

    Args:
        numbers_B: (B,) utterances.
        seed: seed of the run; with epoch and step, that of what is drawn for them.
    """

    numbers_B: Ints
    seed: int
    epoch: int
    step: int


class UtteranceBatches:
    """Random batches of utterances of similar lengths: each epoch holds every utterance once."""

    def __init__(self, lengths_S: Ints, *, batch_size: int, seed: int) -> None:
        self._lengths_S, self._batch_size, self._seed = lengths_S, batch_size, seed
        self.num_samples, self.num_steps = len(lengths_S), -(-len(lengths_S) // batch_size)

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[DrawnBatch]:
        """Iterate over the batches of one epoch, from a step on."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(self.num_samples)
        buckets = [order[rows] for rows in blocks(self.num_samples, self._batch_size * _BUCKET_BATCHES)]
        ordered = np.concatenate([bucket[np.argsort(self._lengths_S[bucket], kind="stable")] for bucket in buckets])
        parts = np.array_split(ordered, self.num_steps)
        for step in rng.permutation(self.num_steps)[first_step:].tolist():
            yield DrawnBatch(parts[step], self._seed, number, step)


def read_augmented(
    utterances: Utterances,
    numbers_B: Ints,
    stacks: Mapping[str, int],
    augmentation: SpeechAugmentation,
    rng: np.random.Generator,
) -> dict[str, tuple[Array, Ints]]:
    """Read utterances with a drawn view and item of each stream, and augment them: stream -> values and lengths.

    Args:
        stacks: stream -> number of frames to put side by side.
    """
    is_swapped_B = rng.random(len(numbers_B)) < augmentation.swapped
    others_B = np.where(is_swapped_B, rng.integers(len(utterances), size=len(numbers_B)), numbers_B)
    inputs = {}
    for name, stream in utterances.streams.items():
        rows_B = stream.rows(others_B if name == "video" else numbers_B, rng.integers(2**31, size=len(numbers_B)))
        inputs[name] = stream.read(rows_B, _draw_views(utterances, name, augmentation, len(numbers_B), rng))
    kept = np.flatnonzero(~is_swapped_B)
    utterances.require_close_lengths({name: values.take(kept) for name, values in inputs.items()}, numbers_B[kept])
    streams = {}
    for name, values in inputs.items():
        furthest = round(augmentation.shift_s * utterances.streams[name].rate_hz) if name == "video" else 0
        shifts_B = rng.integers(-furthest, furthest + 1, size=len(numbers_B))
        stacked_BTD, lengths_B = stack_inputs(values, stacks[name], shifts_B)
        streams[name] = mask_spans(stacked_BTD, lengths_B, augmentation.masked, rng), lengths_B
    return streams


def _draw_views(
    utterances: Utterances, name: str, augmentation: SpeechAugmentation, count: int, rng: np.random.Generator
) -> Ints:
    weights = augmentation.views.get(name, {PLAIN: 1.0})
    numbers = np.array([utterances.view_number(name, view) for view in weights])
    chances = np.array(list(weights.values()))
    drawn: Ints = numbers[rng.choice(len(numbers), size=count, p=chances / chances.sum())]
    return drawn


def draw_missing(
    chances: Mapping[str, float], streams: Sequence[str], count: int, rng: np.random.Generator
) -> dict[str, Bools]:
    """Draw which utterances lose a stream; none loses all of them: stream -> (B,) bool."""
    if len(streams) < 2:
        return {}
    limits = np.cumsum([chances.get(name, 0.0) for name in streams])
    which_B = np.searchsorted(limits, rng.random(count), side="right")
    return {name: which_B == number for number, name in enumerate(streams)}


def mask_spans(values_BTD: Array, lengths_B: Ints, fraction: float, rng: np.random.Generator) -> Array:
    """Replace some frames of each item by the mean of its frames, in spans of 1 to 10 frames.

    How much of an item is masked is drawn uniformly, with the mean `fraction`. Frames are not replaced by zeros, which
    would be unlike any frame: channels of frozen encoders are far from zero, by up to 14 standard deviations.
    """
    if not fraction:
        return values_BTD
    is_masked_BT = np.zeros(values_BTD.shape[:2], bool)
    for row, length in enumerate(lengths_B.tolist()):
        wanted = round(rng.uniform(max(0.0, 2 * fraction - 1), min(1.0, 2 * fraction)) * length)
        while (lacking := wanted - np.count_nonzero(is_masked_BT[row])) > 0:
            start, span = rng.integers(length), min(lacking, rng.integers(1, _LONGEST_SPAN + 1))
            is_masked_BT[row, start : min(start + span, length)] = True
    is_valid_BT1 = (np.arange(values_BTD.shape[1]) < lengths_B[:, None])[..., None]
    means_B1D = values_BTD.mean(axis=1, keepdims=True, dtype=np.float32, where=is_valid_BT1).astype(values_BTD.dtype)
    return np.where(is_masked_BT[..., None], means_B1D, values_BTD)
