"""Batches of aligned rows, a pure function of the pairs, the seed and the epoch: the same for any number of readers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from embedcache.arrays import Ints, concatenated_ranges
from embedcache.dataset.pairs import Items, Pairs

_BUFFER_BLOCKS = 1024


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Aligned items of B samples: rows of the two sides, and which image goes with which text.

    Args:
        samples: (B,) int64.
        image_rows: (B,) int64, one of each sample.
        text_rows: (M,) int64; one of each sample, M = B, or all of each, sample after sample.
        related: two (E,) int64 arrays of positions in the batch, image and text, the first ascending: those that
            belong together, by `Pairs.relation`.
        share: of mixup. None: no mixup. Else item k and item k + B/2 make one, the first with this share, and
            positions count those.
    """

    samples: Ints
    image_rows: Ints
    text_rows: Ints
    related: tuple[Ints, Ints]
    share: float | None = None


class Batches:
    """Draws batches: each epoch every sample once, in a new order, with one of its images and its captions.

    Args:
        pairs: the training pairs.
        batch_size: samples in a batch; an epoch is cut into equal batches of at most this size, and at least two.
        seed: of order and drawing.
        captions: `draw` one a sample, or `all`.
        block_rows: samples that stay neighbors: blocks of so many are shuffled, then all samples within 1,024 blocks.
        mixup: a of Beta(a, a), from which each batch's share is drawn; 0: no mixup.
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
    ) -> None:
        self._pairs = pairs
        self._samples = pairs.samples
        self._relation = pairs.relation()
        self._images, self._texts = _BySample(pairs.image, self._samples), _BySample(pairs.text, self._samples)
        self._seed, self._captions, self._block_rows, self._mixup = seed, captions, block_rows, mixup
        self.num_samples, self.batch_size = len(self._samples), batch_size
        self.num_steps = min(-(-self.num_samples // batch_size), max(1, self.num_samples // 2))

    def epoch(self, number: int, *, first_step: int = 0) -> Iterator[Batch]:
        """Go through one epoch, from one of its batches on."""
        rng = np.random.default_rng([self._seed, number])
        order = shuffle_blocks(len(self._samples), self._block_rows, rng)
        images, texts = self._images.draw(rng)[order], self._texts.draw(rng)[order]
        shares = rng.beta(self._mixup, self._mixup, self.num_steps) if self._mixup else [None] * self.num_steps
        for step, part in enumerate(np.array_split(np.arange(len(order)), self.num_steps)):
            if step >= first_step:
                chosen = self._texts.all(order[part]) if self._captions == "all" else texts[part]
                yield self._batch(self._samples[order[part]], images[part], chosen, shares[step])

    def _batch(self, samples: Ints, image: Ints, text: Ints, share: float | None) -> Batch:
        sides = self._pairs
        if share is None:
            related = self._related(image, text)
        else:
            half = len(image) // 2
            samples, image, text = samples[: 2 * half], image[: 2 * half], text[: 2 * half]
            related = _both(self._related(image[:half], text[:half]), self._related(image[half:], text[half:]), half)
        return Batch(
            samples=samples,
            image_rows=sides.image.rows[image],
            text_rows=sides.text.rows[text],
            related=related,
            share=share,
        )

    def _related(self, image: Ints, text: Ints) -> tuple[Ints, Ints]:
        return _related(self._relation, self._pairs.image.contents[image], self._pairs.text.contents[text])


class _BySample:
    """Finds the items of each sample: positions in `Items`."""

    def __init__(self, side: Items, samples: Ints) -> None:
        self._order = np.argsort(side.samples, kind="stable")
        ordered = side.samples[self._order]
        self._first = np.searchsorted(ordered, samples)
        self._count = np.searchsorted(ordered, samples, side="right") - self._first

    def draw(self, rng: np.random.Generator) -> Ints:
        """Draw one item of each sample."""
        offset = (rng.random(len(self._count)) * self._count).astype(np.int64)
        drawn: Ints = self._order[self._first + offset]
        return drawn

    def all(self, numbers: Ints) -> Ints:
        """Get all items of some samples, in their order."""
        _, places = concatenated_ranges(self._first[numbers], self._count[numbers])
        return self._order[places]


def shuffle_blocks(count: int, block_rows: int, rng: np.random.Generator) -> Ints:
    """Put 0 … count - 1 in a new order in which those within 1,024 blocks of neighbors stay near each other.

    Args:
        count: how many numbers.
        block_rows: neighbors in a block; 1 is an even shuffle of all.
        rng: where the order comes from.
    """
    if block_rows == 1:
        return rng.permutation(count)
    starts = rng.permutation(-(-count // block_rows)) * block_rows
    _, order = concatenated_ranges(starts, np.minimum(block_rows, count - starts))
    size = block_rows * _BUFFER_BLOCKS
    return np.concatenate([rng.permutation(order[start : start + size]) for start in range(0, count, size)])


def _related(relation: csr_array, images: Ints, texts: Ints) -> tuple[Ints, Ints]:
    """Find all pairs of positions whose contents belong together. Time and memory grow with the batch alone."""
    starts = relation.indptr[images]
    position, found = concatenated_ranges(starts, relation.indptr[images + 1] - starts)
    contents = relation.indices[found]
    order = np.argsort(texts, kind="stable")
    first = np.searchsorted(texts[order], contents)
    count = np.searchsorted(texts[order], contents, side="right") - first
    again, place = concatenated_ranges(first, count)
    return position[again], order[place]


def _both(first: tuple[Ints, Ints], second: tuple[Ints, Ints], size: int) -> tuple[Ints, Ints]:
    """Keep the pairs that stand in both: a mixed image goes with a mixed text where both of its parts do."""
    codes = [images * size + texts for images, texts in (first, second)]
    return np.divmod(np.intersect1d(codes[0], codes[1]), size)
