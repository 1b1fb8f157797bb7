"""The source of a copy: samples of existing caches, whose tables become those of a new one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Ints, blocks, concatenated_ranges
from embedcache.modalities import MODALITIES
from embedcache.progress import Progress
from embedcache.sources.open import merged_path
from embedcache.store.cache import Cache
from embedcache.store.layout import SAMPLES, Segment
from embedcache.store.removed import Marks, write_marks
from embedcache.store.rows import RowReader
from embedcache.store.sample_tables import SampleTables, digest_tables_input, join_tables
from embedcache.store.table_writer import TableWriter
from embedcache.store.tables import BLOCK, ITEM_SCHEMAS


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

    def read(self, rows: slice, readers: Mapping[str, RowReader]) -> SampleTables:
        """Return some of the samples with their items, read by readers of the tables of the cache."""
        samples = self.samples[rows]
        found, items = readers[SAMPLES].take(samples), {}
        if self.prefix:
            found = _with_prefix(self.prefix, found, "key")
        for modality in self.cache.info.num_items:
            which, item_rows = concatenated_ranges(*readers[modality].find(samples))
            own = readers[modality].take(item_rows).set_column(0, "sample", pa.array(which))
            if self.number is not None and MODALITIES[modality].kind != "texts":
                own = _with_prefix(merged_path(self.number, ""), own, "path")
            items[modality] = own.select(ITEM_SCHEMAS[modality].names).cast(ITEM_SCHEMAS[modality])
        return SampleTables(found, items)

    def item_rows(self, modality: str) -> Ints:
        """Return the rows of the items of the samples, ascending."""
        if modality not in self.cache.info.num_items:
            return np.empty(0, np.int64)
        of_items = self.cache.items(modality, columns=["sample"])["sample"].to_numpy()
        return np.flatnonzero(np.isin(of_items, self.samples))


def _with_prefix(prefix: str, table: pa.Table, name: str) -> pa.Table:
    """Return a table with a text before those of a column."""
    longer = pc.binary_join_element_wise(prefix, table[name].cast(pa.string()), "")
    return table.set_column(table.schema.get_field_index(name), name, longer)


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
    """The samples of a new cache: those of some segments, one after another; see `index_tables`.

    Its folder gets the marks of the samples that were removed before.
    """

    def __init__(
        self, segments: Sequence[SegmentSamples], description: Mapping[str, Any], out_path: Path, marks: Marks
    ) -> None:
        self._segments, self._description, self._out_path, self._marks = segments, description, out_path, marks

    def describe(self) -> Mapping[str, Any]:
        """Return what the new cache records as its source."""
        return self._description

    def write(self, writer: TableWriter, progress: Progress) -> list[Segment]:
        """Write the samples into tables; return their segments. Memory: some blocks of 65,536 samples."""
        if self._marks:
            write_marks(self._out_path, self._marks)
        bounds = np.cumsum([0, *(len(segment.samples) for segment in self._segments)]).tolist()
        hashed = [hashlib.sha256() for _ in self._segments]
        readers_of = lru_cache(maxsize=1)(_open_readers)
        progress.start("indexing", bounds[-1], "samples")
        for block in blocks(bounds[-1], BLOCK):
            pieces = []
            for segment, own, start in zip(self._segments, hashed, bounds[:-1], strict=True):
                rows = slice(max(block.start - start, 0), min(max(block.stop - start, 0), len(segment.samples)))
                if rows.start < rows.stop:
                    pieces.append(segment.read(rows, readers_of(segment.cache)))
                    own.update(digest_tables_input(pieces[-1]))
            writer.add_tables(join_tables(pieces))
            progress.advance(block.stop - block.start)
        progress.finish()
        return [
            Segment(num_samples=len(segment.samples), digest=own.hexdigest())
            for segment, own in zip(self._segments, hashed, strict=True)
        ]


def _open_readers(cache: Cache) -> dict[str, RowReader]:
    return {name: RowReader(cache, name, kept_rows=0) for name in (SAMPLES, *cache.info.num_items)}
