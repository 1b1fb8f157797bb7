"""Open vectors that other tools computed: clip-retrieval's folder, DataComp's metadata, Parquet, and `.npy` files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy_format

from embedcache.arrays import Array, blocks, read_npz
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError
from embedcache.files import AnyPath, check_regular, one_or_many, reading
from embedcache.modalities import MODALITIES
from embedcache.provenance import check_record, read_metadata
from embedcache.registry import unknown_name
from embedcache.sources.table import open_parquet

GET_AGAIN = "get the file again"
"""What to do about a damaged file of vectors."""

ARRAYS: Mapping[str, Modality] = {"img_emb": "image", "text_emb": "text"}
"""Folder of clip-retrieval -> modality of its vectors."""
VECTOR_COLUMNS: Mapping[str, Modality] = {f"{modality.name}_vector": modality.name for modality in MODALITIES.values()}
"""Usual column of Parquet -> modality of its vectors."""

_DTYPES = {"float16": "float16", "float32": "float32", "float64": "float32"}
"""dtype in a file -> dtype in the cache."""
_BLOCK = 8192
_MAX_BYTES = 2**32  # of an array in an .npz file, uncompressed: 2.8 million rows of 768 numbers of float16


@dataclass(frozen=True, kw_only=True)
class VectorFile:
    """Vectors of float16, float32 or float64 in one file, one per row.

    Args:
        width: D, the number of dimensions of each vector.
        dtype: dtype in the file.
        blocks: iterates over all rows in arrays (B, D); a missing vector is NaN.
    """

    path: Path
    num_rows: int
    width: int
    dtype: str
    blocks: Callable[[], Iterator[Array]]


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Files whose rows belong together, one per feature and optionally a table. Row i of each is the same sample."""

    vectors: Mapping[str, VectorFile]
    table: Path | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of each file."""
        return next(iter(self.vectors.values())).num_rows


@dataclass(frozen=True, kw_only=True)
class VectorImport:
    """All files of one import. Rows are numbered across its groups in order.

    Args:
        form: name of the format.
        path: path that the user named. Relative paths in tables start from it.
        modalities: name of a feature -> modality of its vectors.
        groups: groups of files, at least one.
        origin: metadata of the vectors that the format itself records, as JSON values.

    Raises:
        DataError: files of one group differ in their number of rows, files of one feature differ in width or dtype, or
            there are no rows.
    """

    form: str
    path: Path
    modalities: Mapping[str, Modality]
    groups: Sequence[FileGroup]
    origin: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            for name, file in group.vectors.items():
                first = self.groups[0].vectors[name]
                if file.num_rows != group.num_rows:
                    raise DataError(
                        f"{file.path}: expected {group.num_rows:,} rows as in the files that belong to it, but it has "
                        f"{file.num_rows:,}; get them again"
                    )

                if (file.width, file.dtype) != (first.width, first.dtype):
                    raise DataError(
                        f"{file.path}: expected {first.dtype} vectors of {first.width:,} components as in "
                        f"{first.path}, got {file.dtype} of {file.width:,}; a feature has one dtype and one width"
                    )

        if not self.num_rows:
            raise DataError(f"{self.path}: expected at least one vector, got none; nothing is imported")

    @property
    def num_rows(self) -> int:
        """Number of rows of all groups."""
        return sum(group.num_rows for group in self.groups)

    @property
    def files(self) -> list[Path]:
        """Every file that is read, once, in the order of the groups."""
        # One file may have the vectors of several features, and their table as well.
        paths: dict[Path, None] = {}
        for group in self.groups:
            for file in group.vectors.values():
                paths[file.path] = None
            if group.table is not None:
                paths[group.table] = None
        return list(paths)

    def dtypes(self, name: str) -> tuple[str, str]:
        """Return the dtype of a feature in its files, and in the cache: float32 for float64."""
        dtype = self.groups[0].vectors[name].dtype
        return dtype, _DTYPES[dtype]

    def blocks(self, name: str) -> Iterator[Array]:
        """Iterate over all rows of a feature in arrays (B, D), as the cache stores them."""
        for group in self.groups:
            for values_BD in group.vectors[name].blocks():
                # A number beyond the range of float32 becomes infinite, which is a failed item.
                with np.errstate(over="ignore"):
                    yield values_BD.astype(self.dtypes(name)[1], copy=False)


def open_vectors(
    format_name: str,
    path: AnyPath | None = None,
    *,
    arrays: Mapping[str, str | Sequence[str]] | None = None,
    files: Mapping[str, AnyPath] | None = None,
    table: AnyPath | None = None,
    vector_columns: Mapping[str, str | Sequence[str]] | None = None,
) -> VectorImport:
    """Open vectors that another tool computed, to be imported by `import_vectors`.

    Args:
        format_name: `clip-retrieval`, `datacomp`, `npy` or `parquet`.
        path: the folder or file. Only `npy` has none.
        arrays: modality -> array or arrays, for `datacomp`.
        files: modality -> file, for `npy`.
        table: table of the rows, for `npy`.
        vector_columns: modality -> column or columns, for `parquet`. If None, use `image_vector`, `text_vector`,
            `audio_vector` and so on, as far as they exist.

    Raises:
        UnknownNameError: there is no such format, modality, column or array.
        SettingError: nothing to read is named, or a name is given twice.
        PathError: a file does not exist.
        DataError: files that belong together differ in their numbers, rows, width or dtype, or have no vectors of
            float16, float32 or float64.
        CorruptError: a file is damaged.

    Example:
        >>> np.save("captions.npy", np.eye(100, 8, dtype=np.float32))
        >>> vectors = embedcache.open_vectors("npy", files={"text": "captions.npy"})
        >>> vectors.num_rows, vectors.modalities
        (100, {'text': 'text'})
    """
    openers: dict[str, Callable[..., VectorImport]] = {
        "clip-retrieval": _open_clip_retrieval,
        "datacomp": partial(_open_datacomp, arrays=arrays or {}),
        "npy": partial(_open_npy, files=files or {}, table=table),
        "parquet": partial(_open_parquet, vector_columns=vector_columns or {}),
    }
    if format_name not in openers:
        raise unknown_name("import format", format_name, openers)
    return openers[format_name](*([] if path is None else [Path(path)]))


def _open_clip_retrieval(path: Path) -> VectorImport:
    """Open a folder with subfolders `img_emb`, `text_emb` and `metadata`, as far as they exist."""
    files: dict[str, dict[str, Path]] = {}
    modalities: dict[str, Modality] = {}
    for name, modality in ARRAYS.items():
        arrays = _number_files(path / name, ".npy", prefix=f"{name}_")
        if arrays:
            files[name] = arrays
            modalities[name] = modality
    if not modalities:
        raise PathError(f"{path}: expected clip-retrieval's img_emb/*.npy or text_emb/*.npy, got none; check the path")

    tables = _number_files(path / "metadata", ".parquet", prefix="metadata_")
    if tables:
        files["metadata"] = tables

    groups: list[FileGroup] = []
    for paths in _pair(path, files):
        vectors = {name: open_npy(paths[name]) for name in modalities}
        groups.append(FileGroup(vectors=vectors, table=paths.get("metadata")))
    return VectorImport(form="clip-retrieval", path=path, modalities=modalities, groups=groups)


def _open_datacomp(path: Path, *, arrays: Mapping[str, str | Sequence[str]]) -> VectorImport:
    """Open a folder of pairs of `NAME.parquet` and `NAME.npz`, in the order of their names."""
    modalities = _assign_modalities(arrays, "arrays")
    if not modalities:
        raise SettingError("arrays: expected one such as l14_img, got none; name one with --array image=l14_img")

    files = {"npz": _number_files(path, ".npz"), "parquet": _number_files(path, ".parquet")}
    if not files["npz"]:
        raise PathError(f"{path}: expected DataComp's metadata, NAME.parquet and NAME.npz, got no .npz file")

    groups: list[FileGroup] = []
    for paths in _pair(path, files):
        vectors = {name: open_npy(paths["npz"], name) for name in modalities}
        groups.append(FileGroup(vectors=vectors, table=paths["parquet"]))
    return VectorImport(form="datacomp", path=path, modalities=modalities, groups=groups)


def _open_npy(*, files: Mapping[str, AnyPath], table: AnyPath | None) -> VectorImport:
    """Open `.npy` files whose rows belong together, with a table of their keys, captions and columns."""
    # Each modality has one file, so its feature is named like the modality.
    modalities = _assign_modalities(dict(zip(files, files, strict=True)), "files")
    if not modalities:
        raise SettingError("files: expected a .npy file, got none; name one with --file MODALITY=FILE")

    vectors = {modality: open_npy(Path(path)) for modality, path in files.items()}
    group = FileGroup(vectors=vectors, table=None if table is None else Path(table))
    path = group.table or next(iter(vectors.values())).path
    return VectorImport(form="npy", path=path, modalities=modalities, groups=[group])


def _open_parquet(path: Path, *, vector_columns: Mapping[str, str | Sequence[str]]) -> VectorImport:
    """Open a Parquet file, or all Parquet files of a folder in the order of their names."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise PathError(f"{path}: expected a Parquet file or a folder of them, got a folder without .parquet files")

    # The first file decides which columns are read; the others must have them too.
    with reading(files[0], GET_AGAIN), open_parquet(files[0]) as file:
        schema = file.schema_arrow
    usual = {name: modality for name, modality in VECTOR_COLUMNS.items() if name in schema.names}
    modalities = _assign_modalities(vector_columns, "vector columns") or usual
    if not modalities:
        raise SettingError(
            f"{path}: expected a column such as image_vector, got {', '.join(schema.names)}; name columns of vectors "
            "with --vector-column MODALITY=NAME"
        )

    # A file that was exported from a cache records its origin; files of other tools have none.
    origin = read_metadata(path, schema)
    if origin:
        check_record(path, origin, next_step=GET_AGAIN)

    groups: list[FileGroup] = []
    for file_path in files:
        vectors = {name: _open_column(file_path, name) for name in modalities}
        groups.append(FileGroup(vectors=vectors, table=file_path))
    return VectorImport(
        form="parquet",
        path=path,
        modalities=modalities,
        groups=groups,
        origin={"origin": origin} if origin else {},
    )


def _assign_modalities(names_by_modality: Mapping[str, str | Sequence[str]], option: str) -> dict[str, Modality]:
    """Return name -> modality of its vectors, given the name or names of each modality."""
    modalities: dict[str, Modality] = {}
    for modality, names in names_by_modality.items():
        if modality not in MODALITIES:
            raise unknown_name("modality", modality, MODALITIES)

        # A feature has one modality, so no name may stand for two.
        for name in map(str, one_or_many(names)):
            if name in modalities:
                raise SettingError(
                    f"{option}: expected each name once, got {name} as {modalities[name]} and {modality} vectors"
                )
            modalities[name] = MODALITIES[modality].name
    return modalities


def _number_files(folder: Path, suffix: str, *, prefix: str = "") -> dict[str, Path]:
    """Return number -> file for the files of a folder with a suffix, such as `0001` for `img_emb_0001.npy`."""
    files: dict[str, Path] = {}
    for file in folder.glob(f"*{suffix}"):
        files[file.stem.removeprefix(prefix)] = file
    return files


def _pair(path: Path, files: Mapping[str, Mapping[str, Path]]) -> list[dict[str, Path]]:
    """Return the files of several kinds that have the same number, in the order of the numbers."""
    numbers = set[str]().union(*files.values())
    for kind, path_by_number in files.items():
        missing_numbers = sorted(numbers - path_by_number.keys())
        if missing_numbers:
            raise DataError(
                f"{path}: expected files with the same numbers, but {kind} lacks number {missing_numbers[0]} and "
                f"{len(missing_numbers) - 1:,} others; get the folder again"
            )

    groups: list[dict[str, Path]] = []
    for number in sorted(numbers):
        paths = map(itemgetter(number), files.values())
        groups.append(dict(zip(files, paths, strict=True)))
    return groups


def open_npy(path: Path, member: str | None = None) -> VectorFile:
    """Open a `.npy` file, which is memory-mapped, or an array of an `.npz` file."""
    rows_ND = _load(path, member)
    location = str(path) if member is None else f"{path}, array {member}"
    if rows_ND.ndim != 2 or not rows_ND.shape[1]:
        raise DataError(f"{location}: expected an array (rows, width), got shape {rows_ND.shape}")

    def read_blocks() -> Iterator[Array]:
        rows_ND = _load(path, member)
        for block in blocks(len(rows_ND), _BLOCK):
            yield np.array(rows_ND[block])

    num_rows, width = rows_ND.shape
    dtype = _check_dtype(rows_ND.dtype, location)
    return VectorFile(path=path, num_rows=num_rows, width=width, dtype=dtype, blocks=read_blocks)


def _load(path: Path, member: str | None) -> Array:
    with reading(path, GET_AGAIN):
        check_regular(path)
        if member is None:
            mapped: Array = npy_format.open_memmap(path, mode="r")
            return mapped

        # NumPy cannot map an array of an .npz file, so it is read as a whole.
        with path.open("rb") as file:
            return read_npz(file, member, max_bytes=_MAX_BYTES)[member]


def _open_column(path: Path, column: str) -> VectorFile:
    """Open a column of vectors of a Parquet file."""
    location = f"column {column} of {path}"
    with reading(path, GET_AGAIN), open_parquet(path) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise unknown_name("column of vectors", column, schema.names, where=f"in {path}")

        kind = schema.field(column).type
        if not _is_list(kind):
            raise DataError(f"{location}: expected lists of float16, float32 or float64, got {kind}")

        dtype = _check_dtype(np.dtype(kind.value_type.to_pandas_dtype()), location)
        num_rows = file.metadata.num_rows
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(file, column)

    if not width:
        raise DataError(f"{location}: expected vectors, got none in {num_rows:,} rows")
    read_blocks = partial(_read_column, path, column, width, dtype)
    return VectorFile(path=path, num_rows=num_rows, width=width, dtype=dtype, blocks=read_blocks)


def _first_length(file: pq.ParquetFile, column: str) -> int:
    """Return the length of the first list of a column that is not null, or 0 if there is none."""
    for batch in file.iter_batches(1024, columns=[column], use_threads=False):
        lists = batch.column(0).drop_null()
        if len(lists):
            return len(lists[0])
    return 0


def _read_column(path: Path, column: str, width: int, dtype: str) -> Iterator[Array]:
    """Iterate over the rows in arrays (B, D). A null row is NaN.

    Raises:
        DataError: a list differs in length from the first.
    """
    row = 0
    with reading(path, GET_AGAIN), open_parquet(path) as file:
        for batch in file.iter_batches(_BLOCK, columns=[column], use_threads=False):
            lists = batch.column(0)

            # A null row has no length, and must pass the check.
            lengths = lists.value_lengths().fill_null(width).to_numpy(zero_copy_only=False)
            is_wrong = lengths != width
            if is_wrong.any():
                number = int(is_wrong.argmax())
                raise DataError(
                    f"{path}, column {column}, row {row + number:,}: expected {width:,} components as in the first "
                    f"row, got {lengths[number]:,}; vectors of a feature have one width"
                )

            # The values of all lists are one array in Arrow, so no Python object is made per row.
            components = lists.drop_null().flatten().to_numpy(zero_copy_only=False)
            values_BD = np.full((len(lists), width), np.nan, dtype)
            values_BD[lists.is_valid().to_numpy(zero_copy_only=False)] = components.reshape(-1, width)
            yield values_BD
            row += len(lists)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_dtype(dtype: "np.dtype[Any]", location: str) -> str:
    if str(dtype) not in _DTYPES:
        raise DataError(
            f"{location}: expected little-endian float16, float32 or float64, got {dtype}; convert it first"
        )
    return str(dtype)
