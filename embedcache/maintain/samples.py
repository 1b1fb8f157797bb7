"""Samples of existing caches as the source of a new one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from embedcache.arrays import Ints, blocks, concatenated_ranges
from embedcache.modalities import MODALITIES
from embedcache.sources.base import FileItem, Sample, Scalar, TextItem
from embedcache.sources.merged import merged_path
from embedcache.store.cache import Cache
from embedcache.store.checksums import BLOCK
from embedcache.store.layout import SAMPLES
from embedcache.store.rows import RowReader
from embedcache.store.tables import to_file_item


@dataclass(frozen=True, kw_only=True)
class SegmentSamples:
    """Samples of a cache that were indexed together there.

    Args:
        cache: the cache.
        samples: (S,) int64 rows of the sample table, ascending.
        number: number of the cache's source among those of a merged one; None if the new cache has the same source.
        prefix: text to put before the keys.
    """

    cache: Cache
    samples: Ints
    number: int | None
    prefix: str = ""

    def read(self) -> Iterator[Sample]:
        """Iterate over the samples with their items. Memory: a block of each table."""
        cache = self.cache
        readers = {modality: RowReader(cache, modality) for modality in cache.info.num_items}
        table = RowReader(cache, SAMPLES)
        for block in blocks(len(self.samples), BLOCK):
            samples = self.samples[block]
            rows = table.take(samples).to_pylist()
            items = {modality: _items_of(reader, samples) for modality, reader in readers.items()}
            for place, row in enumerate(rows):
                yield self._sample(row, {modality: of_sample[place] for modality, of_sample in items.items()})

    def _sample(self, row: Mapping[str, Any], items: Mapping[str, list[dict[str, Any]]]) -> Sample:
        columns: dict[str, Scalar] = {name: value for name, value in row.items() if name != "key" and value is not None}
        files = {
            modality: tuple(self._file(item) for item in found)
            for modality, found in items.items()
            if MODALITIES[modality].kind != "texts" and found
        }
        texts = tuple(TextItem(text=item["text"], language=item["language"]) for item in items.get("text", ()))
        images = files.pop("image", ())
        return Sample(key=self.prefix + row["key"], images=images, texts=texts, columns=columns, files=files)

    def _file(self, item: Mapping[str, Any]) -> FileItem:
        found = to_file_item(item)
        if self.number is None:
            return found
        return replace(found, path=merged_path(self.number, found.path))

    def item_rows(self, modality: str) -> Ints:
        """Return the rows of the items of the samples, ascending."""
        if modality not in self.cache.info.num_items:
            return np.empty(0, np.int64)
        of_items = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return np.flatnonzero(np.isin(of_items, self.samples))


def _items_of(reader: RowReader, samples: Ints) -> list[list[dict[str, Any]]]:
    """Return the items of each sample."""
    starts, counts = reader.find(samples)
    _, rows = concatenated_ranges(starts, counts)
    items = reader.take(rows).to_pylist() if len(rows) else []
    ends = np.cumsum(counts).tolist()
    return [items[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


def divide_segments(cache: Cache, samples: Ints, *, number: int | None, prefix: str = "") -> list[SegmentSamples]:
    """Divide samples of a cache by the segments in which they were indexed: the source has each in its order."""
    bounds = np.cumsum([0, *(segment.num_samples for segment in cache.info.all_segments)])
    places = np.searchsorted(samples, bounds)
    return [
        SegmentSamples(cache=cache, samples=samples[start:stop], number=number, prefix=prefix)
        for start, stop in pairwise(places.tolist())
        if stop > start
    ]


class CopySource:
    """The source of a new cache: the samples of some segments, one after another."""

    def __init__(self, segments: Sequence[SegmentSamples], description: Mapping[str, Any]) -> None:
        self._segments, self._description = segments, description

    def describe(self) -> Mapping[str, Any]:
        """Return what the new cache records as its source."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Iterate over the samples. Memory: a block of each table."""
        for segment in self._segments:
            yield from segment.read()

    def read(self, item: FileItem) -> bytes:
        """Raise an error, as a copy reads no file."""
        raise NotImplementedError  # nothing is encoded
