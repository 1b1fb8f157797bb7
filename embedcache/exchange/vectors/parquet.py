"""Parquet with vectors as lists of one length: a row a sample, with its key, caption and columns."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Array, blocks
from embedcache.disk import replacing
from embedcache.encoders.contract import Modality
from embedcache.errors import PathError, SettingError
from embedcache.exchange.vectors.incoming import Incoming, Part
from embedcache.exchange.vectors.new_files import check_new_file
from embedcache.exchange.vectors.parquet_rows import open_column, vector_columns
from embedcache.progress import Progress
from embedcache.sources.table_files import damage_named, open_parquet

if TYPE_CHECKING:
    from embedcache.exchange.vectors.outgoing import Outgoing

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
    with damage_named(files[0]), open_parquet(files[0]) as file:
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
            f"{path} has no column {' or '.join(COLUMNS.values())}; name a column of vectors with --image or --text: "
            f"{', '.join(vector_columns(schema)) or 'it has none'}"
        )
    if image == text:
        raise SettingError(f"column {image} is named with --image and with --text; a column is of one of them")
    named: list[tuple[str | None, Modality]] = [(image, "image"), (text, "text")]
    return {name: modality for name, modality in named if name is not None}


def _origin(schema: pa.Schema) -> Mapping[str, Any]:
    """Give what the file remembers of the cache that it was exported from; nothing of a file of others."""
    try:
        origin = json.loads((schema.metadata or {})[b"embedcache"])
    except (KeyError, ValueError):
        return {}
    return {"origin": origin}
