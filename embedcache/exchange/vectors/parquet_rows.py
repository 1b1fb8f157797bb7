"""The rows of a column of lists in a Parquet file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Array
from embedcache.errors import DataError, UnknownNameError
from embedcache.exchange.vectors.incoming import check_dtype
from embedcache.sources.table_files import damage_named, open_parquet

_DTYPES = {"halffloat": "float16", "float": "float32"}


@dataclass(frozen=True, kw_only=True)
class ParquetRows:
    """A column of lists of one length, of float16 or float32.

    Args:
        path: the file.
        column: its name.
        num_rows: of the file.
        width: of a row.
        dtype: `float16` or `float32`.
    """

    path: Path
    column: str
    num_rows: int
    width: int
    dtype: str

    def blocks(self, first: int, size: int) -> Iterator[Array]:
        """Go through the rows from `first` on: arrays (B, D), B at most `size`; a row that is null is NaN.

        Raises:
            DataError: a list has another length than the first.
        """
        with damage_named(self.path), open_parquet(self.path) as file:
            groups, row = _groups_from(file, first)
            for batch in file.iter_batches(size, row_groups=groups, columns=[self.column], use_threads=False):
                yield self._values(batch.column(0), row)[max(0, first - row) :]
                row += len(batch)

    def _values(self, lists: pa.Array, first: int) -> Array:
        found = lists.drop_null()
        if not pa.types.is_fixed_size_list(lists.type):
            self._check_lengths(lists, first)
        values = np.full((len(lists), self.width), np.nan, self.dtype)
        numbers = found.flatten().to_numpy(zero_copy_only=False)
        values[lists.is_valid().to_numpy(zero_copy_only=False)] = numbers.reshape(len(found), self.width)
        return values

    def _check_lengths(self, lists: pa.Array, first: int) -> None:
        lengths = lists.value_lengths().fill_null(self.width).to_numpy()
        wrong = np.flatnonzero(lengths != self.width)
        if len(wrong):
            raise DataError(
                f"{self.path}, column {self.column}: row {first + wrong[0]:,} has {lengths[wrong[0]]:,} numbers, the "
                f"first has {self.width:,}; vectors of a feature have one width"
            )


def open_column(path: Path, column: str) -> ParquetRows:
    """Look at a column of vectors.

    Raises:
        PathError: there is no such file.
        SourceError: it is no Parquet.
        UnknownNameError: it has no such column; those that hold lists of numbers are listed.
        DataError: the column holds no lists of float16 or float32, or no row has one.
    """
    with damage_named(path), open_parquet(path) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise UnknownNameError(
                f"{path} has no column {column!r}; columns of vectors: {', '.join(vector_columns(schema)) or 'none'}"
            )
        kind = schema.field(column).type
        if not _is_list(kind):
            raise DataError(f"column {column} of {path} holds {kind}, not vectors: lists of float16 or float32")
        name = str(kind.value_type)
        dtype = check_dtype(_DTYPES.get(name, name), f"column {column} of {path}")
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(file, column)
        if not width:
            raise DataError(f"column {column} of {path} holds no vector in any of {file.metadata.num_rows:,} rows")
        return ParquetRows(path=path, column=column, num_rows=file.metadata.num_rows, width=width, dtype=dtype)


def vector_columns(schema: pa.Schema) -> list[str]:
    """Name the columns that hold lists of floating-point numbers."""
    return [field.name for field in schema if _is_list(field.type) and pa.types.is_floating(field.type.value_type)]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _first_length(file: pq.ParquetFile, column: str) -> int:
    for batch in file.iter_batches(1024, columns=[column], use_threads=False):
        lengths = batch.column(0).value_lengths().drop_null()
        if len(lengths):
            return int(lengths[0].as_py())
    return 0


def _groups_from(file: pq.ParquetFile, first: int) -> tuple[list[int], int]:
    """Give the row groups from that which holds a row on, and the first row of those."""
    start = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first < start + count:
            return list(range(group, file.num_row_groups)), start
        start += count
    return [], start
