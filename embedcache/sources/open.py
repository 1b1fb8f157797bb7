"""A source from what a user types, and again from what a cache remembers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from embedcache.errors import PathError, SourceError
from embedcache.files import open_path
from embedcache.registry import Registry
from embedcache.sources.base import Source
from embedcache.sources.files import (
    IDX_IMAGES,
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    TEXT_SUFFIXES,
    file_size,
    has_suffix,
    is_folder,
    walk_files,
)
from embedcache.sources.settings import SourceSettings
from embedcache.sources.webdataset import is_pattern

SOURCES = Registry(
    "source",
    {
        "folder": "embedcache.sources.folder:FolderSource",
        "huggingface": "embedcache.sources.huggingface:HuggingfaceSource",
        "idx": "embedcache.sources.idx:IdxSource",
        "imported": "embedcache.interop.incoming:ImportedSource",
        "openmoji": "embedcache.quickstart.openmoji:OpenmojiSource",
        "pairs": "embedcache.sources.texts:PairsSource",
        "prompts": "embedcache.sources.prompts:PromptsSource",
        "table": "embedcache.sources.table:TableSource",
        "texts": "embedcache.sources.texts:TextsSource",
        "webdataset": "embedcache.sources.webdataset:WebdatasetSource",
    },
)
_ACCEPTED = (
    "a source is a folder of images, a .parquet/.csv/.tsv/.jsonl table or a folder of such, "
    "a WebDataset .tar, a folder of such or a pattern like shards/{000..009}.tar, a .txt or .npy of texts, MNIST's "
    "IDX files or a folder of such, any of these as a URL, a folder that save_to_disk of Hugging Face datasets wrote, "
    "openmoji:, prompts:, or pairs: before any of these"
)

_SAVED_DATASETS = (("dataset_dict.json",), ("dataset_info.json", "state.json"))
"""The files that `save_to_disk` writes beside the data, of a `DatasetDict` and of a `Dataset`."""


def open_source(location: object, *, kind: str | None = None, settings: SourceSettings | None = None) -> Source:
    """Open raw samples.

    Args:
        location: a path as `str` or `Path`, a URL, `name:rest` for a source of the table (`openmoji:en+de`), or a
            `datasets.Dataset` or `DatasetDict`.
        kind: a name of the table, or `module:attribute` of the user's own, which is called with
            the location and the settings. Found out from the location where it is not given.
        settings: how to read it.

    Raises:
        PathError: there is nothing at that path.
        SourceError: what is there is no source.
        UnknownNameError: there is no such kind.
        SettingError: a setting that this kind does not take.
    """
    place = str(location) if isinstance(location, str | Path) else location
    if isinstance(place, str) and not place.strip():
        raise SourceError(f"the source is an empty text; {_ACCEPTED}")
    if kind is None:
        kind, place = split_kind(place) if isinstance(place, str) else ("huggingface", place)
    source: Source = SOURCES.load(kind)(place, settings or SourceSettings())
    return source


def reopen_source(description: Mapping[str, Any]) -> Source:
    """Open a source again from what its `describe` gave.

    Raises:
        PathError: its files are gone.
    """
    settings = SourceSettings.from_json(description.get("settings", {}))
    return open_source(description["path"], kind=description["type"], settings=settings)


def split_kind(location: str) -> tuple[str, str]:
    """Find out which kind of source a location is: (kind, location for that kind)."""
    kind, colon, rest = location.partition(":")
    if colon and kind in SOURCES.paths:
        return kind, rest
    if is_pattern(location):
        return "webdataset", location
    path = open_path(location)
    if is_folder(path, TAR_SUFFIXES | TABLE_SUFFIXES):
        return _kind_of_folder(path), location
    if file_size(path) is None:
        raise PathError(f"no such file or folder: {location}; {_ACCEPTED}")
    if has_suffix(location, TAR_SUFFIXES):
        return "webdataset", location
    if has_suffix(location, TABLE_SUFFIXES):
        return "table", location
    if has_suffix(location, TEXT_SUFFIXES):
        return "texts", location
    if IDX_IMAGES.fullmatch(location):
        return "idx", location
    raise SourceError(f"{location} is a file of another kind; {_ACCEPTED}")


def _kind_of_folder(folder: Path) -> str:
    """Name the kind of a folder: a saved dataset; else one image, IDX file, tar or table decides, in this order.

    Stops at the first image, so a folder of millions of images is not gone through.
    """
    if any(all((folder / name).is_file() for name in names) for names in _SAVED_DATASETS):
        return "huggingface"
    found = _first_kinds(name for name, _ in walk_files(folder))
    for kind in ("folder", "idx", "webdataset", "table"):
        if kind in found:
            return kind
    raise SourceError(f"{folder} holds no image, no IDX file, no .tar and no table; {_ACCEPTED}")


def _first_kinds(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        if has_suffix(name, IMAGE_SUFFIXES):
            return {"folder"}
        if IDX_IMAGES.fullmatch(name):
            found.add("idx")
        if has_suffix(name, TAR_SUFFIXES):
            found.add("webdataset")
        if has_suffix(name, TABLE_SUFFIXES):
            found.add("table")
    return found
