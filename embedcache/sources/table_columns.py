"""Which columns of a table are images, captions and keys, by the user's word or the usual names; what a row says."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from embedcache.errors import SourceError
from embedcache.sources.contract import TextItem
from embedcache.sources.settings import SourceSettings
from embedcache.sources.sidecar import caption_list, text_items
from embedcache.sources.table_files import Row, TableFile

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
