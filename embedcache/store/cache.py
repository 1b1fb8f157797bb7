"""An open cache: its tables, its features by name, and rows of tables in any order, without reading the tables."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Bools, Ints, blocks
from embedcache.errors import (
    AmbiguousNameError,
    CorruptError,
    DataError,
    PathError,
    UnfinishedError,
    UnknownNameError,
    pluralize,
    quoted,
)
from embedcache.files import AnyPath, open_path, reading
from embedcache.modalities import MODALITIES, count_items, encoder_option
from embedcache.registry import require, unknown_name
from embedcache.store.feature import EncoderGroup, Feature, encoder_names, open_group
from embedcache.store.layout import INTERRUPTED_REMOVAL, SAMPLES, CacheInfo, read_info
from embedcache.store.tables import (
    BLOCK,
    ITEM_SCHEMAS,
    Table,
    block_rows,
    read_removed,
)

if TYPE_CHECKING:
    import pandas


_SAMPLES_AT_ONCE = 1024

_NUM_ERRORS_SHOWN = 5


class Cache:
    """The samples and features of one dataset, read-only.

    `len(cache)` is the number of samples. `cache[row]` is a sample: its key, its columns, and for each modality a list
    of its texts or of the paths of its files. `cache[5:10]` is a list of samples, `cache["label"]` is a column, and
    iterating yields all samples. Functions that accept the path of a cache also accept a `Cache`.

    Args:
        path: folder of the cache.

    Raises:
        PathError: the folder is not a cache.
        ArtifactError: the cache has a later format.

    Example:
        >>> cache = embedcache.Cache("cache")
        >>> len(cache), cache[0]
        (12, {'key': '00000', 'image': ['00000.png'], 'text': ['yellow bar right on black']})
        >>> cache.features()
        [Feature(open_example/vector: image, (12, 48) float16), Feature(open_example/vector: text, (12, 32) float16)]
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = open_path(path)
        with reading(self.path):
            self.info: CacheInfo = read_info(self.path)
        self._sample_columns: dict[str, pa.ChunkedArray] = {}

    def __fspath__(self) -> str:
        """Return the path or URL, so that functions that accept a path of a cache accept a `Cache`."""
        return str(self.path)

    def __repr__(self) -> str:
        counts = [pluralize(len(self), "sample")]
        for modality, count in self.info.num_items.items():
            counts.append(count_items(count, modality))
        return f"Cache({str(self.path)!r}: {', '.join(counts)})"

    def __len__(self) -> int:
        return self.info.num_samples

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> list[dict[str, Any]]: ...

    @overload
    def __getitem__(self, place: str) -> pa.ChunkedArray: ...

    def __getitem__(self, place: int | slice | str) -> Any:
        """Return a sample, samples or a column. Only the blocks of the tables that contain the rows are read.

        Raises:
            IndexError: there is no such row.
            UnknownNameError: there is no such column.
            CorruptError: a table cannot be read, or the rows differ from their checksums.
        """
        if isinstance(place, str):
            if place not in self.columns:
                raise unknown_name("column", place, self.columns, where=f"of {self.path}")
            return self.column(place)

        if isinstance(place, slice):
            rows = range(len(self))[place]
            # Consecutive samples are read together.
            if rows.step == 1:
                return self._read_samples(rows.start, rows.stop, self._readers) if rows else []
            return [self[row] for row in rows]

        if not -len(self) <= place < len(self):
            raise IndexError(f"{self.path}: expected a row below {len(self):,}, got {place}")
        row = range(len(self))[place]
        return self._read_samples(row, row + 1, self._readers)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # The rows ascend, so one block of each table is enough.
        readers = self._open_readers(kept_rows=0)
        for rows in blocks(len(self), _SAMPLES_AT_ONCE):
            yield from self._read_samples(rows.start, rows.stop, readers)

    def _read_samples(self, start: int, stop: int, readers: "Mapping[str, RowReader]") -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = readers[SAMPLES].take(np.arange(start, stop)).to_pylist()
        for modality in self.info.num_items:
            reader = readers[modality]
            (first_item, stop_item), _ = reader.find(np.array([start, stop]))
            items = reader.take(np.arange(first_item, stop_item))

            # The items of a sample are next to each other.
            bounds = np.searchsorted(items["sample"].to_numpy(), np.arange(start, stop + 1)).tolist()
            values = items["text" if modality == "text" else "path"].to_pylist()
            for sample, (begin, end) in zip(samples, pairwise(bounds), strict=True):
                sample[modality] = values[begin:end]
        return samples

    @cached_property
    def _readers(self) -> Mapping[str, "RowReader"]:
        return self._open_readers()

    def _open_readers(self, kept_rows: int | None = None) -> Mapping[str, "RowReader"]:
        readers = {SAMPLES: RowReader(self, SAMPLES, kept_rows=kept_rows)}
        for modality in self.info.num_items:
            columns = ["sample", "text" if modality == "text" else "path"]
            readers[modality] = RowReader(self, modality, columns, kept_rows=kept_rows)
        return readers

    def to_pandas(self, modality: str | None = None) -> "pandas.DataFrame":
        """Return the samples as a data frame, or the items of a modality, with the columns of their samples.

        Args:
            modality: if None, there is one row per sample with its key and columns. With `text`, there is one row per
                caption with `text` and `language`, and with other modalities one row per file with `path`. The column
                `sample` is the row of the sample.

        Returns:
            Rows in the order of the cache, so that the index is the row of `Feature`. Memory: the tables.

        Raises:
            MissingExtraError: pandas is not installed.
            UnknownNameError: there is no such modality.
            CorruptError: a table cannot be read, or differs from its checksums.
        """
        require("pandas", package="pandas")
        if modality is None:
            return self.samples.to_pandas()

        if modality not in self.info.num_items:
            raise unknown_name("modality", modality, self.info.num_items, where=f"of {self.path}")
        return _with_columns_of_samples(self.items(modality), self.samples).to_pandas()

    @cached_property
    def columns(self) -> list[str]:
        """Column names of the sample table, without reading it."""
        return list(self.rows_of(SAMPLES).schema.names)

    @cached_property
    def samples(self) -> pa.Table:
        """The sample table: one row per sample in row order, `key` and the columns of the source.

        Raises:
            CorruptError: the table cannot be read, or differs from its checksum.
        """
        return self.table(SAMPLES)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of the sample table. It is read once, without the other columns.

        Raises:
            KeyError: there is no such column. `columns` lists them.
            CorruptError: the table cannot be read, or the rows differ from their checksums.
        """
        if name not in self._sample_columns:
            self._sample_columns[name] = self.table(SAMPLES, [name])[name]
        return self._sample_columns[name]

    @cached_property
    def removed(self) -> Ints:
        """Rows of the samples that were removed, ascending: (M,) int64. See `embedcache.store.tables`."""
        return read_removed(self.path, self.info).rows

    def removed_items(self, modality: str) -> Bools:
        """Return whether the sample of each item was removed: (N,) bool."""
        if not len(self.removed):
            return np.zeros(self.num_rows(modality), bool)

        samples_N = self.items(modality, columns=["sample"])["sample"].to_numpy()
        return np.isin(samples_N, self.removed)

    def key(self, sample: int) -> str:
        """Return the key of one sample, from the block that contains it. Raises DataError if there is no such row."""
        if not 0 <= sample < len(self):
            raise DataError(f"{self.path}: expected a row from 0 to {len(self) - 1}, got {sample}")
        key: str = self.table(SAMPLES, ["key"], rows=slice(sample, sample + 1))["key"][0].as_py()
        return key

    def items(self, modality: str, *, chunk: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the item table of a modality: one row per item, in row order. Without items, the table is empty.

        Args:
            modality: `text` (with columns sample, text and language), or a modality of files (with sample, path, offset
                and length, and for audio and video also start_s and stop_s).
            chunk: chunk whose rows are returned. If None, all rows.
            columns: names of the columns to read. If None, all.

        Raises:
            UnknownNameError: there is no such modality.
            DataError: there is no such chunk.
            CorruptError: the table cannot be read, or the rows differ from their checksums.
        """
        if modality not in MODALITIES:
            raise unknown_name("modality", modality, MODALITIES)
        if chunk is not None and not 0 <= chunk < self.info.num_chunks(modality):
            chunks = pluralize(self.info.num_chunks(modality), "chunk")
            raise DataError(f"{self.path}: expected one of {chunks} of {modality}, counted from 0, got {chunk}")

        rows = None if chunk is None else self.info.chunk_rows(modality, chunk)
        return self.table(modality, columns, rows=rows)

    def rows_of(self, name: str) -> Table:
        """Return a table, `samples` or a modality, without reading it."""
        return Table(self.path, self.info.files(name), ITEM_SCHEMAS.get(name))

    def num_rows(self, name: str) -> int:
        """Return the number of rows of a table, `samples` or a modality."""
        return self.info.num_samples if name == SAMPLES else self.info.num_items.get(name, 0)

    def table(self, name: str, columns: Sequence[str] | None = None, *, rows: slice | None = None) -> pa.Table:
        """Read a table. Thread-safe.

        Another process may have replaced files by `--retry-failed` or `cache remove` since this cache was opened. Rows
        keep their numbers, so the new files are read instead.

        Args:
            name: `samples` or a modality.
            columns: names of the columns to read. If None, all.
            rows: rows to read, without a step. If None, all. Whole blocks of rows are read, see `block_rows`.

        Raises:
            CorruptError: the table cannot be read, or differs from its checksum.
        """
        start, stop, _ = (rows or slice(None)).indices(self.num_rows(name))
        try:
            return self.rows_of(name).read(start, stop, columns)
        except (CorruptError, PathError):
            old_files = self.info.files(name)

            # Without the parts that were appended since this cache was opened.
            files = read_info(self.path).files(name)[: len(old_files)]
            if files == old_files:
                raise

        return Table(self.path, files, ITEM_SCHEMAS.get(name)).read(start, stop, columns)

    def encoders(self, modality: str) -> list[EncoderGroup]:
        """Return the encoders with features of a modality, sorted by name. A modality without items has none."""
        names = encoder_names(self.path / modality) if modality in self.info.num_items else []
        return [open_group(self.path, modality, name, self.info) for name in names]

    def features(self, modality: str | None = None) -> list[Feature]:
        """Return all features or the features of a modality, complete or not, sorted by name.

        Raises:
            UnknownNameError: there is no such modality.
            UnfinishedError: a removal of samples was interrupted, so that some chunks still contain them.
        """
        if modality not in (None, *MODALITIES):
            raise UnknownNameError(self._missing(str(modality)))
        if self.info.has_interrupted_removal:
            raise UnfinishedError(f"{self.path}: {INTERRUPTED_REMOVAL}")

        features = []
        for item_modality in MODALITIES if modality is None else [modality]:
            for group in self.encoders(item_modality):
                for name in group.features:
                    features.append(Feature(group, name))
        return features

    def default_features(self, modality: str) -> list[Feature]:
        """Return the features of a modality that are used if none is named: all that were not derived.

        If all features are derived, all are returned.
        """
        features = self.features(modality)
        return [feature for feature in features if not feature.group.is_derived] or features

    def feature(self, modality: str, name: str | None = None) -> Feature:
        """Return a feature by name.

        Args:
            modality: name of a modality.
            name: `encoder/feature`, or `encoder` if it has one feature. It may be None if the modality has one feature
                that was not derived from others.

        Raises:
            UnknownNameError: no feature has that name. The message lists the names of all features.
            AmbiguousNameError: several features have that name. The message lists them.
        """
        features = self.features(modality)
        kind = f"{modality} feature"
        location = f"of {self.path}"

        if name is None:
            matches = self.default_features(modality)
        else:
            matches = [feature for feature in features if name in (feature.name, feature.group.name)]
        if len(matches) == 1:
            return matches[0]

        if not features:
            raise UnknownNameError(self._missing(modality))
        if not matches:
            names = list(map(attrgetter("name"), features))
            raise unknown_name(kind, name or "", names, where=location)

        problem = "no name was given" if name is None else f"{name!r} matches several"
        error = AmbiguousNameError(
            f"{kind} {location}: {problem}; name one of these features: {', '.join(map(attrgetter('name'), matches))}"
        )
        error.modality = modality
        raise error

    def _missing(self, modality: str) -> str:
        """Return the message that the cache has no features of a modality, with the features of others."""
        if modality not in MODALITIES:
            return f"unknown modality {modality!r}; known: {', '.join(MODALITIES)}"

        command = f"embedcache extract {quoted(self.path)} {quoted(self.path)} {encoder_option(modality)}"
        message = f"{self.path} has no {modality} features; extract some: {command}"
        names = ", ".join(f"{feature.modality}={feature.name}" for feature in self.features())
        return f"{message}; or name others with --feature MODALITY=NAME, one of: {names}" if names else message


def _with_columns_of_samples(items: pa.Table, samples: pa.Table) -> pa.Table:
    """Join the columns of each item's sample. They recur if a sample has several items."""
    item_samples = samples.take(items["sample"].combine_chunks())

    # The item's own columns come last: they replace columns of the sample that have the same name.
    columns: dict[str, pa.ChunkedArray] = {}
    for table in (item_samples, items):
        columns.update(zip(table.column_names, table.columns, strict=True))
    return pa.table(columns)


def caption_error_lines(cache: Cache) -> list[str]:
    """Return lines about the samples whose captions cannot be read, if there are any."""
    if "caption_error" not in cache.columns:
        return []

    errors = cache.column("caption_error")
    rows = np.flatnonzero(errors.is_valid())
    if not len(rows):
        return []

    examples = [f"  key {cache.key(row)}: {errors[row].as_py()}" for row in rows[:_NUM_ERRORS_SHOWN].tolist()]
    samples = pluralize(len(rows), "sample has", "samples have")
    return [f"{samples} captions that cannot be read, and counts without captions, such as:", *examples]


_KEPT_ROWS = 2**22
_MATCHED_AT_ONCE = 2**20  # Arrow hashes all keys for each block


class RowReader:
    """Reads rows of one table of a cache, in any order. Thread-safe.

    Only the blocks that contain the rows are read and compared with their checksums. A block is 65,536 samples or
    16,384 items. Memory: the blocks used last, up to `kept_rows`. After `load`, all rows are in Arrow's memory.

    Args:
        name: `samples` or a modality.
        columns: names of the columns to read. If None, all.
        kept_rows: rows of the blocks that are kept, at least one block. If None, 4 million, for rows in any order. If
            rows ascend from call to call, one block is enough (0).
    """

    def __init__(
        self, cache: Cache, name: str, columns: Sequence[str] | None = None, *, kept_rows: int | None = None
    ) -> None:
        self._cache = cache
        self._name = name
        self._columns = columns
        self._num_rows = cache.num_rows(name)
        self._size = block_rows(name)
        self._whole: pa.Table | None = None
        self._samples_N: Ints | None = None

        kept_rows = _KEPT_ROWS if kept_rows is None else kept_rows
        self._block = lru_cache(maxsize=max(1, kept_rows // self._size))(self._read_block)
        self._last_sample = lru_cache(maxsize=None)(self._read_last_sample)

    def __len__(self) -> int:
        return self._num_rows

    def load(self) -> None:
        """Read all rows, so that later calls read no file and are faster."""
        if self._whole is not None or not self._num_rows:
            return

        # In one chunk, a row is found without searching its chunk.
        self._whole = self._cache.table(self._name, self._columns).combine_chunks()
        if "sample" in self._whole.column_names:
            self._samples_N = self._whole["sample"].to_numpy()
        self._block.cache_clear()

    def take(self, rows: Ints) -> pa.Table:
        """Return rows in the given order, which must exist."""
        if self._whole is not None:
            return self._whole.take(pa.array(rows))

        # In ascending order, the rows of one block are next to each other, so each block is read once.
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // self._size, return_index=True)
        if not len(numbers):
            return self._block(0).schema.empty_table()

        block_parts = []
        places_in_blocks = np.split(rows[order] % self._size, starts[1:])
        for number, places in zip(numbers.tolist(), places_in_blocks, strict=True):
            block_parts.append(self._block(number).take(pa.array(places)))

        # The inverse of the order restores the order of the caller.
        return pa.concat_tables(block_parts).take(pa.array(np.argsort(order)))

    def find(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return the first row and the number of rows of each sample in an item table: two (S,) int64."""
        samples = np.asarray(samples, np.int64)

        # The rows of a sample stop where those of the next one start.
        bounds, places = np.unique(np.concatenate([samples, samples + 1]), return_inverse=True)
        if self._samples_N is not None:
            first_rows = np.searchsorted(self._samples_N, bounds)
        else:
            first_rows = self._first_rows(bounds)

        starts, stops = np.split(first_rows[places], 2)
        return starts, stops - starts

    def find_key(self, key: str) -> int:
        """Return the row of a key in the sample table, or -1 if no sample has the key. See `find_keys`."""
        if self._whole is None:
            return int(find_keys(self._cache, [key])[0])

        keys = self._whole["key"].chunk(0)
        return int(pc.index(keys, pa.scalar(key, keys.type)).as_py())

    def _read_block(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        rows = slice(number * self._size, (number + 1) * self._size)
        return self._cache.table(self._name, columns or self._columns, rows=rows)

    def _first_rows(self, samples: Ints) -> Ints:
        """Return the first row of each sample, or of the next sample with items. The samples must ascend.

        A binary search reads a few blocks to find the block of the first remaining sample. All samples in this block
        are then found together.
        """
        first_rows = np.full(len(samples), self._num_rows, np.int64)
        num_blocks = -(-self._num_rows // self._size)

        number = 0
        start = 0
        while start < len(samples):
            number = bisect_left(range(num_blocks), int(samples[start]), lo=number, key=self._last_sample)
            if number == num_blocks:
                break

            samples_B = self._read_block(number, ["sample"])["sample"].to_numpy()
            stop = int(np.searchsorted(samples, samples_B[-1], "right"))
            first_rows[start:stop] = number * self._size + np.searchsorted(samples_B, samples[start:stop])
            number += 1
            start = stop
        return first_rows

    def _read_last_sample(self, number: int) -> int:
        sample: int = self._read_block(number, ["sample"])["sample"][-1].as_py()
        return sample


class Keys(Sequence[str]):
    """The keys of samples of some caches, one cache after another. They are read each time they are used.

    Args:
        caches: the caches.
        rows: (M,) samples, ascending and counted across the caches. If None, all.
    """

    def __init__(self, caches: Sequence[Cache], rows: Ints | None = None) -> None:
        self._caches = caches
        self._rows = np.arange(sum(map(len, caches))) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self.select(np.array([place])).array[0].as_py()

    def select(self, places: Ints) -> "Keys":
        """Return some of the keys, ascending."""
        return Keys(self._caches, self._rows[places])

    def blocks(self, size: int = BLOCK) -> Iterator[pa.Array]:
        """Iterate over the keys in blocks of `size` samples of a cache. Memory: a block."""
        start = 0
        for cache in self._caches:
            for block in blocks(len(cache), size):
                first_place, stop_place = np.searchsorted(self._rows, [start + block.start, start + block.stop])
                if first_place < stop_place:
                    keys = cache.table(SAMPLES, ["key"], rows=block)["key"]
                    places = self._rows[first_place:stop_place] - start - block.start
                    yield keys.combine_chunks().take(pa.array(places))
            start += len(cache)

    @property
    def array(self) -> pa.ChunkedArray:
        """All keys in Arrow's memory."""
        return pa.chunked_array(self.blocks(), pa.large_string())


def keys_at(cache: Cache, rows: Ints) -> pa.ChunkedArray:
    """Return the keys of samples of a cache, in any order: (M,) strings. Memory: these keys, and a block of keys."""
    return RowReader(cache, SAMPLES, ["key"], kept_rows=0).take(rows)["key"]


def find_keys(cache: Cache, keys: Sequence[str]) -> Ints:
    """Return the row of each key in the sample table, or -1 for an unknown key: (K,) int64."""
    unique_keys = pc.unique(pa.array(keys, pa.large_string()))
    rows = np.full(len(unique_keys), -1, np.int64)
    samples, places = match_keys([cache], unique_keys)
    rows[places] = samples

    # A key may occur more than once.
    key_rows: Ints = rows[pc.index_in(pa.array(keys, pa.large_string()), value_set=unique_keys).to_numpy()]
    return key_rows


def match_keys(caches: Sequence[Cache], keys: pa.Array) -> tuple[Ints, Ints]:
    """Find the samples of many keys.

    Memory: a million keys of the caches, and twice the memory of `keys`.

    Returns:
        (M,) int64 samples that have one of the (K,) keys, ascending and counted across caches, and (M,) int64 the first
        place of the key of each sample.
    """
    # The first pieces are empty, because NumPy cannot concatenate zero arrays.
    rows = [np.empty(0, np.int64)]
    places = [np.empty(0, np.int64)]

    start = 0
    for block in Keys(caches).blocks(_MATCHED_AT_ONCE):
        key_places = pc.index_in(block, value_set=keys)
        rows.append(start + np.flatnonzero(key_places.is_valid()))
        places.append(key_places.drop_null().to_numpy())
        start += len(block)
    return np.concatenate(rows), np.concatenate(places)
