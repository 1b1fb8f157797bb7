"""Writing the sample and item tables of a cache: from a source's samples, or as a copy of those of a cache."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from json import JSONEncoder
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Ints, distinct
from embedcache.errors import CorruptError, SourceError
from embedcache.files import is_remote, partial_path, put_file, remove_file
from embedcache.modalities import FILE_MODALITIES, MODALITIES
from embedcache.progress import NullProgress, Progress
from embedcache.sources.base import FileItem, Sample
from embedcache.store.columns import widen
from embedcache.store.layout import items_path, samples_path
from embedcache.store.tables import (
    BLOCK,
    ITEM_SCHEMAS,
    TableChecksums,
    TableDigest,
    add_footer_checksum,
    item_tables,
    open_table,
    read_table,
)

ALWAYS = ("image", "text")
"""Modalities that always have an item table, and a list in each line of JSON; others have them if there are items."""

_OTHERS = tuple(modality.name for modality in FILE_MODALITIES if modality.name not in ALWAYS)

_INFERRED = {pa.int64(), pa.float64(), pa.bool_(), pa.string()}
"""Types of columns whose Python values Arrow gives the same type."""

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


def join_tables(pieces: Sequence[SampleTables]) -> SampleTables:
    """Join consecutive samples to the tables that `to_tables` makes of them.

    So a column has the type that Arrow infers from its values, and is left out if no sample has one.
    """
    tables, items = [piece.samples for piece in pieces], {}
    starts = list(accumulate(map(len, tables), initial=0))
    names = sorted({name for table in tables for name in table.column_names} - {"key"})
    columns = {name: _join_column(name, tables) for name in names}
    samples = {"key": pa.concat_tables([table.select(["key"]) for table in tables]).combine_chunks()["key"]}
    samples |= {name: column for name, column in columns.items() if column.null_count < len(column)}
    for modality, schema in ITEM_SCHEMAS.items():
        found = [
            count_from(start, piece.items[modality])
            for start, piece in zip(starts, pieces, strict=False)
            if modality in piece.items
        ]
        joined = pa.concat_tables([schema.empty_table(), *found]).combine_chunks()
        if len(joined) or modality in ALWAYS:
            items[modality] = joined
    return SampleTables(pa.table(samples), items)


def _join_column(name: str, tables: Sequence[pa.Table]) -> pa.Array:
    nothing = (pa.chunked_array([pa.nulls(len(table))]) for table in tables)
    parts = [table[name] if name in table.column_names else null for table, null in zip(tables, nothing, strict=True)]
    kinds = {part.type for part in parts if part.null_count < len(part)}
    if len(kinds) == 1 and kinds <= _INFERRED:
        kind = kinds.pop()
        return pa.chunked_array([chunk for part in parts for chunk in part.cast(kind).chunks], kind).combine_chunks()
    return _column([value for part in parts for value in part.to_pylist()])


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
        except UnicodeEncodeError as error:
            raise SourceError(
                f"sample {sample.key!r} holds text that is not valid Unicode: {error.reason}; correct the source"
            ) from error
        except TypeError as error:
            raise SourceError(
                f"sample {sample.key!r}: expected texts, numbers, booleans and None in its items and columns: {error}; "
                "correct the source"
            ) from error
    return b"".join(lines)


def _location(item: FileItem) -> list[str | int | float | None]:
    interval = [item.start_s, item.stop_s]
    return [item.path, item.offset, item.length, *(interval if interval != [None, None] else [])]


BATCH = BLOCK


class WrittenTables(NamedTuple):
    """The tables in a folder, and what `cache.json` states of them.

    Args:
        num_items: modality -> number of items.
        digests: table -> digest of its keys or items.
        checksums: table -> column -> checksums by blocks of rows.
    """

    folder: Path
    num_items: Mapping[str, int]
    digests: Mapping[str, str]
    checksums: Mapping[str, Mapping[str, str]]


class TableWriter:
    """Writer of the sample and item tables of a cache to a new local folder; a row group holds one chunk of items.

    Memory: some 90 bytes per sample, to check that keys are unique, and a batch.
    """

    def __init__(self, folder: Path, chunk_size: int) -> None:
        self.num_samples = 0
        self._samples = _SampleWriter(samples_path(folder))
        self._folder, self._chunk_size = folder, chunk_size
        self._items: dict[str, _ItemWriter] = {}
        for modality in ALWAYS:
            self._writer(modality)

    def copy(
        self,
        cache_path: Path,
        num_samples: int,
        relocated: Mapping[str, Mapping[int, FileItem]],
        checksums: Mapping[str, Mapping[str, str]],
        *,
        removed: Ints | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Copy the first samples of a cache's tables; some rows of a modality have a new location of their bytes.

        `checksums` are those of the tables: the copy of a damaged table would be called intact. `removed` are rows of
        samples of which nothing is copied but that they exist. `progress` advances by the rows of all tables. Raises
        `CorruptError`.
        """
        progress = progress or NullProgress()
        removed = np.empty(0, np.int64) if removed is None else removed
        old = TableChecksums(BLOCK)
        with open_table(samples_path(cache_path)) as file:
            is_longer = file.metadata.num_rows > num_samples  # by an --extend that was killed: columns may be wider
            for batch in file.iter_batches(BATCH, use_threads=False):
                rows = pa.table(batch).slice(0, num_samples - self._samples.num_rows)
                old.update(rows)
                self._samples.write(_without_samples(rows, self._samples.num_rows, removed))
                progress.advance(len(rows))
        _check_copy(old, {} if is_longer else checksums.get("samples", {}), samples_path(cache_path))
        for modality in item_tables(cache_path):
            writer, moved, old = self._writer(modality), relocated.get(modality, {}), TableChecksums(self._chunk_size)
            with open_table(items_path(cache_path, modality)) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, use_threads=False)
                    table = table.filter(pc.less(table["sample"], num_samples))
                    old.update(table)
                    writer.write(_relocate(_without_items(table, removed), writer.num_rows, moved))
                    progress.advance(len(table))
            _check_copy(old, checksums.get(modality, {}), items_path(cache_path, modality))
        self.num_samples = num_samples

    def add(self, batch: Sequence[Sample]) -> None:
        """Append samples."""
        self.add_tables(to_tables(batch))

    def add_tables(self, tables: SampleTables) -> None:
        """Append the samples of tables."""
        self._samples.write(tables.samples)
        for modality, items in tables.items.items():
            self._writer(modality).write(count_from(self.num_samples, items))
        self.num_samples += len(tables.samples)

    def _writer(self, modality: str) -> "_ItemWriter":
        if modality not in self._items:
            path = items_path(self._folder, modality)
            self._items[modality] = _ItemWriter(path, ITEM_SCHEMAS[modality], self._chunk_size)
        return self._items[modality]

    def close(self) -> WrittenTables:
        """Finish the tables; those of modalities without items are not among them.

        Raises:
            SourceError: a key is not unique, or a column has incompatible types.
        """
        for writer in self._items.values():
            writer.close()
        self._samples.close()
        items = {name: self._items[name] for name in MODALITIES if name in self._items and self._items[name].num_rows}
        tables: dict[str, _SampleWriter | _ItemWriter] = {"samples": self._samples, **items}
        return WrittenTables(
            folder=self._folder,
            num_items={name: writer.num_rows for name, writer in items.items()},
            digests={name: writer.digest.hexdigest() for name, writer in tables.items()},
            checksums={name: writer.checksums.close() for name, writer in tables.items()},
        )

    def count_distinct_images(self) -> int:
        """Return how many images the rows of the finished table name. Memory: 16 bytes per row."""
        with open_table(items_path(self._folder, "image")) as file:
            batches = file.iter_batches(BATCH, columns=["path"], use_threads=False)
            hashes = [hash_texts(batch["path"]) for batch in batches]
        return len(distinct(np.concatenate(hashes)))


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


def put_tables(folder: Path, cache_path: Path) -> None:
    """Move finished tables to their places in a cache."""
    put_file(samples_path(folder), samples_path(cache_path))
    new = item_tables(folder)
    for modality in new:
        put_file(items_path(folder, modality), items_path(cache_path, modality))
    for modality in item_tables(cache_path):
        if modality not in new:  # of an interrupted attempt with other samples
            remove_file(items_path(cache_path, modality))


def _check_copy(copied: TableChecksums, written: Mapping[str, str], path: Path) -> None:
    """Check that the rows that were copied have the checksums that `cache.json` states."""
    found = copied.close()
    changed = [name for name, checksums in written.items() if found.get(name) != checksums]
    if changed:
        raise CorruptError(
            f"{path}: column {changed[0]!r} has changed since it was written; restore the file, or extract into a new "
            "folder"
        )


class _SampleWriter:
    """Writer of samples, each batch to a file of its own: what columns there are is known after the last one."""

    def __init__(self, path: Path) -> None:
        self.num_rows = 0
        self.digest = TableDigest()
        self.checksums = TableChecksums(BLOCK)
        self._path = path
        self._hashes: list[Ints] = []
        self._schemas: list[pa.Schema] = []

    def write(self, rows: pa.Table) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, self._batch_path(len(self._schemas)))
        self._hashes.append(hash_texts(rows["key"]))
        self.digest.update(rows.select(["key"]))
        self._schemas.append(rows.schema)
        self.num_rows += len(rows)

    def close(self) -> None:
        self._check_unique()
        try:
            schema = pa.unify_schemas(self._schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"a column of the source changes its type between samples: {error}") from error
        with pq.ParquetWriter(self._path, schema) as writer:
            for number in range(len(self._schemas)):
                rows = [schema.empty_table(), read_table(self._batch_path(number))]
                table = pa.concat_tables(rows, promote_options="permissive")
                writer.write_table(table, row_group_size=BATCH)
                self.checksums.update(table)
                self._batch_path(number).unlink()
        add_footer_checksum(self._path)

    def _check_unique(self) -> None:
        """Check that no two keys are equal, by reading those whose hashes are."""
        hashes_N = np.concatenate([np.empty(0, np.int64), *self._hashes])
        order_N = np.argsort(hashes_N, kind="stable")
        is_next = np.diff(hashes_N[order_N]) == 0
        rows = np.sort(order_N[np.append(is_next, False) | np.append(False, is_next)])
        if not len(rows):
            return
        starts, keys = np.cumsum([0, *map(len, self._hashes)]), []
        for number in distinct(np.searchsorted(starts, rows, side="right") - 1).tolist():
            inside = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
            keys.append(read_table(self._batch_path(number), columns=["key"])["key"].take(pa.array(inside)))
        _check_keys(widen(pa.chunked_array([chunk for part in keys for chunk in part.chunks], pa.string())), rows)

    def _batch_path(self, number: int) -> Path:
        return self._path.with_name(f"samples-{number:05d}.parquet")


class _TableFile(pq.ParquetWriter):  # type: ignore[misc]
    """A table that is not finished when it is thrown away: on a full disk, pyarrow would print that this failed too."""

    def __del__(self) -> None:
        """Do nothing."""


class _ItemWriter:
    """Writer of the items of one modality, whose columns are known: whole chunks are written, the rest is kept."""

    def __init__(self, path: Path, schema: pa.Schema, chunk_size: int) -> None:
        path.parent.mkdir(parents=True)
        self.num_rows = 0
        self.digest = TableDigest()
        self.checksums = TableChecksums(chunk_size)
        self._path, self._writer = path, _TableFile(path, schema)
        self._schema = schema
        self._chunk_size = chunk_size
        self._buffer: pa.Table = schema.empty_table()

    def write(self, rows: pa.Table) -> None:
        self.num_rows += len(rows)
        self.digest.update(rows)
        rows = rows.cast(self._schema)
        self.checksums.update(rows)
        buffered = pa.concat_tables([self._buffer, rows])
        num_full = len(buffered) // self._chunk_size * self._chunk_size
        if num_full:
            self._writer.write_table(buffered.slice(0, num_full), row_group_size=self._chunk_size)
        self._buffer = buffered.slice(num_full).combine_chunks()

    def close(self) -> None:
        if len(self._buffer):
            self._writer.write_table(self._buffer, row_group_size=self._chunk_size)
        self._writer.close()
        add_footer_checksum(self._path)


def _without_samples(table: pa.Table, first_row: int, removed: Ints) -> pa.Table:
    """Replace the keys of removed samples, and their other columns by null."""
    rows = removed[(removed >= first_row) & (removed < first_row + len(table))] - first_row
    if not len(rows):
        return table
    is_removed, keys = np.zeros(len(table), bool), np.full(len(table), None)
    is_removed[rows], keys[rows] = True, [removed_key(first_row + row) for row in rows.tolist()]
    mask, nulls = pa.array(is_removed), {field.name: pa.scalar(None, field.type) for field in table.schema}
    columns = {name: pc.if_else(mask, null, table[name]) for name, null in nulls.items() if name != "key"}
    return pa.table({"key": pc.if_else(mask, pa.array(keys, pa.string()), table["key"]), **columns}, table.schema)


def removed_key(row: int) -> str:
    """Return the key in the place of that of a removed sample."""
    return f"removed-{row}"


_NOTHING = {"path": "", "offset": 0, "length": 0, "text": ""}
"""Values of the columns of a removed item that cannot be null; all others become null."""


def _without_items(table: pa.Table, removed: Ints) -> pa.Table:
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


def _relocate(table: pa.Table, first_row: int, relocated: Mapping[int, FileItem]) -> pa.Table:
    """Set where in their files the bytes of some items are; `relocated` has rows of the whole table."""
    new_items = {row - first_row: item for row, item in relocated.items() if first_row <= row < first_row + len(table)}
    for name in ("offset", "length") if new_items else ():
        values = table[name].to_pylist()
        for row, item in new_items.items():
            values[row] = getattr(item, name)
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.int64()))
    return table


def hash_texts(texts: pa.Array | pa.ChunkedArray) -> Ints:
    """Return a 64-bit hash of each text that is not null, the same within this process."""
    return np.fromiter(map(hash, texts.drop_null().to_pylist()), np.int64)


def _check_keys(keys: pa.ChunkedArray, rows_N: Ints) -> None:
    """Check that keys are unique; `rows_N` are their rows in the sample table."""
    counts = pc.value_counts(keys)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        key = repeated[0]["values"].as_py()
        rows = rows_N[pc.indices_nonzero(pc.equal(keys, key)).to_numpy()].tolist()
        raise SourceError(
            f"keys must be unique; {key!r} is the key of rows {rows[0]} and {rows[1]} ({len(repeated)} such keys); "
            "rename a file (a.jpg and a.png have the same key); of a table, sort the rows by --key-column if those of "
            "one key are one sample, or choose another column"
        )
