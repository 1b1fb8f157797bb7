"""The folder of clip-retrieval, as its version 2.45 writes and reads it.

    img_emb/img_emb_00.npy  text_emb/text_emb_00.npy  metadata/metadata_00.parquet

Row i of all files with one number describes one sample. Its index command reads the arrays of a folder in the order of
their names, through embedding-reader, which parses the first line of a `.npy` itself: up to 300 bytes, `<f2` or `<f4`.
"""

import math
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedcache.arrays import Array, blocks, normalize
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError
from embedcache.files import building
from embedcache.interop.exporting import VectorExport
from embedcache.interop.importing import UNIT_TOLERANCE
from embedcache.interop.npy import open_npy, write_array
from embedcache.interop.vector_files import FileGroup, VectorImport
from embedcache.progress import Progress, watch

_ROWS_PER_FILE = 1_000_000
_ARRAYS: Mapping[str, Modality] = {"img_emb": "image", "text_emb": "text"}
_METADATA = "metadata"
_BLOCK = 8000


def open_clip_retrieval(path: Path) -> VectorImport:
    """Open a folder with `img_emb`, `text_emb` and `metadata`, or those of them that exist.

    Raises:
        PathError: neither `img_emb` nor `text_emb` exists.
        DataError: the folders have files with different numbers, or files with one number differ in their rows.
        CorruptError: an array is damaged.
    """
    names = [name for name in _ARRAYS if any((path / name).glob("*.npy"))]
    if not names:
        raise PathError(
            f"{path}: expected the output of clip-retrieval inference, got a folder without img_emb/*.npy and "
            "text_emb/*.npy"
        )
    files = {name: _by_number(path, name, ".npy") for name in names}
    tables = _by_number(path, _METADATA, ".parquet")
    if tables:
        files[_METADATA] = tables
    numbers = _common_numbers(path, files)
    groups = [
        FileGroup(vectors={name: open_npy(files[name][number]) for name in names}, table=tables.get(number))
        for number in numbers
    ]
    return VectorImport(
        form="clip-retrieval", path=path, modalities={name: _ARRAYS[name] for name in names}, groups=groups
    )


def write_clip_retrieval(
    export: VectorExport, folder: Path, *, rows_per_file: int = _ROWS_PER_FILE, progress: Progress
) -> int:
    """Write clip-retrieval's files into a new folder, whole or not at all; return the number of rows.

    Vectors have length 1: a row whose length differs by more than 0.001 is scaled, others are kept as they are, so that
    an import of such files is exported bit for bit. Memory: a block, and the tables of the cache.

    Raises:
        PathError: the folder is not empty.
    """
    ranges = list(blocks(len(export.samples), rows_per_file))
    digits = int(math.log10(len(ranges))) + 1
    numbers = {f"{number:0{digits}d}": rows for number, rows in enumerate(ranges)}
    names = {name: modality for name, modality in _ARRAYS.items() if modality in export.modalities}
    size = math.gcd(rows_per_file, _BLOCK)  # so that no block of vectors spans two files
    with building(folder) as temporary:
        for name in (*names, _METADATA):
            (temporary / name).mkdir()
        parts = watch(numbers.values(), progress, f"writing {_METADATA}", len(export.samples), "rows")
        for number, rows in zip(numbers, parts, strict=True):
            path = temporary / _METADATA / f"{_METADATA}_{number}.parquet"
            pq.write_table(_metadata(export, rows), path, write_page_checksum=True)
        for name, modality in names.items():
            progress.start(f"writing {name}", len(export.samples), "vectors")
            stream = map(_unit, export.vectors(modality, size))
            for number, rows in numbers.items():
                num_rows = rows.stop - rows.start
                blocks_of_file = islice(stream, math.ceil(num_rows / size))
                shape, dtype = (num_rows, export.width(modality)), export.dtype(modality)
                write_array(temporary / name / f"{name}_{number}.npy", blocks_of_file, shape, dtype, progress)
            progress.finish()
    return len(export.samples)


def _by_number(path: Path, name: str, suffix: str) -> dict[str, Path]:
    """Return the files `name/name_NUMBER.suffix` by their number as it is written, in the order of their names."""
    return {file.stem.removeprefix(f"{name}_"): file for file in sorted((path / name).glob(f"*{suffix}"))}


def _common_numbers(path: Path, files: Mapping[str, Mapping[str, Path]]) -> list[str]:
    every = sorted(set().union(*files.values()))
    for name, by_number in files.items():
        missing = [number for number in every if number not in by_number]
        if missing:
            counts = ", ".join(f"{len(numbers)} in {folder}" for folder, numbers in files.items())
            raise DataError(
                f"{path}: expected files with the same numbers in each folder, got {counts}: {name} lacks number "
                f"{missing[0]}; get the folder again"
            )
    return every


def _metadata(export: VectorExport, rows: slice) -> pa.Table:
    """Return the columns of some rows; clip-retrieval's own, `image_path` and `caption`, have no nulls."""
    table = export.table(rows)
    for name in ("image_path", "caption"):
        if name in table.column_names:
            table = table.set_column(table.schema.get_field_index(name), name, pc.fill_null(table[name], ""))
    return table


def _unit(vectors_ND: Array) -> Array:
    """Scale rows to length 1, except those that have it within the precision of float16."""
    lengths = np.linalg.norm(np.asarray(vectors_ND, np.float32), axis=1)
    is_off = np.abs(lengths - 1) > UNIT_TOLERANCE
    if not is_off.any():
        return vectors_ND
    unit_ND = vectors_ND.copy()
    unit_ND[is_off] = normalize(vectors_ND[is_off]).astype(vectors_ND.dtype)
    return unit_ND
