"""Open a source from a path, URL or name, and describe it; what a cache recorded is opened again by `reopen.py`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SourceError, quoted
from embedcache.files import is_url, open_path
from embedcache.registry import Registry
from embedcache.samples import MERGED, PARTS, FileItem, Sample, Source
from embedcache.settings import merge_settings
from embedcache.sources.files import (
    JSON_SUFFIXES,
    MEDIA_SUFFIXES,
    SHARD_SEPARATOR,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    TEXT_SUFFIXES,
    file_size,
    has_suffix,
    is_folder,
    walk_files,
)
from embedcache.sources.settings import SourceSettings

SOURCES = Registry(
    "source",
    {
        "coco": "embedcache.sources.coco:CocoSource",
        "folder": "embedcache.sources.folder:FolderSource",
        "hf": "embedcache.sources.huggingface:HuggingfaceSource",
        "huggingface": "embedcache.sources.huggingface:HuggingfaceSource",
        "imported": "embedcache.interop.vector_files:ImportedSource",
        "openmoji": "embedcache.quickstart.openmoji:OpenmojiSource",
        "prompts": "embedcache.sources.prompts:PromptsSource",
        "table": "embedcache.sources.table:TableSource",
        "texts": "embedcache.sources.texts:TextsSource",
        "webdataset": "embedcache.sources.webdataset:WebdatasetSource",
    },
    group="embedcache.sources",
    arguments=2,
)

IMPORT_TOGETHER = (
    "vectors of two imports are never compared: import both at once, and divide them with: embedcache cache cut"
)
"""Next step where vectors of two imports meet: nothing says that one model computed both."""

WITHOUT_LOCATION = frozenset({"openmoji"})
"""Kinds of sources that may be opened without a location."""

_SUFFIXES = {"webdataset": TAR_SUFFIXES, "table": TABLE_SUFFIXES, "texts": TEXT_SUFFIXES, "coco": JSON_SUFFIXES}
"""Kind of source -> suffixes of the files that it reads: one that is given as a location is of this kind."""

_FOLDER_SUFFIXES = {**{kind: _SUFFIXES[kind] for kind in ("webdataset", "table")}, "folder": frozenset({".npz"})}
"""The same of a folder that holds such files, and no images or media; the first kind of which there is a file."""

_MEDIA = frozenset().union(*MEDIA_SUFFIXES.values()) - {".npz"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-](\[.*\])?(@[\w./-]+)?")
_ACCEPTED = (
    "expected a folder of images or other files, a table (.parquet, .csv, .tsv, .jsonl), WebDataset tars, COCO's "
    ".json, texts (.txt), a dataset of Hugging Face, a URL of these, or openmoji:"
)


def open_source(location: object, *, kind: str | None = None, settings: SourceSettings | None = None) -> Source:
    """Open a source of raw samples.

    Args:
        location: path, URL, `name:rest` for a registered source (`openmoji:en+de`), or a `datasets.Dataset` or
            `DatasetDict`.
        kind: registered name, or `module:attribute` of a class called with the location and the settings; None:
            detected from the location.
        settings: how to read the source.

    Raises:
        PathError: the path does not exist.
        SourceError: the path is not a source.
        UnknownNameError: there is no source of that kind.
        SettingError: a setting that this kind does not support.
    """
    settings = merge_settings(SourceSettings, settings, {})
    path = str(location) if isinstance(location, str | Path) else location
    if isinstance(path, str) and not path.strip():
        raise SourceError(f"the source is an empty string; {_ACCEPTED}")
    if kind is None and not (isinstance(path, str) or _is_dataset(path)):
        raise SourceError(
            f"expected a path, a URL or a dataset of Hugging Face, got an object of type {type(path).__name__}; save "
            "texts as .txt, one per line, and rows as .parquet or .csv"
        )
    if kind is None:
        kind, path = _detect_kind(path) if isinstance(path, str) else ("huggingface", path)
        if path == "" and kind in SOURCES.paths and kind not in WITHOUT_LOCATION:
            raise SourceError(f"{kind}: expected a location after the colon, got none; name a file or folder")
    source: Source = SOURCES.load(kind)(path, settings)
    return source


def _is_dataset(location: object) -> bool:
    """Return whether an object is of the library `datasets`, without importing it."""
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(location).__mro__)


def _detect_kind(location: str) -> tuple[str, str]:
    """Return the kind of source at a location, and the location as that kind expects it."""
    kind, colon, rest = location.partition(":")
    if colon and kind in SOURCES and not is_url(location):
        return kind, rest
    is_chained = is_url(location) and not is_url(location.partition(SHARD_SEPARATOR)[0])
    if (SHARD_SEPARATOR in location and not is_chained) or ("{" in location and has_suffix(location, TAR_SUFFIXES)):
        return "webdataset", location
    path = open_path(location)
    if is_folder(path, TAR_SUFFIXES | TABLE_SUFFIXES | JSON_SUFFIXES):
        return _folder_kind(path), location
    if file_size(path) is None:
        raise PathError(f"{location} does not exist{_hub_hint(location)}; check the path")
    for name, suffixes in _SUFFIXES.items():
        if has_suffix(location, suffixes):
            return name, location
    raise SourceError(f"{location} is not a source; {_ACCEPTED}")


def _hub_hint(location: str) -> str:
    """Return a hint for what may be the bare name of a dataset on the Hub."""
    is_file = has_suffix(location, _MEDIA.union(*_SUFFIXES.values()))
    if is_file or not _HUB_NAME.fullmatch(location) or Path(location).parent.exists():
        return ""
    return f"; if you mean the dataset of that name on the Hugging Face Hub, use hf:{location}"


def _folder_kind(folder: Path) -> str:
    """Return the kind of a folder: a saved dataset, else images and media before tars, tables and `.npz`.

    Stops at the first image, recording or video, so that a folder of millions of them is not listed.
    """
    if (folder / "cache.json").is_file():
        raise SourceError(
            f"{folder} is a cache: to encode its samples with more encoders, give it as the cache, too: "
            f"embedcache extract {quoted(folder)} {quoted(folder)}; or name the source it was extracted from"
        )
    for names in (("dataset_dict.json",), ("dataset_info.json", "state.json")):  # of a DatasetDict, of a Dataset
        if all((folder / name).is_file() for name in names):
            return "huggingface"
    kinds = set[str]()
    for name in walk_files(folder):
        if has_suffix(name, _MEDIA):
            return "folder"
        kinds |= {kind for kind, suffixes in _FOLDER_SUFFIXES.items() if has_suffix(name, suffixes)}
    for kind in _FOLDER_SUFFIXES:
        if kind in kinds:
            return kind
    raise SourceError(f"{folder} contains no image, recording, video, point cloud, .tar or table; {_ACCEPTED}")


class MergedSource:
    """The sources of a merged cache: each has the items whose path begins with its number."""

    def __init__(self, sources: Sequence[Source], description: Mapping[str, Any]) -> None:
        self._sources, self._description = sources, description

    def describe(self) -> Mapping[str, Any]:
        """Return what is needed to open the sources again."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Raise a SourceError, because a cache of another source would be extended with these samples."""
        raise SourceError(
            f"{self._description['path']} are the sources of a merged cache; extract from each of them, and merge again"
        )

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item; the errors are those of its source."""
        number, _, path = item.path.partition("/")
        if not number.isdecimal() or int(number) >= len(self._sources):
            raise ItemError(f"{item.path}: expected the number of one of {len(self._sources)} sources, and a path")
        return self._sources[int(number)].read(replace(item, path=path))


def merged_description(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the description of the sources of several caches."""
    path = " + ".join(str(part.get("path", "")) for part in parts)
    return {"type": MERGED, "path": path, "settings": {}, PARTS: [dict(part) for part in parts]}


def merged_parts(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the descriptions that a merged description was made of, or the description itself."""
    return list(description[PARTS]) if description.get("type") == MERGED else [description]


def merged_path(number: int, path: str) -> str:
    """Return the path of an item of one of the sources, counted from 0."""
    return f"{number}/{path}"


def source_credit(description: Mapping[str, Any]) -> str:
    """Return the attribution that pages with images of a source must carry, or an empty string.

    The description may come from an untrusted cache: only built-in and installed plug-ins are imported.
    """
    kinds = dict.fromkeys(str(part.get("type", "")) for part in merged_parts(description))
    credits = [str(getattr(SOURCES.load(kind), "credit", "")) for kind in kinds if kind in SOURCES]
    return "; ".join(filter(None, credits))
