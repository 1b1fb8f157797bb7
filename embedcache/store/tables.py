"""The sample and item tables: their columns, and reading them in row order."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import CorruptError, EmbedcacheError, PathError, one_line
from embedcache.files import check_regular, io_reason, is_remote
from embedcache.modalities import MODALITIES
from embedcache.provenance import digest
from embedcache.sources.base import FileItem
from embedcache.store.layout import items_path, samples_path


@contextmanager
def open_table(file: Path | BytesIO, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open a local or remote Parquet table; pages that have a checksum are compared with it when they are read.

    Always read it with `use_threads=False`: the tables are small, and a process that exited right after Arrow's thread
    pool had started aborted in 2 of 30 runs (pyarrow 26, with torch imported). Local files are not read ahead either:
    Arrow does that in threads, which takes a table of one chunk four times as long.
    """
    if isinstance(file, BytesIO) or not is_remote(file):
        if not isinstance(file, BytesIO):
            check_regular(file)
        with pq.ParquetFile(file, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as table:
            yield table if metadata is not None else check_footer(table)
        return
    with (
        file.open("rb") as stream,
        pq.ParquetFile(stream, metadata=metadata, page_checksum_verification=True) as table,
    ):
        yield table if metadata is not None else check_footer(table)


def check_footer(table: pq.ParquetFile) -> pq.ParquetFile:
    """Return an open table whose footer, which has no checksum, counts its rows consistently; else `ArrowInvalid`.

    Columns are not looked at: Arrow ends the process where it reads the metadata of a damaged one.
    """
    metadata = table.metadata
    counts = {metadata.num_rows, sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))}
    if len(counts) > 1:
        raise pa.ArrowInvalid(f"its footer counts {' and '.join(map(str, sorted(counts)))} rows")
    return table


def read_table(file: Path | BytesIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read all rows of a table; `ArrowInvalid` if a page is damaged, or the counts of rows contradict each other."""
    with open_table(file) as table:
        rows, num_rows = table.read(columns=columns, use_threads=False), table.metadata.num_rows
    if len(rows) != num_rows:
        raise pa.ArrowInvalid(f"its footer counts {num_rows} rows, got {len(rows)}")
    return rows


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table whose pages have checksums, which `open_table` compares."""
    pq.write_table(table, path, write_page_checksum=True)


class TableDigest:
    """SHA-256 of the values of a table's columns in row order, independent of batches."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = defaultdict(hashlib.sha256)

    def update(self, rows: pa.Table) -> None:
        """Add rows with int64, float64 and string columns."""
        for name in rows.column_names:
            kind = rows.schema.field(name).type
            if pa.types.is_integer(kind):
                data = rows[name].to_numpy().astype("<i8").tobytes()
            elif pa.types.is_floating(kind):
                data = rows[name].to_numpy().astype("<f8").tobytes()  # null is NaN, which is no value of these tables
            else:
                values = rows[name].to_pylist()
                data = "".join("\1\0" if value is None else f"{value}\0" for value in values).encode()
            self._columns[name].update(data)

    def hexdigest(self) -> str:
        """Return the digest as 64 hex digits."""
        return digest({name: column.hexdigest() for name, column in self._columns.items()})


@contextmanager
def table_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading a table as a `PathError`, or as a `CorruptError` if the file is not that table."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        if isinstance(error, EmbedcacheError):
            raise
        if getattr(error, "errno", None) is not None:
            raise PathError(f"cannot read {path}: {io_reason(error)}") from error
        raise CorruptError(
            f"{path} cannot be read: {one_line(error)}; restore the file, or extract into a new folder"
        ) from error


_FILES = [("sample", pa.int64()), ("path", pa.string()), ("offset", pa.int64()), ("length", pa.int64())]
_INTERVAL = [("start_s", pa.float64()), ("stop_s", pa.float64())]
_TEXTS = [("sample", pa.int64()), ("text", pa.string()), ("language", pa.string())]
ITEM_SCHEMAS = {
    name: pa.schema(_TEXTS if modality.kind == "texts" else _FILES + _INTERVAL * modality.has_interval)
    for name, modality in MODALITIES.items()
}


def item_tables(folder: Path) -> list[str]:
    """Return the modalities that have an item table in a folder."""
    return [modality for modality in ITEM_SCHEMAS if items_path(folder, modality).is_file()]


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """One sample of the tables of a cache.

    Args:
        files: modality -> first row of its items, and the items; of modalities that the cache has.
        texts: each text with its language.
    """

    key: str
    files: Mapping[str, tuple[int, Sequence[FileItem]]]
    texts: Sequence[tuple[str, str | None]]


def read_samples(cache_path: Path, modalities: Collection[str], rows: range) -> Iterator[IndexedSample]:
    """Iterate over samples of a cache with items of some modalities in row order. Memory: one batch of each table."""
    keys = (row["key"] for row in _iterate_rows(samples_path(cache_path), ["key"]))
    names = [name for name in modalities if MODALITIES[name].kind == "files"]
    texts = _rows_by_sample(items_path(cache_path, "text")) if "text" in modalities else repeat([])
    items = (_rows_by_sample(items_path(cache_path, modality)) for modality in names)
    next_rows = dict.fromkeys(names, 0)
    for number, (key, captions, *groups) in enumerate(islice(zip(keys, texts, *items, strict=False), rows.stop)):
        if number >= rows.start:
            yield IndexedSample(
                key=key,
                files={
                    name: (next_rows[name], [to_file_item(row) for row in group])
                    for name, group in zip(names, groups, strict=True)
                },
                texts=[(row["text"], row["language"]) for row in captions],
            )
        for name, group in zip(names, groups, strict=True):
            next_rows[name] += len(group)


def to_file_item(row: Mapping[str, Any]) -> FileItem:
    """Return the item in a row of an item table of files."""
    return FileItem(**{name: value for name, value in row.items() if name != "sample"})


def _iterate_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    with table_errors(path), open_table(path) as table:
        for batch in table.iter_batches(columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _rows_by_sample(path: Path) -> Iterator[list[Mapping[str, Any]]]:
    """Iterate over the rows of each sample in an item table, which is sorted by sample; without end."""
    next_sample = 0
    for sample, rows in groupby(_iterate_rows(path), key=itemgetter("sample")):
        yield from repeat([], sample - next_sample)
        yield list(rows)
        next_sample = sample + 1
    yield from repeat([])
