"""Parquet with vectors as lists of one length: one row per sample, with its key, caption and columns."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Array, blocks
from embedcache.encoders.base import Modality
from embedcache.errors import CorruptError, DataError, PathError, SettingError
from embedcache.files import reading
from embedcache.interop.exporting import MODALITY_NAMES, VectorExport, check_new_file
from embedcache.interop.vector_files import FileGroup, VectorFile, VectorImport, check_dtype
from embedcache.modalities import MODALITIES
from embedcache.outputs import new_output, read_metadata, to_metadata
from embedcache.progress import Progress
from embedcache.provenance import add_digest, check_record
from embedcache.registry import unknown_name
from embedcache.sources.table import open_parquet

GET_AGAIN = "get the file again"
"""What to do about a damaged file of vectors."""

_COLUMNS: Mapping[Modality, str] = {modality: f"{modality}_vector" for modality in MODALITY_NAMES}
_BLOCK = 8192


def open_parquet_vectors(
    path: Path,
    *,
    vector_columns: Mapping[str, str | Sequence[str]] | None = None,
) -> VectorImport:
    """Open a Parquet file, or a folder of them in the order of their names.

    If no column is named, `image_vector`, `text_vector`, `audio_vector` and so on are read, as far as they exist.

    Args:
        path: the file or folder.
        vector_columns: modality -> column or columns, of any modality.

    Raises:
        SettingError: no column is named, and the default ones do not exist; or one is named twice.
        UnknownNameError: a file has no such column.
        DataError: a column does not hold vectors of float16, float32 or float64, or files differ in width or dtype.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise PathError(f"{path}: expected a Parquet file or a folder of them, got a folder without .parquet files")
    with reading(files[0], GET_AGAIN), open_parquet(files[0]) as file:
        schema = file.schema_arrow
    modalities = _assign_modalities(schema, (vector_columns or {}).items(), files[0])
    groups = [FileGroup(vectors={name: _open_column(file, name) for name in modalities}, table=file) for file in files]
    return VectorImport(
        form="parquet", path=path, modalities=modalities, groups=groups, origin=_read_origin(path, schema)
    )


def write_parquet(export: VectorExport, path: Path, *, progress: Progress) -> int:
    """Write one Parquet file, whole or not at all; return the number of rows. Vectors are as they are in the cache.

    Memory: a block, and what `VectorExport` takes.
    """
    check_new_file(path, ".parquet")
    with new_output(path) as temporary:
        write_rows(temporary, _table_blocks(export, progress), export.record)
    return len(export.samples)


def _table_blocks(export: VectorExport, progress: Progress) -> Iterator[pa.Table]:
    num_rows = len(export.samples)
    progress.start("writing", num_rows, "rows")
    streams = {modality: export.vectors(modality, _BLOCK) for modality in export.modalities}
    for rows in blocks(num_rows, _BLOCK):
        table = export.table(rows)
        vectors = {_COLUMNS[modality]: to_vector_lists(next(stream)) for modality, stream in streams.items()}
        yield append_columns(table, vectors)
        progress.advance(len(table))
    progress.finish()


def append_columns(table: pa.Table, columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    """Append columns of an export to those of the cache, of which they replace any of the same names."""
    table = table.drop_columns([name for name in columns if name in table.column_names])
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def to_vector_lists(vectors_ND: Array) -> pa.Array:
    """Return a column of lists of one length from (N, D) vectors of any float type."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])


def write_rows(path: Path, tables: Iterator[pa.Table], record: Mapping[str, Any]) -> None:
    """Write a stream of tables of one schema, one row group each; `open_parquet` compares the checksums of pages."""
    first = next(tables)
    schema = first.schema.with_metadata(to_metadata(add_digest(record)))
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        writer.write_table(first.cast(schema))
        for table in tables:
            writer.write_table(table.cast(schema))


def _assign_modalities(
    schema: pa.Schema, named: Iterable[tuple[str, str | Sequence[str] | None]], path: Path
) -> Mapping[str, Modality]:
    """Return column -> modality of its vectors, of the named columns, or of those with the usual names."""
    assigned: dict[str, Modality] = {}
    for modality, columns in named:
        if modality not in MODALITIES:
            raise unknown_name("modality", modality, MODALITIES)
        for name in [columns] if isinstance(columns, str) else columns or ():
            if name in assigned:
                raise SettingError(
                    f"vector columns: expected each column once, got {name} as {assigned[name]} and {modality} "
                    "vectors; a column holds vectors of one modality"
                )
            assigned[name] = MODALITIES[modality].name
    assigned = assigned or {name: modality for modality, name in _COLUMNS.items() if name in schema.names}
    if not assigned:
        raise SettingError(
            f"{path}: expected a column such as {_COLUMNS['image']}, got none; name one of its columns of vectors with "
            "--vector-column MODALITY=NAME: "
            f"{', '.join(_vector_columns(schema)) or 'it has none'}"
        )
    return assigned


def _read_origin(path: Path, schema: pa.Schema) -> Mapping[str, Any]:
    """Return what the file records of the cache that it was exported from; empty for other files."""
    origin = read_metadata(path, schema)
    if origin:
        check_record(path, origin, next_step=GET_AGAIN)
    return {"origin": origin} if origin else {}


_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def _read_blocks(path: Path, column: str, width: int, dtype: str, first: int, size: int) -> Iterator[Array]:
    """Iterate over the rows from `first` on: arrays (B, D) of at most `size` rows; a null row is NaN.

    Raises:
        DataError: a list differs in length from the first.
    """
    with reading(path, GET_AGAIN), open_parquet(path) as file:
        groups, row = _groups_from(file, first)
        for batch in file.iter_batches(size, row_groups=groups, columns=[column], use_threads=False):
            lists = batch.column(0)
            lengths = lists.value_lengths().fill_null(width).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(lengths != width)
            if len(wrong):
                raise DataError(
                    f"{path}, column {column}, row {row + wrong[0]:,}: expected {width:,} components as in the first "
                    f"row, got {lengths[wrong[0]]:,}; vectors of a feature have one width"
                )

            components = lists.drop_null().flatten().to_numpy(zero_copy_only=False)
            values = np.full((len(lists), width), np.nan, dtype)
            values[lists.is_valid().to_numpy(zero_copy_only=False)] = components.reshape(-1, width)
            yield values[max(0, first - row) :]
            row += len(batch)

        if row != file.metadata.num_rows:
            raise CorruptError(
                f"{path}: expected {file.metadata.num_rows:,} rows as its footer counts, got {row:,} of the column "
                f"{column}; get the file again"
            )


def _open_column(path: Path, column: str) -> VectorFile:
    """Open a column of vectors.

    Raises:
        UnknownNameError: there is no such column; the message lists the columns of vectors.
        DataError: the column does not hold lists of float16, float32 or float64, or has no list at all.
    """
    with reading(path, GET_AGAIN), open_parquet(path) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise unknown_name("column of vectors", column, _vector_columns(schema), where=f"in {path}")
        kind = schema.field(column).type
        if not _is_list(kind):
            raise DataError(f"column {column} of {path}: expected lists of float16, float32 or float64, got {kind}")
        name = str(kind.value_type)
        dtype = check_dtype(_DTYPES.get(name, name), f"column {column} of {path}")
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(file, column)
        if not width:
            raise DataError(f"column {column} of {path}: expected vectors, got none in {file.metadata.num_rows:,} rows")
        blocks_from = partial(_read_blocks, path, column, width, dtype)
        num_rows = file.metadata.num_rows
        return VectorFile(path=path, num_rows=num_rows, width=width, dtype=dtype, blocks=blocks_from)


def _vector_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that hold lists of floating-point numbers."""
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
    """Return the row groups from the one that holds row `first` on, and the first row of those."""
    start = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first < start + count:
            return list(range(group, file.num_row_groups)), start
        start += count
    return [], start
