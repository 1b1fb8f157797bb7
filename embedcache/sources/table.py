"""Tables of images and captions (Parquet, CSV, TSV, JSONL), and the roles of their columns."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import open_path
from embedcache.sources.base import FileItem, Sample, TextItem
from embedcache.sources.captions import parse_captions, to_scalar_columns, to_text_items
from embedcache.sources.files import (
    TABLE_SUFFIXES,
    file_size,
    has_suffix,
    is_folder,
    item_path,
    read_item_file,
    relative_to,
    resolve_item,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import Row, RowGroups, TableFile, open_table_file

IMAGE_NAMES = (
    "image", "image_path", "path", "file", "filepath", "file_name", "filename",
    "jpg", "jpeg", "png", "webp",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Roles of the columns of a table.

    Args:
        holds_bytes: whether the image column holds images rather than their paths.
        others: columns kept as columns of the samples.
    """

    image: str | None
    holds_bytes: bool
    captions: tuple[str, ...]
    key: str | None
    language: str | None
    others: tuple[str, ...]

    def to_read(self) -> list[str]:
        """Return the columns that indexing reads: all but the bytes of images."""
        image = None if self.holds_bytes else self.image
        names = (image, *self.captions, self.key, self.language, *self.others)
        return list(dict.fromkeys(name for name in names if name is not None))


def find_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of a table, and check that one of them contains images or captions."""
    columns = assign_columns(file, settings)
    if columns.image is None and not columns.captions:
        names = ", ".join(file.columns) or "none"
        raise SourceError(
            f"{file.path} has no column with a usual name for images or captions; it has {names}; name them with "
            "--image-column and --caption-column"
        )
    return columns


def assign_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of any table; SourceError if a column named in the settings does not fit."""
    image = _existing(file, settings.image_column, "--image-column") or _find(file, IMAGE_NAMES)
    captions = settings.caption_columns or _find_captions(file.columns)
    for name in captions:
        _check_plain(file, _existing(file, name, "--caption-column"), "--caption-column")
    if image not in file.image_bytes:
        _check_plain(file, image, "--image-column")
    key = _existing(file, settings.key_column, "--key-column") or _find(file, ("key", "id", "uid", "__key__"))
    language = _find(file, ("language", "lang"))
    used = {image, *captions, key, language, "key"}  # the sample table has its own column `key`
    return TableColumns(
        image=image,
        holds_bytes=image in file.image_bytes,
        captions=captions,
        key=key,
        language=language,
        others=tuple(name for name in file.plain if name not in used),
    )


def read_key(columns: TableColumns, row: Row, location: str) -> str | None:
    """Return the key of a row, or None without a key column. The error for an empty cell starts with `location`."""
    if columns.key is None:
        return None
    key = row.get(columns.key)
    if key is None or key == "":
        raise SourceError(f"{location} has no key in column {columns.key}")
    return str(key)


def read_texts(columns: TableColumns, row: Row, location: str) -> tuple[TextItem, ...]:
    """Return the captions of a row, with the language in its language column, if any.

    With several caption columns, blank cells are dropped unless all are blank: a row of a CSV file may have fewer
    captions than there are columns. The error for cells without captions starts with `location`.
    """
    cells = [parse_captions(row.get(name), f"{location}: {name}") for name in columns.captions]
    captions = [caption for cell in cells for caption in cell]
    if len(columns.captions) > 1:
        captions = [caption for caption in captions if caption.strip()] or captions
    return to_text_items(captions, row.get(columns.language) if columns.language else None)


def _existing(file: TableFile, name: str | None, option: str) -> str | None:
    if name is not None and name not in file.columns:
        raise SourceError(f"{option} {name}: no such column in {file.path}; it has {', '.join(file.columns) or 'none'}")
    return name


def _check_plain(file: TableFile, name: str | None, option: str) -> None:
    if name is not None and name not in file.plain:
        raise SourceError(
            f"column {name} of {file.path} holds values of another type; name another column with {option}; the table "
            f"has {', '.join(file.columns)}"
        )


def _find(file: TableFile, names: Sequence[str]) -> str | None:
    """Return the column whose name, ignoring case, comes first in `names`."""
    by_name = {column.lower(): column for column in reversed(file.columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _find_captions(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the caption columns: `caption`, `captions`, `caption_0`, …, else those named `text` or `sentence`."""
    for stem in ("caption", "text", "sentence"):
        matches = [name for name in columns if re.fullmatch(rf"{stem}s?(_?\d+)?", name, re.IGNORECASE)]
        if matches:
            return tuple(matches)
    return ()


class TableSource:
    """One sample per row of a table, or of all tables below a folder, sorted by path.

    Keys are the cells of the key column, else `<path of the file without suffix>/<row>`. An image column holds bytes,
    a struct of `bytes` and `path` as Hugging Face writes it, or paths: absolute, relative to the folder of the table,
    or URLs. Iterating over the samples reads no image.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("table", "image_column", "caption_columns", "key_column")
        self._settings = settings
        self._location = open_path(location).absolute()
        self._files = _find_files(self._location)
        self._root = self._location.parent if self._files == [self._location] else self._location
        self._root_text = str(self._root)
        self._row_groups = RowGroups()
        self._image_column = lru_cache(maxsize=4096)(self._find_image_column)

    def describe(self) -> Mapping[str, Any]:
        return {"type": "table", "path": str(self._location), "settings": self._settings.to_json()}

    def samples(self) -> Iterator[Sample]:
        """Iterate over all rows. Memory holds one batch of rows, without images."""
        for path in self._files:
            file = open_table_file(path)
            columns = find_columns(file, self._settings)
            for number, row in enumerate(file.rows(columns.to_read())):
                yield self._sample(file, columns, number, row)

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one image: a file, or a cell of a Parquet file."""
        path = resolve_item(self._root, item.path)
        if path.suffix.lower() != ".parquet":
            return read_item_file(path)
        column = self._image_column(path)
        cell = self._row_groups.read(path, column, item.offset)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return data
        if isinstance(cell, dict) and cell.get("path"):
            return read_item_file(resolve_item(path.parent, cell["path"]))
        raise ItemError(f"no image in column {column}, row {item.offset} of {path}")

    def _sample(self, file: TableFile, columns: TableColumns, number: int, row: Row) -> Sample:
        location = f"{file.path} row {number}"
        return Sample(
            key=read_key(columns, row, location) or f"{relative_to(self._root_text, file.stem)}/{number}",
            images=self._images(file, columns, number, row),
            texts=read_texts(columns, row, location),
            columns=to_scalar_columns({name: row.get(name) for name in columns.others}),
        )

    def _images(self, file: TableFile, columns: TableColumns, number: int, row: Row) -> tuple[FileItem, ...]:
        if columns.image is None:
            return ()
        if columns.holds_bytes:
            return (FileItem(path=relative_to(self._root_text, str(file.path)), offset=number),)
        value = row.get(columns.image)
        if value is None or value == "":
            return ()
        if not isinstance(value, str):
            raise SourceError(
                f"{file.path} row {number}: expected a path in column {columns.image}, got {value!r:.60}; name another "
                "column with --image-column"
            )
        return (FileItem(path=item_path(self._root_text, file.stem.rpartition("/")[0], value)),)

    def _find_image_column(self, path: Path) -> str:
        try:
            column = find_columns(open_table_file(path), self._settings).image
        except (PathError, SourceError) as error:
            raise ItemError(str(error)) from None
        if column is None:
            raise ItemError(f"{path} has no image column")
        return column


def _find_files(location: Path) -> list[Path]:
    if not is_folder(location, TABLE_SUFFIXES):
        if file_size(location) is None:
            raise PathError(f"expected a table or a folder, got {location}, which does not exist; check the path")
        return [location]
    names = [name for name, _ in walk_files(location) if has_suffix(name, TABLE_SUFFIXES)]
    if not names:
        raise PathError(f"{location}: expected {', '.join(sorted(TABLE_SUFFIXES))} files, got none; check the path")
    return [location / name for name in names]
