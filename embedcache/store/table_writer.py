"""Writing the sample and item tables of a cache: from a source's samples, or as a copy of those of a cache."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONEncoder
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Ints, blocks
from embedcache.errors import SourceError
from embedcache.files import is_remote, partial_path, put_file
from embedcache.modalities import FILE_MODALITIES, MODALITIES
from embedcache.samples import FileItem, Sample
from embedcache.store.arrays import file_checksum
from embedcache.store.layout import SAMPLES, Part, TableFile, next_revision, table_name
from embedcache.store.tables import BLOCK, ITEM_BLOCK, ITEM_SCHEMAS, Table, block_rows

ALWAYS = ("image", "text")
"""Modalities that always have an item table, and a list in each line of JSON; others have them if there are items."""

_OTHERS = tuple(modality.name for modality in FILE_MODALITIES if modality.name not in ALWAYS)

_JSON = JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class SampleTables(NamedTuple):
    """Consecutive samples.

    Args:
        samples: `key` and other columns.
        items: modality -> its items, whose column `sample` counts from the first of these samples.
    """

    samples: pa.Table
    items: Mapping[str, pa.Table]


def to_tables(batch: Sequence[Sample]) -> SampleTables:
    """Return samples as tables; a modality of which no sample has an item is left out, except image and text."""
    named = {name for sample in batch for name, items in sample.files.items() if items}
    modalities = (*ALWAYS, *(name for name in _OTHERS if name in named))
    return SampleTables(_sample_table(batch), {name: _item_table(batch, name) for name in modalities})


def _sample_table(batch: Sequence[Sample]) -> pa.Table:
    columns: dict[str, list[Any]] = defaultdict(lambda: [None] * len(batch))
    for row, sample in enumerate(batch):
        for name, value in sample.columns.items():
            columns[name][row] = value
    arrays = {name: _column(values) for name, values in sorted(columns.items()) if name != "key"}
    return pa.table({"key": pa.array([sample.key for sample in batch], pa.string()), **arrays})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # mixed types: keep them as text
        return pa.array([None if value is None else str(value) for value in values], pa.string())


def _item_table(batch: Sequence[Sample], modality: str) -> pa.Table:
    schema = ITEM_SCHEMAS[modality]
    is_text = MODALITIES[modality].kind == "texts"
    items: list[Sequence[Any]] = [sample.texts if is_text else sample.items_in_files(modality) for sample in batch]
    rows = [row for row, sample_items in enumerate(items) for _ in sample_items]
    columns = ([getattr(item, name) for group in items for item in group] for name in schema.names[1:])
    return pa.table([rows, *columns], schema=schema)


def count_from(first: int, items: pa.Table) -> pa.Table:
    """Return items with `first` added to their sample numbers."""
    return items.set_column(0, items.schema.field("sample"), pc.add(items["sample"], first))


def digest_input(batch: Sequence[Sample]) -> bytes:
    """Return samples as lines of canonical JSON, the input of the index digest.

    A line has a fifth element only if the sample has items of other modalities than image and text, and an item only
    has five elements if it is an interval.

    Raises:
        SourceError: text that is not Unicode, or a value of a column or an item that JSON does not have.
    """
    lines = []
    for sample in batch:
        images = [[item.path, item.offset, item.length] for item in sample.images]
        texts = [[item.text, item.language] for item in sample.texts]
        others = {name: [_location(item) for item in items] for name, items in sample.files.items() if items}
        try:
            line = _JSON.encode([sample.key, images, texts, dict(sample.columns), *([others] if others else [])])
            lines.append(f"{line}\n".encode())
        except (UnicodeEncodeError, TypeError) as error:
            reason = f"text that is not valid Unicode: {error.reason}" if isinstance(error, UnicodeError) else error
            raise SourceError(
                f"sample {sample.key!r}: expected texts, numbers, booleans and None in its items and columns, got "
                f"{reason}; correct the source"
            ) from error
    return b"".join(lines)


def _location(item: FileItem) -> list[str | int | float | None]:
    interval = [item.start_s, item.stop_s]
    return [item.path, item.offset, item.length, *(interval if interval != [None, None] else [])]


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
        self._folder, self._number, self._first_sample = folder, number, first_sample
        self._samples = _SampleWriter(folder / table_name(SAMPLES, number))
        self._items: dict[str, _ItemWriter] = {}

    def add(self, batch: Sequence[Sample]) -> None:
        """Append samples."""
        self.add_tables(to_tables(batch))

    def add_tables(self, tables: SampleTables) -> None:
        """Append the samples of tables."""
        first_row = self._first_sample + self.num_samples
        self._samples.write(tables.samples)
        for modality, items in tables.items.items():
            if len(items):
                self._writer(modality).write(count_from(first_row, items))
        self.num_samples += len(tables.samples)

    def _writer(self, modality: str) -> "_ItemWriter":
        if modality not in self._items:
            path = self._folder / table_name(modality, self._number)
            self._items[modality] = _ItemWriter(path, ITEM_SCHEMAS[modality])
        return self._items[modality]

    def close(self, digest: str, before: Table | None = None) -> Part:
        """Finish the files.

        Args:
            digest: SHA-256 of the samples.
            before: the sample table of the parts before this one.

        Raises:
            SourceError: a key is not unique, or a column has incompatible types.
        """
        self._samples.close(before)
        for writer in self._items.values():
            writer.close()
        names = [SAMPLES, *(name for name in MODALITIES if name in self._items)]
        files = {name: describe_file(self._folder, table_name(name, self._number)) for name in names}
        return Part(digest=digest, tables=files)


def describe_file(folder: Path, name: str) -> TableFile:
    """Return what `cache.json` says of a finished file of a table."""
    path = folder / name
    return TableFile(
        name=name,
        num_rows=pq.read_metadata(path).num_rows,
        num_bytes=path.stat().st_size,
        checksum=file_checksum(path),
    )


def rewrite_table(
    folder: Path, name: str, table: Table, file: TableFile, first_row: int, edit: Callable[[pa.Table, int], pa.Table]
) -> TableFile:
    """Write another version of a file of a table into a local folder.

    Args:
        folder: the local folder.
        name: `samples` or a modality.
        table: the whole table.
        file: the file.
        first_row: its first row in the table.
        edit: changes a block of rows, the first of which has a number.
    """
    number = int(Path(file.name).stem.partition("-")[2].partition(".")[0])
    path = folder / table_name(name, number, next_revision(file))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _TableFile(path, table.schema) as writer:
        for rows in blocks(file.num_rows, BLOCK):
            start = first_row + rows.start
            writer.write_table(edit(table.read(start, first_row + rows.stop), start), row_group_size=block_rows(name))
    return describe_file(folder, str(path.relative_to(folder)))


@contextmanager
def scratch_folder(cache_path: Path) -> Iterator[Path]:
    """Create a local folder for unfinished tables, beside those of the cache if possible."""
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
    """Move the finished files of some parts to their places in a cache; files that are there already stay."""
    for file in (file for part in parts for file in part.tables.values()):
        if (folder / file.name).is_file():
            put_file(folder / file.name, cache_path / file.name)


class _SampleWriter:
    """Writer of samples, each batch to a file of its own: what columns there are is known after the last one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._schemas: list[pa.Schema] = []

    def write(self, rows: pa.Table) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, self._batch_path(len(self._schemas)))
        self._schemas.append(rows.schema)

    def close(self, before: Table | None) -> None:
        try:
            schema = pa.unify_schemas(self._schemas, promote_options="permissive")
            if before is not None:
                pa.unify_schemas([before.schema, schema], promote_options="permissive")
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
        if before is not None:
            _check_new(keys, before)

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


def _check_new(keys: pa.ChunkedArray, before: Table) -> None:
    """Check that no key is one of those of earlier parts."""
    for number, rows in enumerate(before.blocks(_COMPARED_AT_ONCE, ["key"])):
        places = np.flatnonzero(pc.is_in(rows["key"], value_set=keys))
        if len(places):
            key = rows["key"][int(places[0])].as_py()
            raise SourceError(
                f"keys must be unique; {key!r} is the key of row {number * _COMPARED_AT_ONCE + places[0]} and of a new "
                "sample; rename a file, or choose another --key-column"
            )


class _TableFile(pq.ParquetWriter):  # type: ignore[misc]
    """A table that is not finished when it is thrown away: on a full disk, pyarrow would print that this failed too."""

    def __del__(self) -> None:
        """Do nothing."""


class _ItemWriter:
    """Writer of the items of one modality, whose columns are known."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer, self._schema = _TableFile(path, schema), schema
        self._buffer: pa.Table = schema.empty_table()

    def write(self, rows: pa.Table) -> None:
        """Write whole row groups, and keep the rest."""
        buffered = pa.concat_tables([self._buffer, rows.cast(self._schema)])
        num_full = len(buffered) // ITEM_BLOCK * ITEM_BLOCK
        if num_full:
            self._writer.write_table(buffered.slice(0, num_full), row_group_size=ITEM_BLOCK)
        self._buffer = buffered.slice(num_full).combine_chunks()

    def close(self) -> None:
        if len(self._buffer):
            self._writer.write_table(self._buffer, row_group_size=ITEM_BLOCK)
        self._writer.close()


def without_samples(table: pa.Table, first_row: int, removed: Ints) -> pa.Table:
    """Replace the keys of removed samples, and their other columns by null."""
    rows = removed[(removed >= first_row) & (removed < first_row + len(table))] - first_row
    if not len(rows):
        return table
    is_removed, keys = np.zeros(len(table), bool), np.full(len(table), None)
    is_removed[rows], keys[rows] = True, [removed_key(first_row + row) for row in rows.tolist()]
    mask, nulls = pa.array(is_removed), {field.name: pa.scalar(None, field.type) for field in table.schema}
    columns = {name: pc.if_else(mask, null, table[name]) for name, null in nulls.items() if name != "key"}
    return pa.table({"key": pc.if_else(mask, pa.array(keys, pa.large_string()), table["key"]), **columns}, table.schema)


def removed_key(row: int) -> str:
    """Return the key in the place of that of a removed sample."""
    return f"removed-{row}"


_NOTHING = {"path": "", "offset": 0, "length": 0, "text": ""}
"""Values of the columns of a removed item that cannot be null; all others become null."""


def without_items(table: pa.Table, removed: Ints) -> pa.Table:
    """Blank all columns of the items of removed samples, except `sample`."""
    is_removed = np.isin(table["sample"].to_numpy(), removed)
    if not is_removed.any():
        return table
    mask = pa.array(is_removed)
    columns = {
        field.name: pc.if_else(mask, pa.scalar(_NOTHING.get(field.name), field.type), table[field.name])
        for field in table.schema
        if field.name != "sample"
    }
    return pa.table({"sample": table["sample"], **columns}, table.schema)


def relocate(table: pa.Table, first_row: int, relocated: Mapping[int, FileItem]) -> pa.Table:
    """Set where in their files the bytes of some items are; `relocated` has rows of the whole table."""
    new_items = {row - first_row: item for row, item in relocated.items() if first_row <= row < first_row + len(table)}
    for name in ("offset", "length") if new_items else ():
        values = table[name].to_pylist()
        for row, item in new_items.items():
            values[row] = getattr(item, name)
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int64()))
    return table
