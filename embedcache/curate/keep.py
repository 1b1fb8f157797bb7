"""Exact duplicates: items with equal bytes or text, by the BLAKE2b hashes that the commits hold.

Which of near-duplicate samples stay: chosen greedily, so that each that goes is close to one that stays.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from embedcache.arrays import Bools, Floats, Ints
from embedcache.curate.links import SimilarPairs
from embedcache.dataset.inputs import InputFeature
from embedcache.dataset.pairs import read_items
from embedcache.errors import SettingError
from embedcache.registry import unknown_name
from embedcache.store.cache import Cache


@dataclass(frozen=True, kw_only=True)
class Copies:
    """The items of one feature, and which of them are copies of each other.

    Args:
        item_rows: (M,) int64, the row of each usable item, ascending.
        samples: (M,) int64, its sample, ascending.
        contents: (M,) int64, from 0 to C - 1 in order of first appearance; equal numbers mean equal bytes or text.
        rows: (C,) int64, ascending, the row of the first item of each content.
    """

    item_rows: Ints
    samples: Ints
    contents: Ints
    rows: Ints

    @property
    def num_copies(self) -> int:
        """Items that are copies of an earlier one."""
        return len(self.contents) - len(self.rows)


def find_copies(cache: Cache, side: InputFeature) -> Copies:
    """Find the copies among the usable items of a feature.

    Raises:
        UnfinishedError: the feature has uncommitted chunks.
    """
    items = read_items([cache], [side])
    _, first, contents = np.unique(items.contents, return_index=True, return_inverse=True)
    order = np.argsort(first)  # the first item of a content may have failed where a copy of it did not
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return Copies(item_rows=items.rows, samples=items.samples, contents=number[contents], rows=items.rows[first[order]])


FIRST, FAR, BEST = "first", "far", "best:"
_IS_NUMBER = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """The samples that go, in row order, and who they duplicate. All arrays are (R,).

    Args:
        samples: int64.
        kept: int64, a sample that stays.
        cosines: float32, of the two; of a sample with several items, of that which is least like one that stays.
        is_copy: bool, whether all of its items have the bytes or text of items that stay.
    """

    samples: Ints
    kept: Ints
    cosines: Floats
    is_copy: Bools


def choose_removed(contents: Copies, links: SimilarPairs, order: Ints) -> RemovedSamples:
    """Go through samples in an order; one goes if each of its items equals, or is linked to, an item of one that stays.

    So whatever goes has a partner that stays, which connected components do not give: of a chain a - b - c, a and c
    may be far apart, and here both stay. SemDeDup compares with the earlier ones whether they stay or not.

    Args:
        contents: the items.
        links: near-duplicates among their contents.
        order: (A,) all samples that have items, those to keep rather first.
    """
    graph = _Graph(links, len(contents.rows))
    starts, contents_of = _by_sample(contents)
    holder_C = np.full(len(contents.rows), -1, np.int64)
    found = []
    for sample in order[_is_in_doubt(contents, graph)[order]].tolist():
        own = contents_of[starts[sample] : starts[sample + 1]]
        partners = [graph.partner(content, holder_C) for content in own.tolist()]
        if all(kept >= 0 for kept, _ in partners):
            kept, cosine = min(partners, key=lambda partner: partner[1])
            found.append((sample, kept, cosine))
        else:
            holder_C[own[holder_C[own] < 0]] = sample
    found.sort()
    samples, kept_samples, cosines = zip(*found, strict=True) if found else ((), (), ())
    return RemovedSamples(
        samples=np.array(samples, np.int64),
        kept=np.array(kept_samples, np.int64),
        cosines=np.minimum(np.array(cosines, np.float32), 1),
        is_copy=np.array(cosines) == _COPY,
    )


_COPY = 2.0  # stands before every cosine


class _Graph:
    """Links of each content, the closest first."""

    def __init__(self, links: SimilarPairs, num_contents: int) -> None:
        ends = np.concatenate([links.left, links.right])
        cosines = np.concatenate([links.cosines, links.cosines])
        order = np.lexsort((-cosines, ends))
        self._others = np.concatenate([links.right, links.left])[order]
        self._cosines = cosines[order]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(ends, minlength=num_contents))])

    def partner(self, content: int, holder_C: Ints) -> tuple[int, float]:
        """Find the sample that stays and holds the closest content: (-1, 0) where none does."""
        if holder_C[content] >= 0:
            return int(holder_C[content]), _COPY
        here = slice(self.starts[content], self.starts[content + 1])
        holders = holder_C[self._others[here]]
        if not (holders >= 0).any():
            return -1, 0.0
        first = int((holders >= 0).argmax())
        return int(holders[first]), float(self._cosines[here][first])


def _by_sample(contents: Copies) -> tuple[Ints, Ints]:
    """Give contents sample by sample, and where each sample's begin."""
    order = np.argsort(contents.samples, kind="stable")
    counts = np.bincount(contents.samples)
    return np.concatenate([[0], np.cumsum(counts)]), contents.contents[order]


def _is_in_doubt(contents: Copies, graph: _Graph) -> Bools:
    """Say of each sample whether an item of it has a copy or a link: the others stay."""
    is_shared = (np.bincount(contents.contents) > 1) | (np.diff(graph.starts) > 0)
    return np.bincount(contents.samples, weights=is_shared[contents.contents]) > 0


def order_samples(keep: str, contents: Copies, cache: Cache, centroid_cosines: Floats | None) -> Ints:
    """Put the samples that have items in the order of a keep rule.

    Args:
        keep: `first`: in row order. `far`: farthest from the centroid of its cluster first, as SemDeDup. `best:COLUMN`:
            the largest number in a column of the samples first, samples without one last.
        contents: the items.
        cache: whose samples they are.
        centroid_cosines: (C,) of each content; only `far` needs them.

    Raises:
        UnknownNameError: no such rule or column.
        SettingError: the column holds no numbers.
    """
    samples, first = np.unique(contents.samples, return_index=True)
    if keep == FIRST:
        return samples
    if keep == FAR:
        assert centroid_cosines is not None
        return samples[np.argsort(centroid_cosines[contents.contents[first]], kind="stable")]
    return samples[np.argsort(-_column(cache, keep.removeprefix(BEST))[samples], kind="stable")]


def check_keep(keep: str, cache: Cache) -> None:
    """Refuse a keep rule that cannot be followed.

    Raises:
        UnknownNameError: no such rule or column.
        SettingError: the column holds no numbers.
    """
    if keep.startswith(BEST):
        _column(cache, keep.removeprefix(BEST))
    elif keep not in (FIRST, FAR):
        raise unknown_name("keep rule", keep, (FIRST, FAR, f"{BEST}COLUMN"))


def _column(cache: Cache, name: str) -> Floats:
    if name not in cache.columns:
        raise unknown_name(f"column of {cache.path}", name, cache.columns)
    column = cache.samples[name]
    if not any(is_number(column.type) for is_number in _IS_NUMBER):
        raise SettingError(f"column {name!r} of {cache.path} is of {column.type}; best:COLUMN takes numbers")
    values = np.array([np.nan if value is None else value for value in column.to_pylist()], np.float64)
    return np.where(np.isnan(values), -np.inf, values)
