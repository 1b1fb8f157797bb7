"""Roles of the columns of a table: which hold items, captions, keys and languages, by their names or the settings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

from embedcache.errors import SourceError
from embedcache.sources.base import TextItem
from embedcache.sources.captions import parse_captions, to_text_items
from embedcache.sources.settings import SourceSettings
from embedcache.sources.table_files import Row, TableFile

IMAGE_NAMES = (
    "image", "image_path", "path", "file", "filepath", "file_name", "filename", "image_name",
    "jpg", "jpeg", "png", "webp",
)  # fmt: skip
"""Usual names of a column of images, lower case, the most likely first."""
MEDIA_NAMES: Mapping[str, tuple[str, ...]] = {
    "audio": ("audio", "audio_path", "recording", "wav", "flac", "mp3", "ogg", "m4a", "opus"),
    "video": ("video", "video_path", "mp4", "mkv", "webm", "avi", "mov"),
    "points": ("points_path", "point_cloud", "lidar", "npz"),
}
"""The same of other modalities."""
ITEM_SETTINGS = ("image_column", *(f"{modality}_column" for modality in MEDIA_NAMES))
TEXT_SETTINGS = ("caption_columns", "key_column", "omit_columns", "language_column")
INTERVAL_NAMES = ("start_s", "stop_s")
"""Names of the columns with the start and the end of recordings and videos, in seconds."""
COLUMN_MARK = "#"
"""Between the path of a table and the column that holds the bytes of items, see `embedded_path`."""


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Roles of the columns of a table.

    Args:
        image: column of images.
        media: modality -> column of recordings, videos or point clouds.
        embedded: those columns of items that hold their bytes rather than their paths.
        interval: columns with the start and the end of recordings and videos, in seconds.
        others: columns kept as columns of the samples.
    """

    image: str | None
    media: Mapping[str, str]
    embedded: frozenset[str]
    interval: tuple[str | None, str | None]
    captions: tuple[str, ...]
    key: str | None
    language: str | None
    others: tuple[str, ...]

    @cached_property
    def items(self) -> Mapping[str, str]:
        """Modality -> column of its items, images first."""
        return {**({} if self.image is None else {"image": self.image}), **self.media}

    def to_read(self) -> list[str]:
        """Return the columns that indexing reads: all but the bytes of items."""
        paths = (name for name in self.items.values() if name not in self.embedded)
        names = (*paths, *self.interval, *self.captions, self.key, self.language, *self.others)
        return list(dict.fromkeys(name for name in names if name is not None))


def find_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of a table, and check that one of them contains items or captions."""
    columns = assign_columns(file, settings)
    if columns.image is None and not columns.captions and not columns.media:
        raise SourceError(
            f"{file.path} has no column with a usual name for images or captions; it has {_names(file)}; name them "
            "with --image-column and --caption-column, or --audio-column, --video-column and --points-column"
        )
    return columns


def assign_columns(file: TableFile, settings: SourceSettings) -> TableColumns:
    """Assign roles to the columns of any table; SourceError if a column named in the settings does not fit."""
    media = _find_media(file, settings)
    images = [name for name in IMAGE_NAMES if settings.image_column or name not in map(str.lower, media.values())]
    image = _existing(file, settings.image_column, "--image-column") or _find(file, images)
    captions = settings.caption_columns or _find_captions(file.columns)
    for name in captions:
        _check_plain(file, _existing(file, name, "--caption-column"), "--caption-column")
    if image not in file.bytes_columns:
        _check_plain(file, image, "--image-column")
    key = _existing(file, settings.key_column, "--key-column") or _find(file, ("key", "id", "uid", "__key__"))
    language = _existing(file, settings.language_column, "--language-column") or _find(file, ("language", "lang"))
    _check_plain(file, settings.language_column, "--language-column")
    omitted = [_existing(file, name, "--omit-column") for name in settings.omit_columns]
    is_timed = "audio" in media or "video" in media
    interval = tuple(_find(file, [name]) if is_timed else None for name in INTERVAL_NAMES)
    reserved = "key"  # a column of the sample table itself
    used = {reserved, image, *media.values(), *interval, *captions, *omitted, key, language}
    return TableColumns(
        image=image,
        media=media,
        embedded=frozenset(name for name in (image, *media.values()) if name in file.bytes_columns),
        interval=(interval[0], interval[1]),
        captions=captions,
        key=key,
        language=language,
        others=tuple(name for name in file.plain_columns if name not in used),
    )


def _find_media(file: TableFile, settings: SourceSettings) -> dict[str, str]:
    """Return modality -> column of recordings, videos and point clouds."""
    media = {}
    for modality, names in MEDIA_NAMES.items():
        option = f"--{modality}-column"
        column = _existing(file, getattr(settings, f"{modality}_column"), option) or _find(file, names)
        if column is not None:
            if column not in file.bytes_columns:
                _check_plain(file, column, option)
            media[modality] = column
    return media


def read_interval(columns: TableColumns, row: Row, location: str) -> tuple[float | None, float | None]:
    """Return the start and the end of a row's recording or video; the error for other cells starts with `location`."""
    start_s, stop_s = (
        None if name is None or row.get(name) in (None, "") else _seconds(row[name], f"{location}: {name}")
        for name in columns.interval
    )
    if stop_s is not None and stop_s <= (start_s or 0):
        raise SourceError(f"{location}: expected stop_s after start_s, got {start_s or 0:g} to {stop_s:g}")
    return start_s, stop_s


def _seconds(value: Any, location: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise SourceError(f"{location}: expected seconds of at least 0, got {value!r:.60}")
    return seconds


def embedded_path(path: str, column: str) -> str:
    """Return the path of items whose bytes are in a column other than that of images."""
    return f"{path}{COLUMN_MARK}{column}"


def split_embedded(path: str) -> tuple[str, str | None]:
    """Return the path and the column of the result of `embedded_path`; None for any other path."""
    table, mark, column = path.rpartition(COLUMN_MARK)
    return (table, column) if mark else (path, None)


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
    language = row.get(columns.language) if columns.language else None
    return to_text_items(captions, None if language is None else str(language))


def _existing(file: TableFile, name: str | None, option: str) -> str | None:
    if name is not None and name not in file.columns:
        raise SourceError(f"{option} {name}: no such column in {file.path}; it has {_names(file)}")
    return name


def _names(file: TableFile) -> str:
    """Return the names of all columns; of a single one, a hint if it is a header with another delimiter."""
    names = ", ".join(file.columns) or "none"
    delimiter = next((repr(mark) for mark in ";\t|," if mark in names), "") if len(file.columns) == 1 else ""
    hint = f", one column; if {delimiter} separates them, give --delimiter {delimiter}"
    return names + hint if delimiter else names


def _check_plain(file: TableFile, name: str | None, option: str) -> None:
    if name is not None and name not in file.plain_columns:
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
