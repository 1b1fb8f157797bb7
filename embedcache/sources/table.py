"""Tables of images and captions: Parquet, CSV, TSV and JSONL, one file or a folder of such."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError
from embedcache.paths import open_path
from embedcache.sources.contract import ImageItem, Sample
from embedcache.sources.files import (
    TABLE_SUFFIXES,
    has_suffix,
    item_path,
    place_of,
    read_file,
    relative_to,
    walk_files,
)
from embedcache.sources.reading import file_size, is_folder
from embedcache.sources.row_groups import RowGroups
from embedcache.sources.settings import SourceSettings
from embedcache.sources.sidecar import scalar_columns
from embedcache.sources.table_columns import TableColumns, find_columns, row_key, row_texts
from embedcache.sources.table_files import Row, TableFile, open_table_file


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
