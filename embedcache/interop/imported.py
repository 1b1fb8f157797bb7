"""What an import reads: files of vectors whose rows belong together, and samples described by tables beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from embedcache.arrays import Array
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, ItemError, SettingError, SourceError
from embedcache.sources.base import IMPORTED, ImageItem, Sample, TextItem
from embedcache.sources.captions import scalar_columns
from embedcache.sources.files import read_item_file, resolve_item
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table import TableColumns, assign_columns, row_key, row_texts
from embedcache.sources.table_files import Row, TableFile, open_table_file

DTYPES = ("float16", "float32")
_KEY_FORMAT = "{:09d}"


class VectorFile(Protocol):
    """Vectors in one file, one per row."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        ...

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def width(self) -> int:
        """Numbers per vector."""
        ...

    @property
    def dtype(self) -> str:
        """`float16` or `float32`."""
        ...

    def blocks(self, first: int, size: int) -> Iterator[Array]:
        """Iterate over the rows from `first` on in arrays (B, D) of up to `size` rows; a missing vector is NaN."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileGroup:
    """Files whose rows belong together: row i of each describes the same sample.

    Args:
        vectors: name of the feature -> file with its vectors.
        table: file with keys, captions and columns; None if there is none.
    """

    vectors: Mapping[str, VectorFile]
    table: Path | None = None

    @property
    def num_rows(self) -> int:
        """Rows of each of the files."""
        return next(iter(self.vectors.values())).num_rows


@dataclass(frozen=True, kw_only=True)
class VectorImport:
    """All files of one import.

    Args:
        form: name of the format.
        path: path that the user named.
        modalities: name of a feature -> modality of its vectors.
        groups: groups of files, at least one; rows are numbered across them in order.
        about: what the format itself records of the vectors, as JSON values.

    Raises:
        DataError: files of one group differ in their number of rows, or those of one feature in width or dtype; or
            there are no rows.
    """

    form: str
    path: Path
    modalities: Mapping[str, Modality]
    groups: Sequence[FileGroup]
    about: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            _check_rows(group)
        for name in self.modalities:
            _check_same_kind([group.vectors[name] for group in self.groups])
        if not self.num_rows:
            raise DataError(f"{self.path}: expected at least one vector, got none; nothing is imported")

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return sum(group.num_rows for group in self.groups)

    @property
    def files(self) -> list[Path]:
        """Every file that is read, once, in the order of the groups."""
        paths = [path for group in self.groups for path in (*(v.path for v in group.vectors.values()), group.table)]
        return list(dict.fromkeys(path for path in paths if path is not None))

    def blocks(self, name: str, first: int, size: int) -> Iterator[Array]:
        """Iterate over a feature from row `first` on in arrays of `size` rows; the last may be shorter."""
        return rechunk(self._blocks(name, first, size), size)

    def _blocks(self, name: str, first: int, size: int) -> Iterator[Array]:
        for group in self.groups:
            if first < group.num_rows:
                yield from group.vectors[name].blocks(first, size)
            first = max(0, first - group.num_rows)


def rechunk(arrays: Iterator[Array], size: int) -> Iterator[Array]:
    """Iterate over a stream of arrays in arrays of `size` rows; the last may be shorter.

    Memory: two arrays of the input and two of the output.

    Example:
        >>> [len(block) for block in rechunk(iter([np.zeros((3, 2)), np.zeros((4, 2))]), 5)]
        [5, 2]
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


def check_dtype(dtype: np.dtype[np.generic] | str, place: str) -> str:
    """Return a dtype that a cache can store.

    Raises:
        DataError: any other dtype.
    """
    if str(dtype) not in DTYPES:
        raise DataError(f"{place}: expected little-endian {' or '.join(DTYPES)}, got {dtype}; convert it first")
    return str(dtype)


def _check_rows(group: FileGroup) -> None:
    counts = {str(vectors.path): vectors.num_rows for vectors in group.vectors.values()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{path} has {count:,}" for path, count in counts.items())
        raise DataError(f"files of one group: expected equal numbers of rows, but {listed}; get them again")


def _check_same_kind(files: Sequence[VectorFile]) -> None:
    first = files[0]
    for vectors in files:
        if (vectors.width, vectors.dtype) != (first.width, first.dtype):
            raise DataError(
                f"{vectors.path}: expected {first.dtype} vectors of {first.width:,} numbers as in {first.path}, got "
                f"{vectors.dtype} of {vectors.width:,}; a feature has one dtype and one width"
            )


class ImportedSamples:
    """Samples of imported vectors, one per row: the source that numbers the rows of the cache.

    A key is the cell of the key column, otherwise the row number over all groups. With image vectors, a sample has one
    image; with text vectors, one caption, "" if the cell is blank; without text vectors, all captions in the table.

    Args:
        vectors: imported files.
        about: description of the import that the cache stores.
        settings: `key_column` and `caption_columns` of the tables.

    Raises:
        SettingError: text vectors without a table of their captions.
    """

    def __init__(self, vectors: VectorImport, about: Mapping[str, Any], settings: SourceSettings) -> None:
        self._vectors, self._about, self._settings = vectors, about, settings
        self._modalities = set(vectors.modalities.values())
        if "text" in self._modalities and any(group.table is None for group in vectors.groups):
            raise SettingError(
                f"{vectors.path}: text vectors need a table with their captions, got no table; name one with --table"
            )

    def describe(self) -> Mapping[str, Any]:
        """Return the description that the cache stores."""
        return self._about

    def samples(self) -> Iterator[Sample]:
        """Iterate over all rows. Memory: one batch of a table.

        Raises:
            SourceError: a table lacks a column, or has more or fewer rows than its vectors.
        """
        first = 0
        for group in self._vectors.groups:
            yield from self._table_samples(group, first) if group.table else self._numbered_samples(group, first)
            first += group.num_rows

    def read(self, item: ImageItem) -> bytes:
        """Return the bytes of an image whose file a table names."""
        return ImportedSource(str(self._vectors.path), SourceSettings()).read(item)

    def _numbered_samples(self, group: FileGroup, first: int) -> Iterator[Sample]:
        images = (ImageItem(path=""),) if "image" in self._modalities else ()
        for number in range(first, first + group.num_rows):
            yield Sample(key=_KEY_FORMAT.format(number), images=images)

    def _table_samples(self, group: FileGroup, first: int) -> Iterator[Sample]:
        assert group.table is not None
        table = _SampleTable.open(group.table, self._settings, set(group.vectors))
        if "text" in self._modalities:
            table.check_has_captions()
        count = 0
        for count, row in enumerate(table.rows(), start=1):
            if count <= group.num_rows:
                yield self._sample(table, row, first + count - 1, f"{group.table} row {count - 1:,}")
        if count != group.num_rows:
            vectors = next(iter(group.vectors.values())).path
            raise SourceError(
                f"{group.table}: expected {group.num_rows:,} rows as in {vectors}, got {count:,}; the two files do not "
                "belong together"
            )

    def _sample(self, table: "_SampleTable", row: Row, number: int, place: str) -> Sample:
        texts = row_texts(table.columns, row, place)
        if "text" in self._modalities:
            if len(texts) > 1:
                raise SourceError(
                    f"{place}: expected one caption per text vector, got {len(texts)}; name the column of the caption "
                    "with --caption-column"
                )
            texts = texts or (TextItem(text=""),)
        return Sample(
            key=row_key(table.columns, row, place) or _KEY_FORMAT.format(number),
            images=(ImageItem(path=table.image_path(row)),) if "image" in self._modalities else (),
            texts=texts,
            columns=scalar_columns({name: row.get(name) for name in table.columns.others}),
        )


@dataclass(frozen=True, kw_only=True)
class _SampleTable:
    file: TableFile
    columns: TableColumns

    @classmethod
    def open(cls, path: Path, settings: SourceSettings, features: set[str]) -> "_SampleTable":
        """Open a table without its columns of vectors."""
        file = open_table_file(path)
        columns = assign_columns(file, settings)
        others = tuple(name for name in columns.others if name not in features)
        return cls(file=file, columns=replace(columns, others=others))

    def check_has_captions(self) -> None:
        if not self.columns.captions:
            raise SourceError(
                f"{self.file.path}: text vectors need a column of captions; name one of "
                f"{', '.join(self.file.columns)} with --caption-column"
            )

    def rows(self) -> Iterator[Row]:
        return self.file.rows(self.columns.to_read())

    def image_path(self, row: Row) -> str:
        """Return the image path of a row as it is written; "" if it has none."""
        value = None if self.columns.image is None or self.columns.holds_bytes else row.get(self.columns.image)
        return value if isinstance(value, str) else ""


class ImportedSource:
    """Reads the images that an import named, if their files still exist; it has no samples to extract features from.

    Args:
        location: path that was imported.
        settings: must be empty.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported(IMPORTED)
        self._location = Path(location)
        self._root = self._location if self._location.is_dir() else self._location.parent

    def describe(self) -> Mapping[str, Any]:
        """Return what is needed to open the source again."""
        return {"type": IMPORTED, "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Raise, because there are vectors and nothing that an encoder could encode.

        Raises:
            SourceError: always.
        """
        raise SourceError(
            f"{self._location} was imported: it has vectors, and no images or texts to encode; extract from the "
            "original images and captions"
        )

    def read(self, item: ImageItem) -> bytes:
        """Return the bytes of an image.

        Raises:
            ItemError: the import named no file for it, or the file does not exist.
        """
        if not item.path:
            raise ItemError("the import named no file for this image")
        return read_item_file(resolve_item(self._root, item.path))
