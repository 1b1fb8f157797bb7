"""Batches of aligned rows, a pure function of the pairs, the seed and the epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.sparse import csr_array

from embedcache.arrays import Array, Ints
from embedcache.cache.feature import Feature
from embedcache.cache.pairs import Items, Pairs

Reader: TypeAlias = Callable[[Ints], Array]
"""Gathers rows of one feature: (B,) int64 -> (B, D)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Aligned items of B samples: rows of the two features, and which image goes with which text.

    Args:
        image_rows: (B,) int64.
        text_rows: (B,) int64.
        related: two (E,) int64 arrays of positions in the batch, image and text, the first ascending: those that
            belong together, by `Pairs.relation`.
    """

    image_rows: Ints
    text_rows: Ints
    related: tuple[Ints, Ints]


class Batches:
    """Draws batches: each epoch every sample once, in a new order, with one of its images and one of its captions.

    Args:
        pairs: the training pairs.
        batch_size: samples in a batch; an epoch is cut into equal batches of at most this size.
        seed: of order and drawing.
    """

    def __init__(self, pairs: Pairs, *, batch_size: int, seed: int) -> None:
        self._pairs = pairs
        self._samples = pairs.samples
        self._relation = pairs.relation()
        self._seed = seed
        self.num_steps = -(-len(self._samples) // batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Go through one epoch."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._samples))
        images = _draw(self._pairs.image, self._samples, rng)[order]
        texts = _draw(self._pairs.text, self._samples, rng)[order]
        for image, text in zip(
            np.array_split(images, self.num_steps),
            np.array_split(texts, self.num_steps),
            strict=True,
        ):
            yield self._batch(image, text)

    def _batch(self, image: Ints, text: Ints) -> Batch:
        sides = self._pairs
        return Batch(
            image_rows=sides.image.rows[image],
            text_rows=sides.text.rows[text],
            related=_related(self._relation, sides.image.contents[image], sides.text.contents[text]),
        )


def _related(relation: csr_array, images: Ints, texts: Ints) -> tuple[Ints, Ints]:
    """Find all pairs of positions whose contents belong together. Time and memory grow with the batch alone."""
    starts = relation.indptr[images]
    position, found = _spread(starts, relation.indptr[images + 1] - starts)
    contents = relation.indices[found]
    order = np.argsort(texts, kind="stable")
    first = np.searchsorted(texts[order], contents)
    count = np.searchsorted(texts[order], contents, side="right") - first
    again, place = _spread(first, count)
    return position[again], order[place]


def _spread(starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Give counts[k] numbers from starts[k] on, for each range k: (E,) the k of each, and (E,) the numbers."""
    which = np.repeat(np.arange(len(starts)), counts)
    before = np.cumsum(counts) - counts
    return which, starts[which] + np.arange(len(which)) - before[which]


def _draw(side: Items, samples: Ints, rng: np.random.Generator) -> Ints:
    order = np.argsort(side.samples, kind="stable")
    ordered = side.samples[order]
    first = np.searchsorted(ordered, samples)
    count = np.searchsorted(ordered, samples, side="right") - first
    drawn: Ints = order[first + (rng.random(len(samples)) * count).astype(np.int64)]
    return drawn


def reader(feature: Feature, *, memory_bytes: float) -> Reader:
    """Get the quickest way to gather rows: from memory where the feature fits, else from its maps.

    Args:
        feature: a finished vector feature.
        memory_bytes: how much may be read into memory.
    """
    if np.prod(feature.shape, dtype=float) * np.dtype(feature.dtype).itemsize > memory_bytes:
        return feature.gather
    loaded = feature.load()
    return lambda rows: loaded[rows]
