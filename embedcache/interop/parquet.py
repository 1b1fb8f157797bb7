"""Parquet with vectors as lists of one length: a row a sample, with its key, caption and columns.

The rows of a column of lists in a Parquet file.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Array, blocks
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.files import replacing
from embedcache.interop.incoming import Incoming, Part, check_dtype
from embedcache.interop.outgoing import check_new_file
from embedcache.progress import Progress
from embedcache.sources.table_files import open_parquet, wrap_table_errors

if TYPE_CHECKING:
    from embedcache.interop.outgoing import Outgoing

FORM = "parquet"
COLUMNS: Mapping[Modality, str] = {"image": "image_vector", "text": "text_vector"}
_BLOCK = 8192


def open_parquet_vectors(path: Path, *, image: str | None = None, text: str | None = None) -> Incoming:
    """Look at a Parquet file, or at a folder of such in the order of their names.

    Args:
        path: the file or folder.
        image: column of image vectors; where neither is named, `image_vector` and `text_vector`, or those of them
            that there are.
        text: column of text vectors.

    Raises:
        PathError: there is none.
        SettingError: no column is named, and there is none of those names.
        UnknownNameError: a file has no such column.
        DataError: a column holds no vectors of float16 or float32, or files differ in width or dtype.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise PathError(f"{path} holds no .parquet; give a file, or a folder of such")
    with wrap_table_errors(files[0]), open_parquet(files[0]) as file:
        schema = file.schema_arrow
    modalities = _modalities(schema, image, text, files[0])
    parts = [Part(vectors={name: open_column(file, name) for name in modalities}, table=file) for file in files]
    return Incoming(form=FORM, path=path, modalities=modalities, parts=parts, about=_origin(schema))


def write_parquet(outgoing: "Outgoing", path: Path, *, progress: Progress) -> int:
    """Write one Parquet file, whole or not at all; give the number of rows. Vectors are as they are in the cache.

    Memory: a block, and the cache's tables.

    Raises:
        PathError: the file is there, or its name does not end in `.parquet`.
    """
    check_new_file(path, ".parquet")
    with replacing(path) as temporary:
        write_rows(temporary, table_blocks(outgoing, progress), outgoing.metadata)
    return len(outgoing.samples)


def table_blocks(
    outgoing: "Outgoing", progress: Progress, *, names: Mapping[Modality, str] = COLUMNS
) -> Iterator[pa.Table]:
    """Go through an export's rows, columns and vectors together."""
    num_rows = len(outgoing.samples)
    progress.start("writing", num_rows, "rows")
    streams = {modality: outgoing.vectors(modality, _BLOCK) for modality in outgoing.modalities if modality in names}
    for rows in blocks(num_rows, _BLOCK):
        table = outgoing.table(rows)
        for modality, stream in streams.items():
            table = table.append_column(names[modality], vector_lists(next(stream)))
        yield table
        progress.advance(len(table))
    progress.finish()


def vector_lists(vectors_ND: Array) -> pa.Array:
    """Make a column of lists of one length: (N, D) of any float type."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])


def write_rows(path: Path, tables: Iterator[pa.Table], metadata: Mapping[str, str]) -> None:
    """Write a stream of tables of one schema, a row group each."""
    first = next(tables)
    schema = first.schema.with_metadata(metadata)
    with pq.ParquetWriter(path, schema) as writer:
        writer.write_table(first.cast(schema))
        for table in tables:
            writer.write_table(table.cast(schema))


def _modalities(schema: pa.Schema, image: str | None, text: str | None, path: Path) -> Mapping[str, Modality]:
    if image is None and text is None:
        image, text = (name if name in schema.names else None for name in COLUMNS.values())
    if image is None and text is None:
        raise SettingError(
            f"{path} has no column {' or '.join(COLUMNS.values())}; name a column of vectors with "
            f"--image-vector-column or --text-vector-column: "
            f"{', '.join(vector_columns(schema)) or 'it has none'}"
        )
    if image == text:
        raise SettingError(
            f"column {image} is named with --image-vector-column and with --text-vector-column; "
            "a column is of one of them"
        )
    named: list[tuple[str | None, Modality]] = [(image, "image"), (text, "text")]
    return {name: modality for name, modality in named if name is not None}


def _origin(schema: pa.Schema) -> Mapping[str, Any]:
    """Give what the file remembers of the cache that it was exported from; nothing of a file of others."""
    try:
        origin = json.loads((schema.metadata or {})[b"embedcache"])
    except (KeyError, ValueError):
        return {}
    return {"origin": origin}


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
        with wrap_table_errors(self.path), open_parquet(self.path) as file:
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
    with wrap_table_errors(path), open_parquet(path) as file:
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
