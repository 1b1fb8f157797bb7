"""Vectors in `.npy` files with a table beside them, and DataComp's metadata: `<hash>.parquet` beside `<hash>.npz`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from embedcache.arrays import Array, blocks
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError
from embedcache.files import AnyPath, building, check_regular, one_or_many, reading
from embedcache.interop.exporting import IMAGES_AND_TEXTS, VectorExport
from embedcache.interop.parquet import GET_AGAIN, write_rows
from embedcache.interop.vector_files import FileGroup, VectorFile, VectorImport, check_dtype
from embedcache.modalities import MODALITIES
from embedcache.progress import Progress, watch
from embedcache.registry import unknown_name

_BLOCK = 8192
_ROW_GROUP = 2**20


def open_npy_vectors(files: Mapping[str, AnyPath], *, table: AnyPath | None = None) -> VectorImport:
    """Open `.npy` files whose rows belong together, with a table of their keys, captions and columns.

    Args:
        files: modality -> file of vectors.
        table: table of the rows.

    Raises:
        SettingError: no file is named.
        UnknownNameError: a modality is unknown.
        CorruptError: a file is damaged.
        DataError: an array is not (rows, width) of float16, float32 or float64, or they differ in their rows.
    """
    given: dict[Modality, Path] = {}
    for name, path in files.items():
        if name not in MODALITIES:
            raise unknown_name("modality", name, MODALITIES)
        given[MODALITIES[name].name] = Path(path)
    if not given:
        raise SettingError("files: expected a .npy file, got none; name one with --file MODALITY=FILE")
    vectors: dict[str, VectorFile] = {modality: open_npy(path) for modality, path in given.items()}
    group = FileGroup(vectors=vectors, table=None if table is None else Path(table))
    path = group.table or next(iter(given.values()))
    return VectorImport(form="npy", path=path, modalities={name: name for name in given}, groups=[group])


def open_datacomp(path: Path, *, arrays: Mapping[str, str | Sequence[str]]) -> VectorImport:
    """Open a folder of DataComp's metadata, whose files are read in the order of their names.

    Args:
        path: the folder.
        arrays: modality, image or text -> array or arrays in the `.npz`, such as `l14_img`.

    Raises:
        SettingError: no array is named, one is named twice, or of another modality.
        PathError: a file does not exist, or lacks its counterpart.
        UnknownNameError: an `.npz` has no such array.
        DataError: files that belong together differ in their rows.
    """
    modalities = _assign_arrays(arrays)
    tables, vectors = ({file.stem: file for file in sorted(path.glob(f"*.{suffix}"))} for suffix in ("parquet", "npz"))
    if not vectors:
        raise PathError(f"{path}: expected DataComp's metadata, NAME.parquet and NAME.npz, got no .npz file")
    unpaired = sorted(tables.keys() ^ vectors.keys())
    if unpaired:
        stem = unpaired[0]
        exists, missing = ("parquet", "npz") if stem in tables else ("npz", "parquet")
        raise PathError(
            f"{path} has {stem}.{exists} and no {stem}.{missing} ({len(tables)} .parquet, {len(vectors)} .npz); get "
            "the folder again"
        )
    groups = [
        FileGroup(vectors={name: open_npy(file, name) for name in modalities}, table=tables[stem])
        for stem, file in vectors.items()
    ]
    return VectorImport(form="datacomp", path=path, modalities=modalities, groups=groups)


def _assign_arrays(arrays: Mapping[str, str | Sequence[str]]) -> Mapping[str, Modality]:
    """Return array -> modality of its vectors."""
    assigned: dict[str, Modality] = {}
    for modality, names in arrays.items():
        for name in one_or_many(names):
            if modality not in IMAGES_AND_TEXTS or name in assigned:
                raise SettingError(f"arrays: expected different arrays of image or text vectors, got {modality}={name}")
            assigned[str(name)] = MODALITIES[modality].name
    if not assigned:
        raise SettingError("arrays: expected one such as l14_img, got none; name one with --array image=l14_img")
    return assigned


def write_npy(export: VectorExport, folder: Path, *, progress: Progress) -> int:
    """Write a `.npy` per modality and `rows.parquet` into a new folder, whole or not at all; return the row count.

    Vectors are as they are in the cache. Memory: a block of vectors, and a million rows of the table.
    """
    num_rows = len(export.samples)
    with building(folder) as temporary:
        tables = map(export.table, blocks(num_rows, _ROW_GROUP))
        shown = watch(tables, progress, "writing rows.parquet", num_rows, "rows")
        write_rows(temporary / "rows.parquet", shown, export.record)
        for modality in export.modalities:
            progress.start(f"writing {modality}.npy", num_rows, "vectors")
            shape = (num_rows, export.width(modality))
            stream = export.vectors(modality, _BLOCK)
            write_array(temporary / f"{modality}.npy", stream, shape, export.dtype(modality), progress)
            progress.finish()
    return num_rows


def open_npy(path: Path, member: str | None = None) -> VectorFile:
    """Open a `.npy` file, which is mapped, or an array of an `.npz` file.

    Raises:
        CorruptError: it is not such a file, or ends before its last row.
        DataError: it is not a two-dimensional array of float16, float32 or float64.
        UnknownNameError: the `.npz` has no such array; the message lists those that it has.
    """
    rows_ND = _load(path, member)
    location = str(path) if member is None else f"{path}, array {member}"
    if rows_ND.ndim != 2 or not rows_ND.shape[1]:
        raise DataError(f"{location}: expected an array (rows, width), got shape {rows_ND.shape}")

    def read_blocks(first: int, size: int) -> Iterator[Array]:
        rows_ND = _load(path, member)
        for row in range(first, len(rows_ND), size):
            yield np.array(rows_ND[row : row + size])

    num_rows, width = rows_ND.shape
    dtype = check_dtype(rows_ND.dtype, location)
    return VectorFile(path=path, num_rows=num_rows, width=width, dtype=dtype, blocks=read_blocks)


def _load(path: Path, member: str | None) -> Array:
    with reading(path, GET_AGAIN):
        check_regular(path)
        if member is None:
            mapped: Array = npy_format.open_memmap(path, mode="r")
            return mapped
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            if member not in archive.files:
                raise unknown_name("array", member, archive.files, hint=f"in {path}")
            array: Array = archive[member]
            return array


def write_array(path: Path, stream: Iterable[Array], shape: tuple[int, int], dtype: str, progress: Progress) -> None:
    """Write a `.npy` file, whose header is format 1.0: 128 bytes, one line that other readers parse by themselves."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
        npy_format.write_array_header_1_0(file, header)
        for block in stream:
            file.write(block.tobytes())
            progress.advance(len(block))
