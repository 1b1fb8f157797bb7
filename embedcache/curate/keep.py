"""Which duplicates stay: exact copies by hash, an order by a keep rule, and a greedy choice along near-duplicates."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Bools, Floats, Ints, distinct
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.pairs import read_items
from embedcache.errors import SettingError
from embedcache.files import AnyPath
from embedcache.modalities import MODALITIES, order_pair
from embedcache.neighbors.pairs import cosine_limit
from embedcache.registry import unknown_name
from embedcache.runs import PAIR, Run
from embedcache.store.cache import Cache

FIRST, BEST = "first", "best:"
_IS_NUMBER = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
_COPY = 2.0  # sorts above every cosine
NO_DISTANCE = 256  # in place of a hash distance, of which 255 is the largest
SAME_PICTURE = 24  # largest hash distance of an image to its copies, docs/about/results.md


@dataclass(frozen=True, kw_only=True)
class SimilarPairs:
    """Unique pairs of items whose cosine is at least a limit, the smaller number first, sorted by both numbers."""

    left: Ints  # (L,)
    right: Ints  # (L,)
    cosines: Floats  # (L,)
    distances: Array  # (L,) int16 hash distances of images, see `embedcache.curate.dedup`, or NO_DISTANCE

    def select(self, mask: Bools) -> "SimilarPairs":
        """Return the pairs of a mask."""
        return SimilarPairs(**{name: values[mask] for name, values in vars(self).items()})

    def between(self, low: float, high: float = np.inf) -> "SimilarPairs":
        """Return the pairs of at least one cosine and below another."""
        return self.select((self.cosines >= cosine_limit(low)) & (self.cosines < cosine_limit(high)))


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The M usable items of one feature, numbered by content: equal BLAKE2b hashes in the commits."""

    item_rows: Ints  # (M,) ascending
    samples: Ints  # (M,) sample of each item, ascending
    content_ids: Ints  # (M,) from 0 to C - 1 in order of first appearance
    unique_rows: Ints  # (C,) ascending, row of the first item of each content

    @property
    def num_copies(self) -> int:
        """Number of items that are copies of an earlier one."""
        return len(self.content_ids) - len(self.unique_rows)


def choose_modality(cache: Cache, modality: str | None, run: AnyPath | None = None) -> str:
    """Return the modality of the items to compare.

    This is the given one, or the first, of those of the run if there is one, that the cache has features of.
    """
    if modality is not None:
        return modality
    names = order_pair(MODALITIES if run is None else Run.open(run, kind=PAIR).modalities)
    return next((name for name in names if cache.features(name)), names[0])


def find_copies(cache: Cache, feature: InputFeature, samples: Ints | None = None) -> Copies:
    """Number the usable items of a feature, or of some samples, by content.

    Raises `UnfinishedError` if chunks of the feature are missing.
    """
    items = read_items([cache], [feature])
    items = items if samples is None else items.select(samples)
    _, first, contents = np.unique(items.contents, return_index=True, return_inverse=True)
    order = np.argsort(first)  # the first item of a content may have failed where a copy of it did not
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return Copies(
        item_rows=items.rows, samples=items.samples, content_ids=number[contents], unique_rows=items.rows[first[order]]
    )


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """R removed samples in row order, with the sample that each duplicates."""

    samples: Ints  # (R,)
    kept: Ints  # (R,) a sample that stays
    cosines: Floats  # (R,) of the two; for a sample with several items, the smallest of its items' cosines
    is_copy: Bools  # (R,) whether all of its items have the bytes, text or pixels of items that stay
    distances: Array  # (R,) int16 hash distance of the two images; NO_DISTANCE of equal bytes, and without pixels


def choose_removed(copies: Copies, pairs: SimilarPairs, order: Ints) -> RemovedSamples:
    """Visit samples in an order and remove one if each of its items equals, or is paired with, an item that stays.

    Of several partners, that with the same bytes is named, else that with the same pixels, else the most similar.

    So each removed sample has a partner that stays, unlike with connected components: of a chain a - b - c, a and c may
    be far apart, and here both stay. SemDeDup compares with earlier samples whether they stay or not. `order` has all
    samples with items, those to keep first.
    """
    graph = _Graph(pairs, len(copies.unique_rows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(copies.samples))])
    content_ids = copies.content_ids[np.argsort(copies.samples, kind="stable")]
    num_like_C = np.bincount(copies.content_ids) - 1 + np.diff(graph.starts)  # copies and near-duplicates
    may_be_duplicate = np.bincount(copies.samples, weights=num_like_C[copies.content_ids]).astype(bool)
    holder_C = np.full(len(copies.unique_rows), -1, np.int64)
    removed = []
    for sample in order[may_be_duplicate[order]].tolist():  # the others stay
        own = content_ids[starts[sample] : starts[sample + 1]]
        partners = [graph.partner(content, holder_C) for content in own.tolist()]
        if all(kept >= 0 for kept, _, _ in partners):
            removed.append((sample, *min(partners, key=lambda partner: partner[1])))
        else:
            holder_C[own[holder_C[own] < 0]] = sample
    removed.sort()
    samples, kept_samples, cosines, distances = zip(*removed, strict=True) if removed else ((), (), (), ())
    return RemovedSamples(
        samples=np.array(samples, np.int64),
        kept=np.array(kept_samples, np.int64),
        cosines=np.minimum(np.array(cosines, np.float32), 1),
        is_copy=(np.array(cosines) == _COPY) | (np.array(distances) <= SAME_PICTURE),
        distances=np.array(distances, np.int16),
    )


class _Graph:
    """Near-duplicates of each content: the same picture first, then the most similar."""

    def __init__(self, pairs: SimilarPairs, num_contents: int) -> None:
        ends = np.concatenate([pairs.left, pairs.right])
        cosines = np.concatenate([pairs.cosines, pairs.cosines])
        distances = np.concatenate([pairs.distances, pairs.distances])
        order = np.lexsort((-cosines, distances > SAME_PICTURE, ends))
        self._others = np.concatenate([pairs.right, pairs.left])[order]
        self._cosines = cosines[order]
        self._distances = distances[order]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(ends, minlength=num_contents))])

    def partner(self, content: int, holder_C: Ints) -> tuple[int, float, int]:
        """Return the sample that stays and holds the most similar content, -1 if none does; cosine; hash distance."""
        if holder_C[content] >= 0:
            return int(holder_C[content]), _COPY, NO_DISTANCE
        here = slice(self.starts[content], self.starts[content + 1])
        holders = holder_C[self._others[here]]
        held = np.flatnonzero(holders >= 0)
        if not len(held):
            return -1, 0.0, NO_DISTANCE
        best = self.starts[content] + held[0]
        return int(holders[held[0]]), float(self._cosines[best]), int(self._distances[best])


def order_samples(keep: str, copies: Copies, cache: Cache) -> Ints:
    """Sort the samples that have items by a keep rule.

    `first`: in row order. `best:COLUMN`: the largest number in a column of the samples first, samples without a number
    last.
    """
    samples = distinct(copies.samples)
    if keep == FIRST:
        return samples
    return samples[np.argsort(-_read_column(cache, keep.removeprefix(BEST))[samples], kind="stable")]


def check_keep(keep: str, cache: Cache) -> None:
    """Check a keep rule: `UnknownNameError` for another rule or column, `SettingError` if it holds no numbers."""
    if keep.startswith(BEST):
        _read_column(cache, keep.removeprefix(BEST))
    elif keep != FIRST:
        raise unknown_name("keep rule", keep, (FIRST, f"{BEST}COLUMN"))


def _read_column(cache: Cache, name: str) -> Floats:
    if name not in cache.columns:
        raise unknown_name("column", name, cache.columns, where=f"of {cache.path}")
    column = cache.column(name)
    if not any(is_number(column.type) for is_number in _IS_NUMBER):
        raise SettingError(f"keep: expected numbers in column {name!r} of {cache.path}, got {column.type}")
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy()  # null is NaN
    return np.where(np.isnan(values), -np.inf, values)
