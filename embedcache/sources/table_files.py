"""Rows of Parquet, CSV, TSV and JSONL files, one at a time: memory does not grow with their number.

Images that stand in Parquet files, read by row from many threads through the last few row groups.
"""

import csv
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.errors import EmbedcacheError, ItemError, SourceError
from embedcache.sources.files import open_binary, reading

Row: TypeAlias = Mapping[str, Any]
BATCH_ROWS = 1024
_ROWS_LOOKED_AT = 100


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One table file.

    Args:
        path: the file.
        columns: the names of all its columns, in order.
        image_bytes: those that hold images themselves: bytes, or a struct with a field `bytes`.
        plain: those that hold text, numbers, truth values or lists of text.
        read: goes through the rows, given the columns wanted.
    """

    path: Path
    columns: tuple[str, ...]
    image_bytes: frozenset[str]
    plain: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[Row]]

    @cached_property
    def folder(self) -> str:
        """The folder it is in."""
        return str(self.path.parent)

    @cached_property
    def stem(self) -> str:
        """Its path without the suffix."""
        return str(self.path.with_suffix(""))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Go through the rows in order, reading only `columns` where the format lets one.

        Raises:
            SourceError: the file is damaged; names it and, for text, the line.
        """
        with damage_named(self.path):
            yield from self.read(columns)


def open_table_file(path: Path) -> TableFile:
    """Read the columns of a table file; its suffix says of which format it is.

    CSV and TSV have no types, so all their cells are text: a key `007` stays one.

    Raises:
        PathError: it cannot be read.
        SourceError: it is damaged.
    """
    suffix = path.suffix.lower()
    with damage_named(path):
        if suffix == ".parquet":
            with open_parquet(path) as file:
                schema = file.schema_arrow
            return arrow_table(path, schema, partial(_read_parquet, path))
        if suffix == ".jsonl":
            return _text_file(path, _first_names(_jsonl_rows(path)), partial(_read_jsonl, path))
        delimiter = "\t" if suffix == ".tsv" else ","
        header = tuple(next(_csv_lines(path, delimiter), []))
        return _text_file(path, header, partial(_read_csv, path, delimiter))


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what the readers raise on a damaged file into errors that name it."""
    try:
        with reading(path):  # pyarrow raises OSError for damaged pages too
            yield
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (pa.ArrowException, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file here or elsewhere; only what is asked of it is read."""
    with open_binary(path) as file, pq.ParquetFile(file) as parquet:
        yield parquet


def holds_bytes(kind: pa.DataType) -> bool:
    """Say whether a column of this type holds images themselves."""
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_null,
    )
    return any(test(kind) for test in tests)


def arrow_table(path: Path, schema: pa.Schema, read: Callable[[Sequence[str]], Iterator[Row]]) -> TableFile:
    """Describe a table whose columns have Arrow types."""
    return TableFile(
        path=path,
        columns=tuple(schema.names),
        image_bytes=frozenset(field.name for field in schema if holds_bytes(field.type)),
        plain=tuple(field.name for field in schema if _is_plain(field.type)),
        read=read,
    )


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with open_parquet(path) as file:
        if not columns:
            yield from ({} for _ in range(file.metadata.num_rows))
            return
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()


def _text_file(path: Path, columns: tuple[str, ...], read: Callable[[Sequence[str]], Iterator[Row]]) -> TableFile:
    return TableFile(path=path, columns=columns, image_bytes=frozenset(), plain=columns, read=read)


def _first_names(rows: Iterator[Row]) -> tuple[str, ...]:
    """Give the names of the first rows of a JSONL file: later rows may lack some or have others."""
    return tuple(dict.fromkeys(name for row in islice(rows, _ROWS_LOOKED_AT) for name in row))


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for row in _jsonl_rows(path):
        yield {name: row[name] for name in columns if name in row}


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """Go through the objects of a JSONL file; blank lines are left out."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_object(line, f"{path} line {number}")


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{place} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{place} must be an object, one a line, not {value!r:.60}")
    return value


def _read_csv(path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[Row]:
    lines = _csv_lines(path, delimiter)
    header = next(lines, [])
    places = [(name, header.index(name)) for name in columns]
    for number, cells in enumerate(lines, start=1):
        if len(cells) != len(header):
            raise SourceError(
                f"{path} row {number} has {len(cells)} cells, its header {len(header)}: {delimiter.join(cells)!r:.60}"
            )
        yield {name: cells[place] for name, place in places}


def _csv_lines(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Go through the rows of a CSV file, the header first; blank lines are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from (cells for cells in csv.reader(file, delimiter=delimiter, strict=True) if cells)


CACHE_BYTES = 256 * 2**20


class RowGroups:
    """Reads single cells. Rows that follow each other cost one read of their row group.

    Peak memory: `cache_bytes`, or one row group of the image column where that is larger, and the
    one being read.

    Args:
        cache_bytes: decoded row groups kept, in bytes.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[Path, str, int], pa.ChunkedArray] = OrderedDict()
        self._starts: dict[Path, list[int]] = {}
        self._lock = Lock()

    def read(self, path: Path, column: str, row: int) -> Any:
        """Get one cell: bytes, a dict for a struct, or None. Safe from many threads.

        Raises:
            ItemError: the file is gone or damaged, or has no such row.
        """
        try:
            with self._lock:  # pyarrow itself reads a row group with several threads
                group, first = self._locate(path, row)
                cells = self._group(path, column, group)
        except EmbedcacheError as error:
            raise ItemError(str(error)) from None
        return cells[row - first].as_py()

    def _locate(self, path: Path, row: int) -> tuple[int, int]:
        """Give the row group of a row and the first row of that group."""
        if path not in self._starts:
            with damage_named(path):
                self._starts[path] = _group_starts(path)
        starts = self._starts[path]
        if row >= starts[-1]:
            raise ItemError(f"{path} has {starts[-1]} rows, no row {row}")
        group = bisect_right(starts, row) - 1
        return group, starts[group]

    def _group(self, path: Path, column: str, group: int) -> pa.ChunkedArray:
        name = (path, column, group)
        if name not in self._groups:
            with damage_named(path), open_parquet(path) as file:
                self._groups[name] = file.read_row_group(group, columns=[column]).column(column)
        self._groups.move_to_end(name)
        self._drop_oldest()
        return self._groups[name]

    def _drop_oldest(self) -> None:
        while len(self._groups) > 1 and self._size_bytes() > self._cache_bytes:
            self._groups.popitem(last=False)

    def _size_bytes(self) -> int:
        return sum(int(cells.nbytes) for cells in self._groups.values())


def _group_starts(path: Path) -> list[int]:
    """Give the first row of each row group, and at the end the number of rows."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return list(accumulate(sizes, initial=0))
