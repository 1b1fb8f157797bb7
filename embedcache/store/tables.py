"""Tables of a cache, whose parts are files that never change, and single Parquet files that carry checksums.

A file of a cache is compared with the CRC-32C in `cache.json` when a process first opens it. Selections and the like
are single files, which contain a checksum of their other bytes. Values of millions of rows stay in Arrow's memory.

A removed sample keeps its row, so that the rows of all others stay: its key is `removed-` with its row, its other
columns are null, its captions are empty, and its items have no path and no feature. The source may still have it, so
the table of `RemovedSamples` stores a keyed digest of its key, by which an extraction leaves it out.
"""

import hashlib
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from json import JSONEncoder
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, overload

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array, Bools, Ints, blocks
from embedcache.errors import CorruptError, PathError, SourceError
from embedcache.files import check_regular, is_remote, partial_path, put_file, read_file, reading, replacing
from embedcache.modalities import MODALITIES, FileItem, Modality, Sample, TextItem
from embedcache.provenance import digest_file
from embedcache.store.arrays import check_file, file_checksum
from embedcache.store.layout import SAMPLES, CacheInfo, Part, TableFile, next_revision, removed_path, table_name

T = TypeVar("T")


class Column(Sequence[T]):
    """A column of values, with None for nulls. A Python object is made only for a value that is read.

    Args:
        array: the values, in Arrow's memory.
    """

    def __init__(self, array: "pa.Array | pa.ChunkedArray") -> None:
        self.array = array

    def is_null(self) -> Bools:
        """Return which values are null: (N,) bool."""
        is_null: Bools = self.array.is_null().to_numpy(zero_copy_only=False)
        return is_null

    def count(self, value: object) -> int:
        """Count a value."""
        return int(pc.sum(pc.equal(self.array, pa.scalar(value, self.array.type))).as_py() or 0)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return self.array[index].to_pylist() if isinstance(index, slice) else self.array[index].as_py()

    def __iter__(self) -> Iterator[T]:
        return iter(self.array.to_pylist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:  # noqa: FBT001 - as NumPy calls it
        values: Array = np.array(self.array, dtype=dtype, copy=copy)
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def to_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return values as one Arrow array."""
    if not isinstance(values, Column):
        return pa.array(values, kind)

    array = values.array.cast(kind)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def is_none(values: Sequence[Any]) -> Bools:
    """Return which values are None: (N,) bool."""
    if isinstance(values, Column):
        return values.is_null()
    return np.array([value is None for value in values], bool)


BLOCK = 65_536
"""Samples that are read and written together: the rows of a row group."""

ITEM_BLOCK = 16_384
"""Items that are read and written together."""


def block_rows(name: str) -> int:
    """Return the rows of a row group of a table, `samples` or a modality; the last group may have fewer."""
    return BLOCK if name == SAMPLES else ITEM_BLOCK


RESTORE_TABLE = "restore the file, or extract into a new folder"
"""Next step for a damaged table of a cache."""

_FOOTER_END = 8  # its length, int32 little-endian, and the magic number of Parquet
_CHECKSUM = b"crc32c of the rest %08x"
_CHECKSUM_WORD = b"crc32c of the rest "
_CHECKSUM_BYTES = len(_CHECKSUM % 0)
_READ_BYTES = 2**20

_TEXT = pa.large_string()
"""Type of all strings that are read. An array of `string` is limited to 2 GiB, which keys and captions exceed."""

_FILES = [("sample", pa.int64()), ("path", _TEXT), ("offset", pa.int64()), ("length", pa.int64())]
_INTERVAL = [("start_s", pa.float64()), ("stop_s", pa.float64())]
_TEXTS = [("sample", pa.int64()), ("text", _TEXT), ("language", _TEXT)]


def _item_schema(modality: Modality) -> pa.Schema:
    if modality.kind == "texts":
        return pa.schema(_TEXTS)
    return pa.schema(_FILES + _INTERVAL if modality.has_interval else _FILES)


ITEM_SCHEMAS = {name: _item_schema(modality) for name, modality in MODALITIES.items()}

_SAMPLES_SCHEMA = pa.schema([("key", _TEXT)])


@contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a local or remote Parquet table, after its bytes were compared with its checksum, if it has one.

    Always read it with `use_threads=False`: the tables are small, and a process that exited right after Arrow's thread
    pool had started aborted in 2 of 30 runs (pyarrow 26, with torch imported).

    Raises:
        pa.ArrowInvalid: its bytes have changed since it was written.
    """
    if not is_remote(path):
        check_regular(path)

    # Opened once: another process may replace the table at any time.
    with path.open("rb") as file:
        _compare(file)
        with pq.ParquetFile(file) as table:
            yield table


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table. Raises the errors of `open_table`."""
    with open_table(path) as table:
        return table.read(columns=columns, use_threads=False)


def iterate_table(path: Path, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Iterate over the rows of a table, `size` at a time, or over one table without rows. Memory: a block.

    Columns that the table does not have are left out. Raises the errors of `open_table`.
    """
    with open_table(path) as table:
        for batch in table.iter_batches(size, columns=columns, use_threads=False):
            yield pa.table(batch)

        # A table without rows has no batch, but callers need its columns.
        if not table.metadata.num_rows:
            yield table.read(columns=columns, use_threads=False)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table with a checksum of its bytes, with which `open_table` compares them."""
    pq.write_table(table, path)
    add_checksum(path)


def add_checksum(path: Path) -> None:
    """Write the CRC-32C of all bytes of a finished table in front of its footer.

    Readers of Parquet skip it: they find the pages by the offsets in the footer.
    """
    with path.open("r+b") as file:
        start = _footer_start(file)
        checksum = _CHECKSUM % _crc(file, start, start)

        # The footer is read before the checksum is written over its place.
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(checksum + footer)


def _compare(file: BinaryIO) -> None:
    """Compare a table with its checksum before Arrow reads it, because a damaged footer may end the process."""
    start = _footer_start(file)
    file.seek(max(0, start - _CHECKSUM_BYTES))
    checksum = file.read(_CHECKSUM_BYTES)

    # A table of another tool has no checksum.
    if not checksum.startswith(_CHECKSUM_WORD):
        return
    if checksum != _CHECKSUM % _crc(file, start - _CHECKSUM_BYTES, start):
        raise pa.ArrowInvalid("its bytes have changed since it was written")


def _footer_start(file: BinaryIO) -> int:
    """Return the offset of the footer of a table, from its length at the end of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _FOOTER_END))
    return max(0, size - _FOOTER_END - int.from_bytes(file.read(4), "little"))


def _crc(file: BinaryIO, stop: int, start: int) -> int:
    """Return the CRC-32C of a file without its bytes from `stop` to `start`. Memory: a block."""
    file.seek(0)
    crc = 0
    for rows in blocks(stop, _READ_BYTES):
        crc = google_crc32c.extend(crc, file.read(rows.stop - rows.start))

    file.seek(start)
    while block := file.read(_READ_BYTES):
        crc = google_crc32c.extend(crc, block)
    return crc


def to_file_item(row: Mapping[str, Any]) -> FileItem:
    """Return the item in a row of an item table of files."""
    fields = dict(row)
    fields.pop("sample", None)
    return FileItem(**fields)


class Table:
    """One table of a cache, `samples` or the items of a modality: the rows of its parts, one after another.

    A file is compared with its checksum when this process first opens it. Thread-safe.

    Args:
        folder: folder of the cache.
        files: the files of its parts, in row order.
        schema: columns that all parts have. None for samples: the parts may differ in all columns except the key.
    """

    def __init__(self, folder: Path, files: Sequence[TableFile], schema: pa.Schema | None = None) -> None:
        self._folder = folder
        self._files = files
        self._fixed_schema = schema
        counts = [file.num_rows for file in files]
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the columns that any part has."""
        if self._fixed_schema is not None or not self._files:
            return self._fixed_schema or _SAMPLES_SCHEMA

        schemas = [_SAMPLES_SCHEMA]
        for file in self._files:
            schemas.append(_open_part(self._folder, file).schema)

        with reading(self._folder / self._files[0].name, RESTORE_TABLE):
            schema = pa.unify_schemas(schemas, promote_options="permissive")
            if schema.field("key").type != _TEXT:
                raise ValueError(f"expected keys of text, got {schema.field('key').type}")

            for number, field in enumerate(schema):
                if pa.types.is_string(field.type):
                    schema = schema.set(number, field.with_type(_TEXT))
            return schema

    def read(self, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """Read rows, in whole row groups. A column that a part lacks is null there.

        Raises:
            PathError: a file is missing.
            CorruptError: a file has other bytes than it was written with.
            KeyError: there is no such column.
        """
        stop = len(self) if stop is None else stop
        schema = self.schema if columns is None else pa.schema(list(map(self.schema.field, columns)))

        # The first piece is empty, because Arrow cannot concatenate zero tables.
        pieces = [schema.empty_table()]
        for file, first in zip(self._files, self._starts.tolist(), strict=False):
            rows = range(max(start - first, 0), min(stop - first, file.num_rows))
            if rows:
                pieces.append(_read_rows(self._folder, file, rows, schema, has_all=self._fixed_schema is not None))
        return pa.concat_tables(pieces)

    def blocks(self, size: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Iterate over all rows, `size` at a time. Memory: a block."""
        for rows in blocks(len(self), size):
            yield self.read(rows.start, rows.stop, columns)


class _OpenedPart(NamedTuple):
    """The footer of a file, its columns, and the first row of each row group, followed by the number of rows."""

    footer: pq.FileMetaData
    schema: pa.Schema
    starts: Ints

    def groups(self, rows: range) -> range:
        """Return the row groups that contain some rows."""
        first = int(np.searchsorted(self.starts, rows.start, "right")) - 1
        return range(first, int(np.searchsorted(self.starts[:-1], rows.stop)))


def _open_part(folder: Path, file: TableFile) -> _OpenedPart:
    """Compare a file with its checksum, unless this process has done so, and return its footer."""
    path = folder / file.name
    if not is_remote(path):
        check_file(path, file.checksum, next_step=RESTORE_TABLE)
    return _parse_part(path, file)


@lru_cache(maxsize=256)
def _parse_part(path: Path, file: TableFile) -> _OpenedPart:
    with reading(path, RESTORE_TABLE), _open_stream(path, file) as stream, pq.ParquetFile(stream) as table:
        footer = table.metadata
        schema = table.schema_arrow.remove_metadata()

    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if sum(counts) != file.num_rows:
        raise CorruptError(f"{path}: expected {file.num_rows:,} rows, got {sum(counts):,}; {RESTORE_TABLE}")

    return _OpenedPart(footer, schema, np.cumsum([0, *counts]))


def _open_stream(path: Path, file: TableFile) -> Any:
    return pa.BufferReader(_fetch(path, file)) if is_remote(path) else pa.OSFile(str(path))


@lru_cache(maxsize=8)
def _fetch(path: Path, file: TableFile) -> bytes:
    """Read a whole file behind a URL and compare it with its checksum."""
    try:
        data = read_file(path)
    except FileNotFoundError as error:
        raise PathError(f"{path} does not exist; {RESTORE_TABLE}") from error

    actual = f"{google_crc32c.value(data):08x}"
    if actual != file.checksum:
        raise CorruptError(f"{path}: expected checksum {file.checksum}, got {actual}; {RESTORE_TABLE}")
    return data


def check_table(folder: Path, file: TableFile) -> None:
    """Compare a file with its checksum and its number of rows, also if this process has done so."""
    path = folder / file.name
    if is_remote(path):
        # The bytes that were fetched before may have changed since.
        _fetch.cache_clear()
        _fetch(path, file)
    else:
        check_file(path, file.checksum, next_step=RESTORE_TABLE, once=False)
    _parse_part(path, file)


def _read_rows(folder: Path, file: TableFile, rows: range, schema: pa.Schema, *, has_all: bool) -> pa.Table:
    """Read rows of a file with the columns of a schema. An optional column that the file lacks is null."""
    path = folder / file.name
    part = _open_part(folder, file)
    groups = part.groups(rows)

    names = []
    for name in schema.names:
        if name in part.schema.names:
            names.append(name)
        elif has_all or name == "key":
            raise CorruptError(f"{path} has no column {name!r}; {RESTORE_TABLE}")

    with reading(path, RESTORE_TABLE):
        with _open_stream(path, file) as stream, pq.ParquetFile(stream, metadata=part.footer) as table:
            # Without threads: a process that ends right after Arrow's pool has started may abort.
            block = table.read_row_groups(list(groups), columns=names, use_threads=False)

        # Whole row groups were read, which may begin before the first of the rows.
        block = block.slice(rows.start - int(part.starts[groups.start]), len(rows))

        columns = {}
        for field in schema:
            if field.name in names:
                columns[field.name] = block[field.name].cast(field.type)
            else:
                columns[field.name] = pa.nulls(len(rows), field.type)
        return pa.table(columns, schema=schema)


_DIGEST_BYTES = 16
_SCHEMA = pa.schema([("row", pa.int64()), ("key_digest", pa.binary(_DIGEST_BYTES))])
_SALT = b"salt"


@dataclass(frozen=True, kw_only=True)
class RemovedSamples:
    """Samples that were removed.

    Args:
        table: `row`, ascending, and `key_digest`, the keyed BLAKE2b-128 of the key.
        salt: key of the digests.
    """

    table: pa.Table
    salt: str

    @property
    def rows(self) -> Ints:
        """(M,) int64 rows of the sample table, ascending."""
        rows: Ints = self.table["row"].to_numpy()
        return rows

    @cached_property
    def _digests(self) -> dict[bytes, int]:
        return dict(zip(self.table["key_digest"].to_pylist(), self.rows.tolist(), strict=True))

    def row_of(self, key: str) -> int | None:
        """Return the row that a key had, or None if no removed sample has the digest of the key."""
        return self._digests.get(digest_key(key, self.salt)) if self._digests else None

    def merge(self, other: "RemovedSamples") -> "RemovedSamples":
        """Return the samples of both tables, whose digests must have the same salt."""
        new_rows = other.table.filter(~np.isin(other.rows, self.rows))
        table = pa.concat_tables([self.table, new_rows])
        return RemovedSamples(table=table.sort_by("row"), salt=self.salt)


def digest_key(key: str, salt: str) -> bytes:
    """Return the keyed BLAKE2b-128 of a key."""
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES, key=salt.encode()[:64]).digest()


def make_removed(rows: Ints, keys: Sequence[str], salt: str) -> RemovedSamples:
    """Return the table of some samples."""
    digests = [digest_key(key, salt) for key in keys]
    return RemovedSamples(table=pa.table([rows, digests], schema=_SCHEMA), salt=salt)


def read_removed(cache_path: Path, info: CacheInfo) -> RemovedSamples:
    """Read the samples that were removed from a cache.

    Raises:
        CorruptError: the table is missing or has changed.
    """
    if not info.removed:
        return make_removed(np.empty(0, np.int64), [], info.index_digest)

    path = removed_path(cache_path, info.removed)
    if not path.is_file() or digest_file(path) != info.removed["digest"]:
        raise CorruptError(
            f"{path}: expected the table of removed samples that cache.json was written for, got "
            f"{'another file' if path.is_file() else 'none'}; restore the file"
        )

    with reading(path, RESTORE_TABLE):
        table = read_table(path)
        return RemovedSamples(table=table.cast(_SCHEMA), salt=table.schema.metadata[_SALT].decode())


def write_removed(path: Path, removed: RemovedSamples) -> None:
    """Write a table of removed samples, atomically."""
    with replacing(path) as temporary:
        write_table(temporary, removed.table.cast(_SCHEMA.with_metadata({_SALT: removed.salt})))


ALWAYS = ("image", "text")
"""Modalities that have an item table, and a list in each line of JSON, even without items."""

_JSON = JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class SampleTables(NamedTuple):
    """Consecutive samples.

    Args:
        samples: `key` and other columns.
        items: modality -> its items, whose column `sample` counts from the first of these samples.
    """

    samples: pa.Table
    items: Mapping[str, pa.Table]


def _sample_table(batch: Sequence[Sample]) -> pa.Table:
    columns: dict[str, list[Any]] = defaultdict(lambda: [None] * len(batch))
    for row, sample in enumerate(batch):
        for name, value in sample.columns.items():
            columns[name][row] = value

    # The key of the sample replaces a column of this name.
    columns.pop("key", None)
    keys = [sample.key for sample in batch]
    arrays = {"key": pa.array(keys, pa.string())}
    for name in sorted(columns):
        arrays[name] = _column(columns[name])
    return pa.table(arrays)


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        # Values of mixed types are kept as text.
        texts = [None if value is None else str(value) for value in values]
        return pa.array(texts, pa.string())


def _item_table(batch: Sequence[Sample], modality: str) -> pa.Table:
    schema = ITEM_SCHEMAS[modality]
    is_text = MODALITIES[modality].kind == "texts"

    rows: list[int] = []
    items: list[FileItem | TextItem] = []
    for row, sample in enumerate(batch):
        sample_items = sample.texts if is_text else sample.items_in_files(modality)
        rows += [row] * len(sample_items)
        items += sample_items

    columns: list[list[Any]] = [rows]
    for name in schema.names[1:]:
        columns.append(list(map(attrgetter(name), items)))
    return pa.table(columns, schema=schema)


def digest_input(batch: Sequence[Sample]) -> bytes:
    """Return samples as lines of canonical JSON, the input of the index digest.

    A line has a fifth element only if the sample has items of modalities other than image and text. An item has five
    elements only if it is an interval.

    Raises:
        SourceError: a string is not valid Unicode, or JSON does not have a value of a column or an item.
    """
    lines = []
    for sample in batch:
        images = [[item.path, item.offset, item.length] for item in sample.images]
        texts = [[item.text, item.language] for item in sample.texts]

        files = {}
        for name, items in sample.files.items():
            if items:
                files[name] = list(map(_location, items))

        try:
            elements = [sample.key, images, texts, dict(sample.columns)]
            if files:  # an empty fifth element would change the digest
                elements.append(files)
            lines.append(f"{_JSON.encode(elements)}\n".encode())
        except (UnicodeEncodeError, TypeError) as error:
            reason = f"text that is not valid Unicode: {error.reason}" if isinstance(error, UnicodeError) else error
            raise SourceError(
                f"sample {sample.key!r}: expected texts, numbers, booleans and None in its items and columns, got "
                f"{reason}; correct the source"
            ) from error
    return b"".join(lines)


def _location(item: FileItem) -> list[str | int | float | None]:
    if item.start_s is None and item.stop_s is None:
        return [item.path, item.offset, item.length]
    return [item.path, item.offset, item.length, item.start_s, item.stop_s]


BATCH = BLOCK
_COMPARED_AT_ONCE = 2**20  # Arrow hashes all new keys for each block


class TableWriter:
    """Writer of the tables of one part of a cache, first to a local folder.

    Memory: some 120 bytes per sample, to check that keys are unique, and a batch.

    Args:
        folder: local folder for unfinished files.
        number: number of the part.
        first_sample: row of its first sample.
    """

    def __init__(self, folder: Path, number: int = 0, first_sample: int = 0) -> None:
        self.num_samples = 0
        self._folder = folder
        self._number = number
        self._first_sample = first_sample
        self._samples = _SampleWriter(folder / table_name(SAMPLES, number))
        self._items: dict[str, _ItemWriter] = {}

    def add(self, batch: Sequence[Sample]) -> None:
        """Append samples."""
        modalities = set(ALWAYS)
        for sample in batch:
            for name, sample_items in sample.files.items():
                if sample_items:
                    modalities.add(name)

        items = {}
        for name in MODALITIES:
            if name in modalities:
                items[name] = _item_table(batch, name)
        self.add_tables(SampleTables(_sample_table(batch), items))

    def add_tables(self, tables: SampleTables) -> None:
        """Append the samples of tables."""
        first_row = self._first_sample + self.num_samples
        self._samples.write(tables.samples)

        for modality, items in tables.items.items():
            if len(items):
                # The items count samples from the first of these tables, but the file from the first of the cache.
                samples = pc.add(items["sample"], first_row)
                self._writer(modality).write(items.set_column(0, items.schema.field("sample"), samples))
        self.num_samples += len(tables.samples)

    def _writer(self, modality: str) -> "_ItemWriter":
        if modality not in self._items:
            path = self._folder / table_name(modality, self._number)
            self._items[modality] = _ItemWriter(path, ITEM_SCHEMAS[modality])
        return self._items[modality]

    def close(self, digest: str, earlier_samples: Table | None = None) -> Part:
        """Finish the files.

        Args:
            digest: SHA-256 of the samples.
            earlier_samples: sample table of the earlier parts.

        Raises:
            SourceError: a key is not unique, or a column has incompatible types.
        """
        self._samples.close(earlier_samples)
        for writer in self._items.values():
            writer.close()

        files = {}
        for name in (SAMPLES, *MODALITIES):
            if name == SAMPLES or name in self._items:
                files[name] = describe_file(self._folder, table_name(name, self._number))
        return Part(digest=digest, tables=files)


def describe_file(folder: Path, name: str) -> TableFile:
    """Return the entry of a finished table file in `cache.json`."""
    path = folder / name
    return TableFile(
        name=name,
        num_rows=pq.read_metadata(path).num_rows,
        num_bytes=path.stat().st_size,
        checksum=file_checksum(path),
    )


def rewrite_parts(
    cache_path: Path,
    info: CacheInfo,
    folder: Path,
    changed: Mapping[str, Ints],
    edits: Mapping[str, Callable[[pa.Table, int], pa.Table]],
) -> Iterator[Part]:
    """Write new versions of the table files in which rows change, and iterate over all parts of a cache.

    Args:
        folder: local folder for the files.
        changed: `samples` or a modality -> rows of its table that change.
        edits: `samples` or a modality -> function that accepts a block of rows and the number of its first row, and
            returns the new block.
    """
    first_rows = Counter[str]()
    for part in info.parts:
        files = dict(part.tables)
        for name, file in part.tables.items():
            rows = range(first_rows[name], first_rows[name] + file.num_rows)
            first_rows[name] = rows.stop

            # Files without a changed row stay as they are.
            if name in changed and ((changed[name] >= rows.start) & (changed[name] < rows.stop)).any():
                table = Table(cache_path, info.files(name), ITEM_SCHEMAS.get(name))
                files[name] = _rewrite(folder, name, table, file, rows, edits[name])

        yield Part(digest=part.digest, tables=files)


def _rewrite(
    folder: Path, name: str, table: Table, file: TableFile, rows: range, edit: Callable[[pa.Table, int], pa.Table]
) -> TableFile:
    # The number of the part follows the hyphen, and a revision the first dot.
    number = int(Path(file.name).stem.partition("-")[2].partition(".")[0])
    path = folder / table_name(name, number, next_revision(file))
    path.parent.mkdir(parents=True, exist_ok=True)

    with _TableFile(path, table.schema) as writer:
        for start in rows[::BLOCK]:
            block = table.read(start, min(start + BLOCK, rows.stop))
            writer.write_table(edit(block, start), row_group_size=block_rows(name))
    return describe_file(folder, str(path.relative_to(folder)))


@contextmanager
def scratch_folder(cache_path: Path) -> Iterator[Path]:
    """Create a local folder for unfinished tables, next to the tables of the cache if possible."""
    if is_remote(cache_path):
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return

    folder = partial_path(cache_path / "indexing")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_tables(folder: Path, cache_path: Path, parts: Iterable[Part]) -> None:
    """Move the finished files of some parts into a cache. Files that a folder lacks are in the cache already."""
    for part in parts:
        for file in part.tables.values():
            if (folder / file.name).is_file():
                put_file(folder / file.name, cache_path / file.name)


class _SampleWriter:
    """Writer of samples. Each batch goes to a separate file: the columns are known only after the last batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schemas: list[pa.Schema] = []

    def write(self, rows: pa.Table) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, self._batch_path(len(self._schemas)))
        self._schemas.append(rows.schema)

    def close(self, earlier_samples: Table | None) -> None:
        try:
            schema = pa.unify_schemas(self._schemas, promote_options="permissive")
            if earlier_samples is not None:
                pa.unify_schemas([earlier_samples.schema, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"a column of the source changes its type between samples: {error}") from error

        with _TableFile(self._path, schema) as writer:
            for number in range(len(self._schemas)):
                rows = [schema.empty_table(), pq.read_table(self._batch_path(number), use_threads=False)]
                table = pa.concat_tables(rows, promote_options="permissive")
                writer.write_table(table, row_group_size=BATCH)
                self._batch_path(number).unlink()

        keys = pq.read_table(self._path, columns=["key"], use_threads=False)["key"].cast(pa.large_string())
        _check_unique(keys)
        if earlier_samples is not None:
            _check_new(keys, earlier_samples)

    def _batch_path(self, number: int) -> Path:
        return self._path.with_name(f"batch-{number:05d}.parquet")


def _check_unique(keys: pa.ChunkedArray) -> None:
    """Check that no two keys are equal."""
    if pc.count_distinct(keys).as_py() == len(keys):
        return

    counts = pc.value_counts(keys)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))

    key = repeated[0]["values"].as_py()
    first, second = pc.indices_nonzero(pc.equal(keys, key))[:2].to_pylist()
    raise SourceError(
        f"keys must be unique; {key!r} is the key of rows {first} and {second} ({len(repeated)} such keys); "
        "rename a file (a.jpg and a.png have the same key); of a table, sort the rows by --key-column if those "
        "of one key are one sample, or choose another column"
    )


def _check_new(keys: pa.ChunkedArray, earlier_samples: Table) -> None:
    """Check that earlier parts do not have any of the keys."""
    for number, rows in enumerate(earlier_samples.blocks(_COMPARED_AT_ONCE, ["key"])):
        places = np.flatnonzero(pc.is_in(rows["key"], value_set=keys))
        if len(places):
            key = rows["key"][int(places[0])].as_py()
            raise SourceError(
                f"keys must be unique; {key!r} is the key of row {number * _COMPARED_AT_ONCE + places[0]} and of a new "
                "sample; rename a file, or choose another --key-column"
            )


class _TableFile(pq.ParquetWriter):  # type: ignore[misc]
    """Writer that does not finish its file when it is deleted, which would print a second error on a full disk."""

    def __del__(self) -> None:
        """Do nothing."""


class _ItemWriter:
    """Writer of the items of one modality, whose columns are known in advance."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = _TableFile(path, schema)
        self._schema = schema
        self._buffer: pa.Table = schema.empty_table()

    def write(self, rows: pa.Table) -> None:
        """Write whole row groups, and buffer the rest."""
        buffered = pa.concat_tables([self._buffer, rows.cast(self._schema)])
        num_full = len(buffered) // ITEM_BLOCK * ITEM_BLOCK
        if num_full:
            self._writer.write_table(buffered.slice(0, num_full), row_group_size=ITEM_BLOCK)

        # Combined, so that the rest is one chunk however many batches it came from.
        self._buffer = buffered.slice(num_full).combine_chunks()

    def close(self) -> None:
        if len(self._buffer):
            self._writer.write_table(self._buffer, row_group_size=ITEM_BLOCK)
        self._writer.close()


def without_samples(table: pa.Table, first_row: int, removed: Ints) -> pa.Table:
    """Replace the keys of removed samples, and set their other columns to null."""
    rows = removed[(removed >= first_row) & (removed < first_row + len(table))] - first_row
    if not len(rows):
        return table

    is_removed = np.zeros(len(table), bool)
    is_removed[rows] = True
    new_keys = np.full(len(table), None)
    for row in rows.tolist():
        new_keys[row] = f"removed-{first_row + row}"

    mask = pa.array(is_removed)
    columns = {"key": pc.if_else(mask, pa.array(new_keys, pa.large_string()), table["key"])}
    for field in table.schema:
        if field.name != "key":
            columns[field.name] = pc.if_else(mask, pa.scalar(None, field.type), table[field.name])
    return pa.table(columns, table.schema)


_NOTHING = {"path": "", "offset": 0, "length": 0, "text": ""}
"""Values of the columns of a removed item that cannot be null; all others become null."""


def without_items(table: pa.Table, removed: Ints) -> pa.Table:
    """Blank all columns of the items of removed samples, except `sample`."""
    is_removed = np.isin(table["sample"].to_numpy(), removed)
    if not is_removed.any():
        return table

    mask = pa.array(is_removed)
    columns = {"sample": table["sample"]}
    for field in table.schema:
        if field.name != "sample":
            blank = pa.scalar(_NOTHING.get(field.name), field.type)
            columns[field.name] = pc.if_else(mask, blank, table[field.name])
    return pa.table(columns, table.schema)


def relocate(table: pa.Table, first_row: int, relocated: Mapping[int, FileItem]) -> pa.Table:
    """Set the offsets and lengths of some items in their files. The rows of `relocated` count in the whole table."""
    new_items = {}
    for row, item in relocated.items():
        if first_row <= row < first_row + len(table):
            new_items[row - first_row] = item
    if not new_items:
        return table

    for name in ("offset", "length"):
        values = table[name].to_pylist()
        for row, item in new_items.items():
            values[row] = getattr(item, name)

        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int64()))
    return table
