"""Batches of any task, and batches of pairs: which rows of both features a step reads, ahead of the step.

Which rows a batch holds is a pure function of the pairs, the seed and the epoch, for any number of processes.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from embedcache.arrays import Array, Ints, concatenated_ranges, distinct
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import HardNegatives
from embedcache.errors import SettingError
from embedcache.train.data import DrawnViews
from embedcache.train.distributed import check_batches, own_slice
from embedcache.train.losses import Positives

_BUFFER_BLOCKS = 1024
_HARD = 3  # 1 and 2 seed the draws of views
_NUM_PREFETCHED = 3
T = TypeVar("T")


class BatchInput(NamedTuple):
    """Items of one input on the device.

    Args:
        values: (B, D) or (B, T, D), in the dtype on disk.
        lengths: (B,) int64 number of tokens of each item; None: T tokens each.
        rows: (B,) rows of the feature, to name those that are not finite.
    """

    values: Tensor
    lengths: Tensor | None = None
    rows: Ints | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step of this process reads, on the device.

    Args:
        samples: numbers of its samples, to name them if the loss is not finite.
        num_samples: number of samples of all processes.
        inputs: name of an input, such as its modality -> items.
        targets: what the outputs are compared with, as the loss of the task has it.
    """

    samples: Ints
    num_samples: int
    inputs: Mapping[str, BatchInput] = field(default_factory=dict)
    targets: Any = None


class RowBatches:
    """Random batches of rows: each epoch holds every row once, in a new order, in batches of equal size to within one.

    Blocks of `block_rows` neighboring rows are shuffled, then all rows within 1,024 blocks. Raises `SettingError` if a
    batch has fewer rows than torchrun started processes.
    """

    def __init__(self, rows: Ints, *, batch_size: int, seed: int, block_rows: int = 1) -> None:
        self._rows = rows
        self._seed = seed
        self._block_rows = block_rows
        self.num_samples = len(rows)
        self.num_steps = -(-len(rows) // batch_size)
        check_batches(self.num_samples, self.num_steps)

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[Ints]:
        """Iterate over the (B,) rows of each batch of one epoch, from a step on."""
        order = shuffle_blocks(self.num_samples, self._block_rows, np.random.default_rng([self._seed, number]))
        for part in np.array_split(order, self.num_steps)[first_step:]:
            yield self._rows[part]


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Iterate over batches that a thread makes in order, a few ahead of the one that is used."""
    with ThreadPoolExecutor(1, "loader") as executor:
        pending: deque[Future[T | None]] = deque()
        for _ in range(_NUM_PREFETCHED):
            pending.append(executor.submit(next, batches, None))

        # The next batch is ordered before this one is used, so that the thread goes on meanwhile.
        while (batch := pending.popleft().result()) is not None:
            pending.append(executor.submit(next, batches, None))
            yield batch


def to_device(array: Array, device: str) -> Tensor:
    """Return an array as a tensor on a device; to a GPU it is copied through pinned memory."""
    tensor = torch.from_numpy(array)
    torch_device = torch.device(device)
    if torch_device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(torch_device, non_blocking=True)


def shuffle_blocks(count: int, block_rows: int, rng: np.random.Generator) -> Ints:
    """Return 0 … count - 1 in a random order in which numbers stay near those of 1,024 neighboring blocks."""
    if block_rows == 1:
        return rng.permutation(count)

    # The last block may have fewer rows.
    starts = rng.permutation(-(-count // block_rows)) * block_rows
    _, order = concatenated_ranges(starts, np.minimum(block_rows, count - starts))

    size = block_rows * _BUFFER_BLOCKS
    return np.concatenate([rng.permutation(order[start : start + size]) for start in range(0, count, size)])


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """Rows of both features for B samples, one first item per sample, and which items belong together.

    Args:
        samples: (B,) int64 samples.
        first_rows: (B,) int64 rows of the first feature.
        second_rows: (M,) int64 rows of the second feature: one per sample (M = B), or all of each sample, sample after
            sample.
        positives: two (E,) int64 arrays of positions in the batch, of first and of second items, the first ascending:
            those that belong together by `Pairs.relation`.
        mix: lambda of mixup, or None. With mixup, item k is mixed with item k + B/2, the first with weight lambda, and
            positions count mixed items.
        views: number of the view of each row of both features, where views are drawn.
        num_hard: how many of the samples, the last ones, are hard negatives of the others, which the epoch drew.
        excluded: as `positives`: pairs of near-duplicates that do not belong together; None without hard negatives.
    """

    samples: Ints
    first_rows: Ints
    second_rows: Ints
    positives: tuple[Ints, Ints]
    num_hard: int
    mix: float | None = None
    views: tuple[Ints | None, Ints | None] = (None, None)
    excluded: tuple[Ints, Ints] | None = None


def num_batches(num_samples: int, batch_size: int) -> int:
    """Return the number of batches per epoch: the fewest of at most `batch_size` samples.

    A batch has at least two samples, as the other samples are the negatives; so an odd number of samples with a batch
    size of 2 gives one batch of 3.
    """
    return min(-(-num_samples // batch_size), max(1, num_samples // 2))


class PairBatches:
    """Random batches of pairs: each epoch holds every sample once, in a new order.

    A sample comes with one of its first items, such as images, and one or all of its second items, such as captions. An
    epoch is divided into `num_batches` batches of equal size, to within one.

    With hard negatives, batches have fewer samples of the epoch: to each, `num_negatives` of its hard negatives are
    added, drawn anew in each epoch, each sample once per batch, so that a batch has at most `batch_size` samples, all
    of them pairs; a batch of three samples of the epoch, where two fit, has fewer negatives. Pairs of items of one
    near-duplicate group are excluded; they take 16 bytes each.

    Args:
        pairs: items of the training samples.
        batch_size: largest number of samples per batch.
        seed: seed of all draws, together with the number of the epoch.
        captions: second items of a sample: `draw` one per epoch, or `all`.
        block_rows: blocks of this many neighboring samples are shuffled, then all samples within 1,024 blocks.
        mixup: lambda is drawn from Beta(`mixup`, `mixup`) for each batch; 0: no mixup.
        views: of both features; None: the feature itself.
        negatives: hard negatives of each sample; None: there are none.
        num_negatives: hard negatives to draw for each sample and epoch.

    Raises:
        SettingError: two samples with their hard negatives do not fit in a batch.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        batch_size: int,
        seed: int,
        captions: Literal["draw", "all"] = "draw",
        block_rows: int = 1,
        mixup: float = 0.0,
        views: Sequence[DrawnViews | None] = (None, None),
        negatives: HardNegatives | None = None,
        num_negatives: int = 1,
    ) -> None:
        self._pairs = pairs
        self._negatives = negatives
        self._num_negatives = num_negatives
        self._samples = pairs.samples
        self._relation = pairs.relation()
        self._first = _SampleItems(pairs.first, self._samples)
        self._second = _SampleItems(pairs.second, self._samples)

        self._seed = seed
        self._captions = captions
        self._block_rows = block_rows
        self._mixup = mixup
        self._views = views
        self.num_samples = len(self._samples)
        self.batch_size = batch_size

        # Negatives take places in a batch, so fewer samples of the epoch fit.
        if negatives is not None:
            _check_fits(batch_size, self.num_samples, num_negatives, negatives)
        max_samples = batch_size if negatives is None else max(1, batch_size // (1 + num_negatives))
        self.num_steps = num_batches(self.num_samples, max_samples)

    @property
    def smallest(self) -> int:
        """Number of items in the smallest batch, after mixup."""
        return self.num_samples // self.num_steps // (2 if self._mixup else 1)

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[PairRows]:
        """Iterate over the batches of one epoch, from a step on."""
        draws = self._draw(number)
        for step, numbers in enumerate(np.array_split(draws.order_S, self.num_steps)):
            if step >= first_step:
                hard = self._draw_hard(numbers, np.random.default_rng([self._seed, number, _HARD, step]))
                yield self._batch(np.concatenate([numbers, hard]), draws, num_hard=len(hard), mix=draws.mixes[step])

    def _draw(self, number: int) -> "_Draws":
        """Draw the order of the samples, their items and views, and lambda of mixup of one epoch."""
        rng = np.random.default_rng([self._seed, number])
        return _Draws(
            order_S=shuffle_blocks(self.num_samples, self._block_rows, rng),
            first_S=self._first.draw(rng),
            second_S=self._second.draw(rng),
            mixes=rng.beta(self._mixup, self._mixup, self.num_steps) if self._mixup else [None] * self.num_steps,
            views=[None if views is None else views.draw(number) for views in self._views],
        )

    def _draw_hard(self, numbers: Ints, rng: np.random.Generator) -> Ints:
        """Draw hard negatives of some samples, by number in the training part: ascending, each once, none of them."""
        if self._negatives is None:
            return np.empty(0, np.int64)

        # Negatives that are not in the training part get the key 2, above all random keys, so they are chosen last.
        hard_BK = self._negatives.negatives_SK[self._samples[numbers]]
        place_BK = np.searchsorted(self._samples, hard_BK).clip(max=len(self._samples) - 1)
        keys_BK = np.where(self._samples[place_BK] == hard_BK, rng.random(hard_BK.shape), 2.0)

        chosen_BK = np.argsort(keys_BK, axis=1)[:, : self._num_negatives]
        is_some_BK = np.take_along_axis(keys_BK, chosen_BK, axis=1) < 2
        drawn = distinct(np.take_along_axis(place_BK, chosen_BK, axis=1)[is_some_BK])

        # A sample of the batch is a negative already.
        hard = np.setdiff1d(drawn, np.sort(numbers), assume_unique=True)
        num_free = self.batch_size - len(numbers)
        return hard if len(hard) <= num_free else np.sort(rng.choice(hard, num_free, replace=False))

    def _batch(self, numbers: Ints, draws: "_Draws", *, num_hard: int, mix: float | None) -> PairRows:
        """Return the batch of some samples, by number in the training part, of which the last are hard negatives."""
        if mix is not None:
            numbers = numbers[: len(numbers) // 2 * 2]  # half of them are mixed with the other half

        first = draws.first_S[numbers]
        second = self._second.all(numbers) if self._captions == "all" else draws.second_S[numbers]
        positives = self._positives(first, second) if mix is None else self._mixed_positives(first, second)

        first_rows = self._pairs.first.rows[first]
        second_rows = self._pairs.second.rows[second]
        first_views, second_views = draws.views
        return PairRows(
            samples=self._samples[numbers],
            first_rows=first_rows,
            second_rows=second_rows,
            positives=positives,
            num_hard=num_hard,
            mix=mix,
            views=(
                None if first_views is None else first_views[first_rows],
                None if second_views is None else second_views[second_rows],
            ),
            excluded=None if self._negatives is None else self._excluded(first, second, positives, self._negatives),
        )

    def _positives(self, first: Ints, second: Ints) -> tuple[Ints, Ints]:
        """Find all pairs of positions that belong together. Time and memory grow with the batch alone."""
        first_contents = self._pairs.first.contents[first]
        second_contents = self._pairs.second.contents[second]

        # The relation is of all training pairs; only the entries of the batch are read.
        starts = self._relation.indptr[first_contents]
        position, entries = concatenated_ranges(starts, self._relation.indptr[first_contents + 1] - starts)
        entry_numbers, second_positions = _equal_pairs(self._relation.indices[entries], second_contents)
        return position[entry_numbers], second_positions

    def _mixed_positives(self, first: Ints, second: Ints) -> tuple[Ints, Ints]:
        """Find all pairs of mixed items whose first items belong together, and whose second items do too."""
        half = len(first) // 2
        pairs = [self._positives(first[part], second[part]) for part in (slice(half), slice(half, None))]

        # One number stands for a pair of positions, so that pairs are compared as numbers.
        first_codes, second_codes = (rows * half + columns for rows, columns in pairs)
        rows, columns = np.divmod(np.intersect1d(first_codes, second_codes, assume_unique=True), half)
        return rows, columns

    def _excluded(
        self, first: Ints, second: Ints, positives: tuple[Ints, Ints], negatives: HardNegatives
    ) -> tuple[Ints, Ints]:
        """Find the pairs of positions of one near-duplicate group that do not belong together, sorted."""
        first_samples = self._pairs.first.samples[first]
        second_samples = self._pairs.second.samples[second]
        same_group = _equal_pairs(negatives.groups_S[first_samples], negatives.groups_S[second_samples])

        # One number stands for a pair of positions, so that pairs are compared as numbers.
        group_codes, positive_codes = (rows * len(second) + columns for rows, columns in (same_group, positives))
        rows, columns = np.divmod(np.setdiff1d(group_codes, positive_codes, assume_unique=True), len(second))
        return rows, columns


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """What is drawn for one epoch of S training samples.

    Args:
        order_S: numbers of the samples in the training part, in the order of the batches.
        first_S: position in `Pairs.first` of the item that stands for each sample.
        second_S: as `first_S`, in `Pairs.second`.
        mixes: lambda of mixup of each batch; None without mixup.
        views: number of the view of each row of both features, where views are drawn.
    """

    order_S: Ints
    first_S: Ints
    second_S: Ints
    mixes: Array | Sequence[None]
    views: Sequence[Ints | None]


def _check_fits(batch_size: int, num_samples: int, num_negatives: int, negatives: HardNegatives) -> None:
    """Check that a batch has room for two samples with their hard negatives, of which there may be fewer."""
    num_drawn = min(num_negatives, negatives.negatives_SK.shape[1])
    smallest = min(2 * (1 + num_drawn), num_samples)
    if batch_size < smallest:
        raise SettingError(
            f"batch_size: expected at least {smallest}, for two samples and {num_drawn} hard negatives of each, got "
            f"{batch_size}; raise --batch-size, or lower --num-negatives"
        )


def _equal_pairs(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    """Return the positions of all equal values of two arrays, those of the left ascending."""
    order = np.argsort(right, kind="stable")
    start = np.searchsorted(right[order], left)
    left_positions, places = concatenated_ranges(start, np.searchsorted(right[order], left, side="right") - start)
    return left_positions, order[places]


class _SampleItems:
    """The items of each sample, as positions in `Items`."""

    def __init__(self, items: Items, samples: Ints) -> None:
        # Items are in the order of their samples unless pairs are shuffled; only then is an order stored.
        is_ordered = bool((items.samples[1:] >= items.samples[:-1]).all())
        self._order = None if is_ordered else np.argsort(items.samples, kind="stable")
        ordered = items.samples if self._order is None else items.samples[self._order]

        self._first = np.searchsorted(ordered, samples)
        self._count = np.searchsorted(ordered, samples, side="right") - self._first

    def draw(self, rng: np.random.Generator) -> Ints:
        offset = (rng.random(len(self._count)) * self._count).astype(np.int64)
        return self._positions(self._first + offset)

    def all(self, numbers: Ints) -> Ints:
        _, positions = concatenated_ranges(self._first[numbers], self._count[numbers])
        return self._positions(positions)

    def _positions(self, places: Ints) -> Ints:
        return places if self._order is None else self._order[places]


@dataclass(frozen=True, kw_only=True)
class PairTargets:
    """What the loss of a batch of pairs compares with; it is that of all processes.

    Args:
        positives: positions of items that belong together.
        mix: lambda of mixup, or None. This process's items are then its part of the first half, then of the second.
        num_items: modality -> number of items of all processes.
    """

    positives: Positives
    mix: float | None
    num_items: Mapping[str, int]


def load_pairs(batch: PairRows, readers: Mapping[str, Reader | DrawnViews], device: str) -> Batch:
    """Read this process's part of both features, and move it to the device."""
    first, second = (to_device(positions, device) for positions in batch.positives)
    excluded = None
    if batch.excluded is not None:
        excluded_first, excluded_second = (to_device(positions, device) for positions in batch.excluded)
        excluded = excluded_first, excluded_second

    num_halves = 1 if batch.mix is None else 2
    inputs: dict[str, BatchInput] = {}
    num_items: dict[str, int] = {}

    # With mixup a process has the same part of both halves, whose items are mixed with each other.
    sides = zip(readers.items(), (batch.first_rows, batch.second_rows), batch.views, strict=True)
    for (modality, read), rows, views in sides:
        num_items[modality] = len(rows) // num_halves
        positions = np.arange(len(rows)).reshape(num_halves, -1)[:, own_slice(num_items[modality])].ravel()
        inputs[modality] = _read(read, rows[positions], None if views is None else views[positions], device)

    return Batch(
        samples=batch.samples,
        num_samples=len(batch.samples) - batch.num_hard,
        inputs=inputs,
        targets=PairTargets(
            positives=Positives(first=first, second=second, excluded=excluded), mix=batch.mix, num_items=num_items
        ),
    )


def _read(read: Reader | DrawnViews, rows: Ints, views: Ints | None, device: str) -> BatchInput:
    if isinstance(read, DrawnViews):
        assert views is not None
        values, lengths = read.read(rows, views)
    else:
        values, lengths = read(rows)
    return BatchInput(to_device(values, device), None if lengths is None else to_device(lengths, device), rows)
