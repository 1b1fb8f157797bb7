"""Files of vectors that an import reads, in groups whose rows belong together, and samples in tables beside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, ItemError, SettingError, SourceError
from embedcache.modalities import MODALITIES
from embedcache.samples import IMPORTED_SOURCE, FileItem, Sample, TextItem
from embedcache.sources.files import read_item_file, resolve_item
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table import (
    Row,
    TableColumns,
    assign_columns,
    open_table_file,
    read_sample,
)

_DTYPES = {"float16": "float16", "float32": "float32", "float64": "float32"}
"""dtype in a file -> dtype in the cache."""
_KEY_FORMAT = "{:09d}"


@dataclass(frozen=True, kw_only=True)
class VectorFile:
    """Vectors of float16, float32 or float64 in one file, one per row.

    Args:
        width: D, the number of dimensions of each vector.
        dtype: dtype in the file.
        blocks: `blocks(first, size)` iterates over the rows from `first` on in arrays (B, D) of up to `size` rows; a
            missing vector is NaN.
    """

    path: Path
    num_rows: int
    width: int
    dtype: str
    blocks: Callable[[int, int], Iterator[Array]]


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Files of one feature each, and of their table, whose rows belong together: row i of each is the same sample."""

    vectors: Mapping[str, VectorFile]
    table: Path | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of each file."""
        return next(iter(self.vectors.values())).num_rows


@dataclass(frozen=True, kw_only=True)
class VectorImport:
    """All files of one import; rows are numbered across its groups in order.

    Args:
        form: name of the format.
        path: path that the user named, of which relative paths in tables are seen.
        modalities: name of a feature -> modality of its vectors.
        groups: groups of files, at least one.
        origin: what the format itself records of the vectors, as JSON values.

    Raises:
        DataError: files of one group differ in their number of rows, or those of one feature in width or dtype; or
            there are no rows.
    """

    form: str
    path: Path
    modalities: Mapping[str, Modality]
    groups: Sequence[FileGroup]
    origin: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            counts = {str(vectors.path): vectors.num_rows for vectors in group.vectors.values()}
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{path} has {count:,}" for path, count in counts.items())
                raise DataError(f"files of one group: expected equal numbers of rows, but {listed}; get them again")
        for name, group in product(self.modalities, self.groups):
            vectors, first = group.vectors[name], self.groups[0].vectors[name]
            if (vectors.width, vectors.dtype) != (first.width, first.dtype):
                raise DataError(
                    f"{vectors.path}: expected {first.dtype} vectors of {first.width:,} components as in {first.path}, "
                    f"got {vectors.dtype} of {vectors.width:,}; a feature has one dtype and one width"
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
        paths = [path for group in self.groups for path in (*(v.path for v in group.vectors.values()), group.table)]
        return list(dict.fromkeys(path for path in paths if path is not None))

    def dtypes(self, name: str) -> tuple[str, str]:
        """Return the dtype of a feature in its files, and in the cache: float32 for float64."""
        dtype = self.groups[0].vectors[name].dtype
        return dtype, _DTYPES[dtype]

    def blocks(self, name: str, first: int, size: int) -> Iterator[Array]:
        """Iterate over a feature from row `first` on in arrays of `size` rows, as the cache stores them.

        The last may be shorter.

        Raises:
            DataError: a number is beyond the range of float32.
        """
        return rechunk(self._blocks(name, first, size), size)

    def _blocks(self, name: str, first: int, size: int) -> Iterator[Array]:
        for group in self.groups:
            if first < group.num_rows:
                yield from stored_blocks(group.vectors[name], first, size)
            first = max(0, first - group.num_rows)


def stored_blocks(file: VectorFile, first: int, size: int) -> Iterator[Array]:
    """Iterate over the rows of a file from `first` on as the cache stores them: float64 is rounded to float32.

    Raises:
        DataError: a number is beyond the range of float32.
    """
    for values in file.blocks(first, size):
        yield values if _DTYPES[file.dtype] == file.dtype else _round(values, file, first)
        first += len(values)


def _round(values_BD: Array, file: VectorFile, first: int) -> Array:
    with np.errstate(over="ignore"):
        stored_BD: Array = values_BD.astype(_DTYPES[file.dtype])
    is_beyond = np.isinf(stored_BD) & np.isfinite(values_BD)
    if is_beyond.any():
        row, column = np.argwhere(is_beyond)[0]
        raise DataError(
            f"{file.path}, row {first + row:,}: expected numbers in the range of float32, up to 3.4e+38, got "
            f"{values_BD[row, column]:g}; scale the vectors"
        )
    return stored_BD


def rechunk(arrays: Iterator[Array], size: int) -> Iterator[Array]:
    """Iterate over a stream of arrays in arrays of `size` rows; the last may be shorter.

    Memory: two arrays of the input and two of the output.
    """
    waiting: list[Array] = []
    for array in arrays:
        waiting.append(array)
        if sum(map(len, waiting)) >= size:
            joined = np.concatenate(waiting)
            whole = len(joined) // size * size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            waiting = [joined[whole:].copy()]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def check_dtype(dtype: np.dtype[np.generic] | str, location: str) -> str:
    """Return a dtype that can be imported, or raise a DataError."""
    if str(dtype) not in _DTYPES:
        raise DataError(
            f"{location}: expected little-endian float16, float32 or float64, got {dtype}; convert it first"
        )
    return str(dtype)


def check_captions(vectors: VectorImport) -> None:
    """Check that text vectors have a table, which must hold their captions; else raise `SettingError`."""
    for group in vectors.groups:
        texts = [file.path for name, file in group.vectors.items() if vectors.modalities[name] == "text"]
        if texts and group.table is None:
            raise SettingError(
                f"{texts[0]}: text vectors need a table with their captions, got no table; name one with --table"
            )


class ImportedSamples:
    """Samples of imported vectors, one per row: the source that numbers the rows of the cache.

    A key is the cell of the key column, otherwise the row number over all groups. A sample has an item of each modality
    of the vectors, a file if a table names it. With text vectors it has one caption, "" if the cell is blank; without
    text vectors, all captions in the table.
    """

    def __init__(self, vectors: VectorImport, description: Mapping[str, Any], settings: SourceSettings) -> None:
        self._vectors, self._description, self._settings = vectors, description, settings
        self._modalities = set(vectors.modalities.values())
        self._in_files: list[str] = [modality for modality in vectors.modalities.values() if modality != "text"]

    def describe(self) -> Mapping[str, Any]:
        """Return the description that the cache stores."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Iterate over all rows. Memory: one batch of a table.

        Raises:
            SourceError: a table lacks a column, or has more or fewer rows than its vectors.
        """
        first = 0
        for group in self._vectors.groups:
            yield from self._table_samples(group, first) if group.table else self._numbered_samples(group, first)
            first += group.num_rows

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item whose file a table names."""
        return ImportedSource(str(self._vectors.path), SourceSettings()).read(item)

    def _numbered_samples(self, group: FileGroup, first: int) -> Iterator[Sample]:
        files = {modality: (FileItem(path=""),) for modality in self._in_files}
        images = files.pop("image", ())
        for number in range(first, first + group.num_rows):
            yield Sample(key=_KEY_FORMAT.format(number), images=images, files=files)

    def _table_samples(self, group: FileGroup, first: int) -> Iterator[Sample]:
        assert group.table is not None
        file = open_table_file(group.table)
        in_table = {name for name, vectors in group.vectors.items() if vectors.path == group.table}
        file = replace(file, schema=pa.schema([field for field in file.schema if field.name not in in_table]))
        columns = assign_columns(file, self._settings)
        used: dict[str, str] = {m: column for m, column in columns.items.items() if m in self._modalities}
        if name := next((name for name in columns.embedded if name in self._settings.item_columns.values()), None):
            raise SourceError(f"{file.path}: expected paths or URLs in column {name}, got bytes; name another column")
        is_timed = any(MODALITIES[modality].has_interval for modality in used)
        interval = columns.interval if is_timed else (None, None)
        kept = {*columns.others, *columns.items.values(), *columns.interval} - {*used.values(), *interval}
        others = tuple(name for name in file.plain_columns if name in kept - set(group.vectors))
        columns = replace(columns, items=used, interval=interval, others=others)
        if "text" in self._modalities and not columns.captions:
            raise SourceError(
                f"{file.path}: text vectors need a column of captions; name one of {', '.join(file.columns)} with "
                "--caption-column"
            )
        count = 0
        for count, row in enumerate(file.rows(columns.to_read()), start=1):
            if count <= group.num_rows:
                yield self._sample(columns, row, first + count - 1, f"{group.table} row {count - 1:,}")
        if count != group.num_rows:
            vectors = next(iter(group.vectors.values())).path
            raise SourceError(
                f"{group.table}: expected {group.num_rows:,} rows as in {vectors}, got {count:,}; the two files do not "
                "belong together"
            )

    def _sample(self, columns: TableColumns, row: Row, number: int, location: str) -> Sample:
        items = {modality: (_item_path(columns, row, modality), 0) for modality in self._in_files}
        sample = read_sample(columns, row, location, key=_KEY_FORMAT.format(number), items=items)
        if "text" not in self._modalities:
            return sample
        if len(sample.texts) > 1:
            raise SourceError(
                f"{location}: expected one caption per text vector, got {len(sample.texts)}; name the caption column "
                "with --caption-column"
            )
        return sample if sample.texts else replace(sample, texts=(TextItem(text=""),))


def _item_path(columns: TableColumns, row: Row, modality: str) -> str:
    """Return the path of the file that a row names; empty if it names none."""
    column = columns.items.get(modality)
    cell = None if column is None or column in columns.embedded else row.get(column)
    return cell if isinstance(cell, str) else ""


class ImportedSource:
    """Source of the files that an import named, if they still exist; it has no samples to extract from."""

    items_are_files = True

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported(IMPORTED_SOURCE)
        self._location = Path(location)
        self._root = self._location if self._location.is_dir() else self._location.parent

    def describe(self) -> Mapping[str, Any]:
        """Return what is needed to open the source again."""
        return {"type": IMPORTED_SOURCE, "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Raise a SourceError, because there are vectors and nothing that an encoder could encode."""
        raise SourceError(
            f"{self._location} was imported: it has vectors, and no files or texts to encode; extract from the "
            "original files and captions"
        )

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item.

        Raises:
            ItemError: the import named no file for it, or the file does not exist.
        """
        if not item.path:
            raise ItemError("the import named no file for this item")
        return read_item_file(resolve_item(self._root, item.path))
