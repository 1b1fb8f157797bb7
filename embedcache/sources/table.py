"""Tables of images and captions: Parquet, CSV, TSV and JSONL, one file or a folder of such.

Which columns of a table are images, captions and keys, by the user's word or the usual names; what a row says.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.files import open_path
from embedcache.sources.base import ImageItem, Sample, TextItem
from embedcache.sources.captions import caption_list, scalar_columns, text_items
from embedcache.sources.files import (
    TABLE_SUFFIXES,
    file_size,
    has_suffix,
    is_folder,
    item_path,
    place_of,
    read_file,
    relative_to,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import Row, RowGroups, TableFile, open_table_file

IMAGE_NAMES = (
    "image", "image_path", "path", "file", "filepath", "file_name", "filename",
    "jpg", "jpeg", "png", "webp",
)  # fmt: skip
CAPTION_STEMS = ("caption", "text", "sentence")
KEY_NAMES = ("key", "id", "uid", "__key__")
LANGUAGE_NAMES = ("language", "lang")


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """What each column is for.

    Args:
        image: the image column, if any.
        holds_bytes: whether it holds the images themselves rather than their paths.
        captions: the caption columns; none or more.
        key: the column that names the rows, if any.
        language: the column with the language of a row's captions, if any.
        others: what is kept as columns of the samples.
    """

    image: str | None
    holds_bytes: bool
    captions: tuple[str, ...]
    key: str | None
    language: str | None
    others: tuple[str, ...]

    def to_read(self) -> list[str]:
        """List the columns that indexing reads: all but the bytes of images."""
        image = () if self.holds_bytes else (self.image,)
        named = (*image, *self.captions, self.key, self.language, *self.others)
        return list(dict.fromkeys(name for name in named if name is not None))


def find_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Find out what each column of a table of images and captions is for.

    Raises:
        SourceError: a column the user named is not there, is of no use as such, or there is neither
            an image nor a caption; the message lists the columns that are there.
    """
    columns = name_columns(file, settings)
    if columns.image is None and not columns.captions:
        raise SourceError(
            f"{file.path} has no column of a usual name for images or captions; it has "
            f"{_listed(file)}; name them with --image-column and --caption-column"
        )
    return columns


def name_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Find out what each column of any table is for.

    Raises:
        SourceError: a column the user named is not there, or is of no use as such.
    """
    image = _named(file, settings.image_column, "--image-column") or _first(file, IMAGE_NAMES)
    captions = tuple(settings.caption_columns) or _captions(file.columns)
    for name in captions:
        _check_plain(file, _named(file, name, "--caption-column"), "--caption-column")
    if image not in file.image_bytes:
        _check_plain(file, image, "--image-column")
    key = _named(file, settings.key_column, "--key-column") or _first(file, KEY_NAMES)
    language = _first(file, LANGUAGE_NAMES)
    used = {image, *captions, key, language, "key"}  # the samples have a column `key` of their own
    return TableColumns(
        image=image,
        holds_bytes=image in file.image_bytes,
        captions=captions,
        key=key,
        language=language,
        others=tuple(name for name in file.plain if name not in used),
    )


def row_key(columns: TableColumns, row: Row, place: str) -> str | None:
    """Give the key in a row; None where no column has keys.

    Raises:
        SourceError: the cell is blank; the message holds `place`.
    """
    if columns.key is None:
        return None
    key = row.get(columns.key)
    if key is None or key == "":
        raise SourceError(f"{place} has no key in column {columns.key}")
    return str(key)


def row_texts(columns: TableColumns, row: Row, place: str) -> tuple[TextItem, ...]:
    """Give the captions of a row, in its language where a column has that.

    Blank cells count only where all cells are blank: a row of CSV may have fewer captions than the table has columns
    for them.

    Raises:
        SourceError: a cell holds no captions but something else; the message holds `place`.
    """
    cells = [caption_list(row.get(name), f"{place}: {name}") for name in columns.captions]
    captions = [caption for cell in cells for caption in cell]
    said = [caption for caption in captions if caption.strip()]
    kept = said or captions if len(columns.captions) > 1 else captions
    return text_items(kept, row.get(columns.language) if columns.language else None)


def _named(file: TableFile, name: str | None, option: str) -> str | None:
    if name is not None and name not in file.columns:
        raise SourceError(f"{option} {name}: no such column in {file.path}; it has {_listed(file)}")
    return name


def _check_plain(file: TableFile, name: str | None, option: str) -> None:
    if name is not None and name not in file.plain:
        raise SourceError(
            f"column {name} of {file.path} holds values of another kind; name a column with "
            f"{option}; it has {_listed(file)}"
        )


def _first(file: TableFile, names: Sequence[str]) -> str | None:
    """Give the column whose name, in either case, comes first among `names`."""
    by_name = {column.lower(): column for column in reversed(file.columns)}
    return next((by_name[name] for name in names if name in by_name), None)


def _captions(columns: Sequence[str]) -> tuple[str, ...]:
    """Give the caption columns: `caption`, `captions`, `caption_0`, `caption_1`, … or else `text` …"""
    for stem in CAPTION_STEMS:
        found = [name for name in columns if re.fullmatch(rf"{stem}s?(_?\d+)?", name, re.IGNORECASE)]
        if found:
            return tuple(found)
    return ()


def _listed(file: TableFile) -> str:
    return ", ".join(file.columns) or "none"


class TableSource:
    """The rows of a table, file after file sorted by path, each a sample.

    A key is the cell of the key column, else `<path of the file without suffix>/<row>`. An image
    column holds bytes, a struct of `bytes` and `path` as Hugging Face writes it, or paths: absolute,
    relative to the table's folder, or URLs. Going through the samples reads no image.

    Args:
        location: a table file or a folder of such, a path or a URL.
        settings: `image_column`, `caption_columns`, `key_column`.

    Raises:
        PathError: there is no table there.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only("table", "image_column", "caption_columns", "key_column")
        self._settings = settings
        self._location = open_path(location).absolute()
        self._files = _find_files(self._location)
        self._root = self._location.parent if self._files == [self._location] else self._location
        self._root_text = str(self._root)
        self._row_groups = RowGroups()
        self._image_column = lru_cache(maxsize=4096)(self._find_image_column)

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        settings = self._settings.given()
        return {"type": "table", "path": str(self._location), "settings": settings}

    def samples(self) -> Iterator[Sample]:
        """Go through all rows. Memory holds one batch of rows, without images."""
        for path in self._files:
            file = open_table_file(path)
            columns = find_columns(file, self._settings)
            for number, row in enumerate(file.rows(columns.to_read())):
                yield self._sample(file, columns, number, row)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image: a file of its own, or a cell of a Parquet file."""
        path = place_of(self._root, item.path)
        if path.suffix.lower() != ".parquet":
            return read_file(path)
        return self._cell(path, self._image_column(path), item.offset)

    def _sample(self, file: TableFile, columns: TableColumns, number: int, row: Row) -> Sample:
        place = f"{file.path} row {number}"
        return Sample(
            key=row_key(columns, row, place) or f"{relative_to(self._root_text, file.stem)}/{number}",
            images=self._images(file, columns, number, row),
            texts=row_texts(columns, row, place),
            columns=scalar_columns({name: row.get(name) for name in columns.others}),
        )

    def _images(self, file: TableFile, columns: TableColumns, number: int, row: Row) -> tuple[ImageItem, ...]:
        if columns.image is None:
            return ()
        if columns.holds_bytes:
            return (ImageItem(path=relative_to(self._root_text, str(file.path)), offset=number),)
        value = row.get(columns.image)
        if value is None or value == "":
            return ()
        if not isinstance(value, str):
            raise SourceError(
                f"{file.path} row {number}: column {columns.image} must hold a path, not "
                f"{value!r:.60}; name another with --image-column"
            )
        return (ImageItem(path=item_path(self._root_text, file.folder, value)),)

    def _find_image_column(self, path: Path) -> str:
        try:
            column = find_columns(open_table_file(path), self._settings).image
        except (PathError, SourceError) as error:
            raise ItemError(str(error)) from None
        if column is None:
            raise ItemError(f"{path} has no image column")
        return column

    def _cell(self, path: Path, column: str, row: int) -> bytes:
        cell = self._row_groups.read(path, column, row)
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            return data
        if isinstance(cell, dict) and cell.get("path"):
            return read_file(place_of(path.parent, cell["path"]))
        raise ItemError(f"no image in column {column}, row {row} of {path}")


def _find_files(location: Path) -> list[Path]:
    if not is_folder(location, TABLE_SUFFIXES):
        if file_size(location) is None:
            raise PathError(f"no such table: {location}")
        return [location]
    names = [name for name, _ in walk_files(location) if has_suffix(name, TABLE_SUFFIXES)]
    if not names:
        raise PathError(f"no {', '.join(sorted(TABLE_SUFFIXES))} file below {location}")
    return [location / name for name in names]
