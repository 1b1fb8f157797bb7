"""The samples that encoder pairs are compared on: drawn from a cache, cut into parts, put into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.arrays import Ints
from embedcache.dataset.inputs import InputFeature, Reader
from embedcache.dataset.pairs import Pairs, pair_items
from embedcache.dataset.settings import SplitSettings
from embedcache.dataset.splits import make_split
from embedcache.errors import DataError, SettingError
from embedcache.metrics.intervals import Estimate, chance_estimate
from embedcache.metrics.ranking import chance_recall
from embedcache.store.cache import Cache

LEAST_SAMPLES = 20
_NUM_BLOCKS = 50


def draw(
    cache: Cache,
    images: Sequence[InputFeature],
    texts: Sequence[InputFeature],
    language: str | None,
    num_samples: int,
    seed: int,
) -> Pairs:
    """Draw samples without replacement from those that have an image and a text with all of the features.

    Raises:
        UnfinishedError, UnknownNameError: as of `pair_items`.
        DataError: fewer than 20 samples have them.
    """
    pairs = pair_items([cache], images[:1], texts[:1], language=language)
    image, text = (
        items.where(np.logical_and.reduce([side.valid for side in sides])[items.rows])
        for items, sides in ((pairs.image, images), (pairs.text, texts))
    )
    samples = np.intersect1d(image.samples, text.samples)
    if len(samples) < LEAST_SAMPLES:
        raise DataError(
            f"{len(samples)} samples of {cache.path} have all of the features; at least {LEAST_SAMPLES} are needed: "
            "compare fewer features, or index more samples"
        )
    if len(samples) > num_samples:
        samples = np.random.default_rng(seed).choice(samples, num_samples, replace=False)
    return Pairs(image=image.of(samples), text=text.of(samples))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The samples that are compared, and their parts.

    Args:
        pairs: their items.
        train: the items that the probe is fitted on.
        held: those that it is measured on.
        groups: (S,) a number for each sample in order of `samples`; near-duplicates share one.
        blocks: (S,) the block of each, for the jackknife.
    """

    pairs: Pairs
    train: Pairs
    held: Pairs
    groups: Ints
    blocks: Ints

    @property
    def samples(self) -> Ints:
        """The samples, ascending: (S,) int64."""
        return self.pairs.samples

    def check(self, k: int) -> None:
        """Refuse a k that leaves no sample out.

        Raises:
            SettingError: says which there are.
        """
        if not 0 < k < len(self.samples):
            raise SettingError(
                f"k is {k}, and {len(self.samples)} samples are compared; give a k from 1 to {len(self.samples) - 1}"
            )

    def groups_of(self, samples: Ints) -> Ints:
        """The groups of some of the samples."""
        groups: Ints = self.groups[np.searchsorted(self.samples, samples)]
        return groups

    def places(self, part: Pairs) -> tuple[Ints, Ints]:
        """Where the images and the texts of a part stand among those of all samples."""
        return (
            np.searchsorted(self.pairs.image.rows, part.image.rows),
            np.searchsorted(self.pairs.text.rows, part.text.rows),
        )

    def chance(self, k: int) -> dict[str, Estimate]:
        """Recall at k that ranking the held-out items at random gives: `i2t` and `t2i`."""
        image_M, text_M = self.held.positives()
        sides = {"i2t": (image_M, self.held.text), "t2i": (text_M, self.held.image)}
        return {
            way: chance_estimate(chance_recall(np.bincount(query_M), len(candidates.rows), k), len(np.unique(query_M)))
            for way, (query_M, candidates) in sides.items()
        }


def cut(pairs: Pairs, cache: Cache, sides: tuple[InputFeature, InputFeature], settings: SplitSettings) -> Drawn:
    """Cut samples into parts, and leave the test part out.

    Args:
        pairs: the items of the samples.
        cache: whose they are.
        sides: decide what near-duplicates are, where the split is strict.
        settings: of the split.

    Raises:
        DataError: too few are left, or none in a part.
        SettingError, SourceError, UnknownNameError: as of `make_split`.
    """
    split = make_split(_Paired([cache], *sides), pairs, settings)
    train, held = pairs.of(split.rows("train")), pairs.of(split.rows("val"))
    both = np.union1d(train.samples, held.samples)
    if len(both) < LEAST_SAMPLES or not (len(train.samples) and len(held.samples)):
        raise DataError(
            f"of {len(pairs.samples)} samples of {cache.path} with all features {len(train.samples)} are for training "
            f"and {len(held.samples)} for validation; at least {LEAST_SAMPLES} are needed, some of each: compare "
            "fewer features, or give another split"
        )
    groups = np.array(split.groups)[both]
    return Drawn(pairs=pairs.of(both), train=train, held=held, groups=groups, blocks=_blocks(groups))


@dataclass(frozen=True)
class _Paired:
    """What a split is made for: the two sides that decide what near-duplicates are."""

    caches: Sequence[Cache]
    image: InputFeature
    text: InputFeature

    @property
    def keys(self) -> list[str]:
        keys: list[str] = self.caches[0].samples["key"].to_pylist()
        return keys

    @property
    def read_image(self) -> Reader:
        return self.image.read

    @property
    def read_text(self) -> Reader:
        return self.text.read


def _blocks(groups: Ints) -> Ints:
    """Share whole groups out to blocks of about equal size, the largest group first: (S,) the block of each sample."""
    _, group_S, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    filled = np.zeros(min(_NUM_BLOCKS, len(sizes)), np.int64)
    block_G = np.empty(len(sizes), np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        block_G[group] = filled.argmin()
        filled[block_G[group]] += sizes[group]
    block_S: Ints = block_G[group_S]
    return block_S
