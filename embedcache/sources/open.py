"""Open sources from a path, URL or name, and again from what a cache recorded.

A cache may be a stranger's, and says where its items are. They are read only below the folders and URLs that the user
named (`read_below`, which is what `--image-folder` is), and below those of the source if this user indexed the cache.
That is recorded outside of it (`remember`), where no stranger can write. `trust_files` lifts the rule.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, PathError, SettingError, SourceError, quoted
from embedcache.files import is_url, open_path
from embedcache.modalities import IMPORTED_SOURCE, MERGED, PARTS, FileItem, Sample, Source
from embedcache.provenance import digest
from embedcache.registry import Registry, has_trust, names_from
from embedcache.settings import Settings, merge_settings, setting
from embedcache.sources.files import (
    JSON_SUFFIXES,
    MEDIA_SUFFIXES,
    SHARD_SEPARATOR,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    TEXT_SUFFIXES,
    file_size,
    has_suffix,
    is_below,
    is_folder,
    restrict_reads,
    walk_files,
)

SOURCES = Registry(
    "source",
    {
        "coco": "embedcache.sources.coco:CocoSource",
        "folder": "embedcache.sources.folder:FolderSource",
        "hf": "embedcache.sources.huggingface:HuggingfaceSource",
        "huggingface": "embedcache.sources.huggingface:HuggingfaceSource",
        "imported": "embedcache.vectors.importing:ImportedSource",
        "openmoji": "embedcache.quickstart.openmoji:OpenmojiSource",
        "prompts": "embedcache.sources.texts:PromptsSource",
        "prototypes": "embedcache.extract.prototypes:PrototypesSource",
        "table": "embedcache.sources.table:TableSource",
        "texts": "embedcache.sources.texts:TextsSource",
        "webdataset": "embedcache.sources.webdataset:WebdatasetSource",
    },
    group="embedcache.sources",
)

IMPORT_TOGETHER = (
    "vectors of two imports are never compared: import both at once, and divide them with: embedcache cache cut"
)
"""Next step where vectors of two imports meet: nothing says that one model computed both."""

WITHOUT_LOCATION = frozenset({"openmoji"})
"""Kinds of sources that may be opened without a location."""

_SUFFIXES = {"webdataset": TAR_SUFFIXES, "table": TABLE_SUFFIXES, "texts": TEXT_SUFFIXES, "coco": JSON_SUFFIXES}
"""Kind of source -> suffixes of the files that it reads: one that is given as a location is of this kind."""

_FILE_SUFFIXES = frozenset[str]().union(*_SUFFIXES.values())

_FOLDER_SUFFIXES = {**{kind: _SUFFIXES[kind] for kind in ("webdataset", "table")}, "folder": frozenset({".npz"})}
"""The same of a folder that holds such files, and no images or media; the first kind of which there is a file."""

_MEDIA = frozenset().union(*MEDIA_SUFFIXES.values()) - {".npz"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-](\[.*\])?(@[\w./-]+)?")
_ACCEPTED = (
    "expected a folder of images or other files, a table (.parquet, .csv, .tsv, .jsonl), WebDataset tars, COCO's "
    ".json, texts (.txt), a dataset of Hugging Face, a URL of these, or openmoji:"
)

_READ_BELOW = frozenset({"coco", "folder", "huggingface", "table", "webdataset", IMPORTED_SOURCE})
"""Kinds of sources that read their location, below it, and what their items name: nothing else."""

_NAMED: ContextVar[tuple[str, ...]] = ContextVar("named_places", default=())

_log = logging.getLogger(__name__)

ITEM_COLUMNS: dict[str, Any] = {
    "default": {},
    "help": "Table column that holds the images, recordings, videos or point clouds, or their paths or URLs. May be "
    "repeated.",
    "flat_name": "item_column",
    "metavar": "MODALITY=COLUMN",
    "default_text": "a usual name such as image, file_name, audio_path or mp4, if present",
    "commas": "keep",
}
_NO_DELIMITERS = ' "\r\n'


class SourceSettings(Settings):
    """Settings of a source: how it is read.

    Example:
        >>> settings = SourceSettings(item_columns={"image": "photo"}, caption_columns=("title",))
        >>> source = embedcache.open_source("photos.csv", settings=settings)
        >>> [text.text for sample in source.samples() for text in sample.texts]
        ['a red box', 'a boat']
    """

    item_columns: Mapping[str, str] = setting(**ITEM_COLUMNS)
    caption_columns: tuple[str, ...] = setting(
        (),
        "Table column that holds captions. May be repeated.",
        flat_name="caption_column",
        metavar="COLUMN",
        default_text="caption, text, sentence, … if present",
    )
    key_column: str | None = setting(
        None,
        "Table column that holds the keys of samples.",
        metavar="COLUMN",
        default_text="key, id, uid if present, else file and row",
    )
    omit_columns: tuple[str, ...] = setting(
        (),
        "Table column to leave out, such as a number per caption. May be repeated.",
        flat_name="omit_column",
        metavar="COLUMN",
    )
    language_column: str | None = setting(
        None,
        "Table column that holds the language of a row's captions.",
        metavar="COLUMN",
        default_text="language, lang if present",
    )
    languages: tuple[str, ...] = setting(
        (),
        "Use only captions of this language. May be repeated.",
        flat_name="language",
        metavar="CODE",
        default_text="all languages of the source",
    )
    root: str | None = setting(
        None,
        "Folder or URL that paths in a table or in COCO's JSON are relative to.",
        metavar="FOLDER",
        default_text="the table's folder; COCO: beside that of the JSON file",
    )
    delimiter: str | None = setting(
        None,
        r"Character between the cells of a text table, such as '|'; spaces after it are skipped.",
        metavar="CHARACTER",
        default_text="comma; tab in .tsv",
    )

    def model_post_init(self, _context: object) -> None:
        if "text" in self.item_columns:
            raise SettingError(f"item_column: expected no text, got {self.item_columns['text']}; give --caption-column")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in _NO_DELIMITERS):
            raise SettingError(f"delimiter: expected one character, such as '|' or $'\\t', got {self.delimiter!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the values that were given, as JSON."""
        return {name: value for name, value in super().to_json().items() if value}

    def check_supported(self, kind: str, *names: str, hint: str = "") -> None:
        """Check that only settings are given that a source of this kind uses; else raise SettingError, with a hint."""
        for name in self.to_json():
            if name not in names:
                supported = f"it supports {', '.join(names)}" if names else "it has no settings"
                raise SettingError(f"a source of type {kind} does not support the setting {name!r}; {supported}{hint}")


def open_source(location: object, *, kind: str | None = None, settings: SourceSettings | None = None) -> Source:
    """Open a source of raw samples.

    Args:
        location: path, URL, `name:rest` for a registered source (`openmoji:en+de`), or a `datasets.Dataset` or
            `DatasetDict`.
        kind: registered name, or `module:attribute` of a class called with the location and the settings. If None,
            detected from the location.
        settings: how to read the source.

    Raises:
        PathError: the path does not exist.
        SourceError: the path is not a source.
        UnknownNameError: there is no source of that kind.
        SettingError: a setting that this kind does not support.

    Example:
        >>> source = embedcache.open_source("photos")
        >>> sample = next(iter(source.samples()))
        >>> sample.key, sample.images[0].path, sample.texts[0].text
        ('00000', '00000.png', 'yellow bar right on black')
        >>> source.read(sample.images[0])[1:4]
        b'PNG'
    """
    settings = merge_settings(SourceSettings, settings, {})
    path = str(location) if isinstance(location, str | Path) else location
    if isinstance(path, str) and not path.strip():
        raise SourceError(f"the source is an empty string; {_ACCEPTED}")
    if kind is None and not (isinstance(path, str) or _is_dataset(path)):
        raise SourceError(f"expected a path, a URL or a dataset, got a {type(path).__name__}; save texts as .txt")
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
    if is_folder(path, _FILE_SUFFIXES):
        return _folder_kind(path), location
    if file_size(path) is None:
        raise PathError(f"{location} does not exist{_hub_hint(location)}; check the path")
    for name, suffixes in _SUFFIXES.items():
        if has_suffix(location, suffixes):
            return name, location
    raise SourceError(f"{location} is not a source; {_ACCEPTED}")


def _hub_hint(location: str) -> str:
    """Return a hint for what may be the bare name of a dataset on the Hub."""
    is_file = has_suffix(location, _FILE_SUFFIXES | _MEDIA)
    if is_file or not _HUB_NAME.fullmatch(location) or Path(location).parent.exists():
        return ""
    return f"; if you mean the dataset of that name on the Hugging Face Hub, use hf:{location}"


def _folder_kind(folder: Path) -> str:
    """Return the kind of a folder: a saved dataset, else images and media before tars, tables and `.npz`.

    Stops at the first image, recording or video, so that a folder of millions of them is not listed.
    """
    if (folder / "cache.json").is_file():
        command = f"embedcache extract {quoted(folder)} {quoted(folder)}"
        raise SourceError(f"{folder} is a cache; to encode its samples with more encoders: {command}")
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
        self._sources = sources
        self._description = description

    def describe(self) -> Mapping[str, Any]:
        """Return what is needed to open the sources again."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Raise a SourceError, because a cache of another source would be extended with these samples."""
        raise SourceError(f"{self._description['path']} were merged: extract from each of them, and merge again")

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


def merged_path(number: int, path: str) -> str:
    """Return the path of an item of one of the sources, counted from 0."""
    return f"{number}/{path}"


def source_credit(description: Mapping[str, Any]) -> str:
    """Return the attribution that pages with images of a source must carry, or an empty string.

    The description may come from an untrusted cache: only built-in and installed plug-ins are imported.
    """
    kinds = dict.fromkeys(str(part.get("type", "")) for part in _parts(description))
    credits = [str(getattr(SOURCES.load(kind), "credit", "")) for kind in kinds if kind in SOURCES]
    return "; ".join(filter(None, credits))


@contextmanager
def read_below(*places: str | os.PathLike[str]) -> Iterator[None]:
    """Read the sources of caches also below these folders and URLs while this context lasts, in this thread.

    Of a source that is extracted meanwhile, items are read there and in its own folder only.

    Raises:
        PathError: a folder does not exist.

    Example:
        >>> with read_below("."):
        ...     pass
    """
    resolved = tuple(_resolve(os.fspath(place)) for place in places)
    for place in resolved:
        if not is_url(place) and not Path(place).exists():
            raise PathError(f"image_folder: expected a folder or URL, got {place}, which does not exist")
    token = _NAMED.set((*_NAMED.get(), *resolved))
    try:
        yield
    finally:
        _NAMED.reset(token)


def remember(description: Mapping[str, Any], index_digest: str) -> None:
    """Record that this user indexed a source as these rows; where that cannot be written, its caches stay foreign."""
    try:
        path = _record_path(description, index_digest)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch()
    except (OSError, RuntimeError) as error:
        _log.info("not recorded that this source was indexed here: %s", error)


def is_remembered(description: Mapping[str, Any], index_digest: str) -> bool:
    """Return whether this user indexed a source as these rows, or cut or merged them from such caches."""
    with suppress(OSError, RuntimeError):
        return _record_path(description, index_digest).exists()
    return False


def _record_path(description: Mapping[str, Any], index_digest: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    where = [description.get(name) for name in ("type", "path", "settings", "parts")]
    return Path(state, "embedcache", "sources", digest([where, index_digest]))


def reopen_source(description: Mapping[str, Any], index_digest: str = "", *, max_bytes: int | None = None) -> Source:
    """Open a source again from the result of its `describe`, which a cache recorded; within `trust_files` any source.

    It reads nothing but regular files below the places of `allowed_places`, whatever its items name.

    Args:
        description: what the cache recorded.
        index_digest: digest of the cache's rows, by which it is known whether this user indexed them.
        max_bytes: largest local file to read, or part of one.

    Raises:
        PathError: its files no longer exist, or are elsewhere.
        SettingError: its class is custom code, and the cache is not trusted.
    """
    return open_below(description, allowed_places(description, index_digest), max_bytes)


def open_below(description: Mapping[str, Any], places: Sequence[str] | None, max_bytes: int | None = None) -> Source:
    """Open a source again to read below some places, which hold what it is opened from; None: anywhere."""
    if places is None:
        return _open(description)
    with restrict_reads(places, max_bytes):
        return RestrictedSource(_open(description), places, max_bytes)


def _open(description: Mapping[str, Any]) -> Source:
    if description["type"] == MERGED:
        return MergedSource([_open(part) for part in description[PARTS]], description)
    settings = SourceSettings(**description.get("settings", {}))
    with names_from("the cache"):
        return open_source(description["path"], kind=description["type"], settings=settings)


def allowed_places(description: Mapping[str, Any], index_digest: str) -> Sequence[str] | None:
    """Return where the source of a cache may be read, as the top of this module says; None: anywhere.

    Raises:
        PathError: the source itself is elsewhere, or of a kind that may read anything.
    """
    if has_trust():
        return None
    is_own = is_remembered(description, index_digest)
    places = [*_NAMED.get(), *(own_places(description) if is_own else ())]
    for part in _parts(description):
        kind = str(part.get("type", ""))
        path = str(part.get("path", ""))
        locations = _locations(part)
        is_confined = kind in _READ_BELOW and locations and (kind != "huggingface" or Path(path).exists())
        if not (is_own or is_confined or kind in WITHOUT_LOCATION):
            source = f"{kind}:{path}, which may read and run anything"
            raise PathError(f"the cache says that its source is {source}; use --trust if you trust the cache")
        for location in locations:
            if not is_below(location if is_url(location) else Path(location).resolve(), places):
                raise PathError(
                    f"the cache says that its source is {location}, and you did not extract it on this machine; name "
                    "its folder or URL with --image-folder, or use --trust if you trust the cache"
                )
    return places


def own_places(description: Mapping[str, Any]) -> list[str]:
    """Return the folders and URLs of a source; of a file, its folder."""
    places: dict[str, None] = {}
    for location in (location for part in _parts(description) for location in _locations(part)):
        if is_url(location):
            is_file = has_suffix(location, _FILE_SUFFIXES)
            places[_resolve(location.rpartition("/")[0] if is_file else location)] = None
        else:
            path = Path(location).resolve()
            places[str(path if path.is_dir() else path.parent)] = None
    return list(places)


def _parts(description: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Iterate over the descriptions of the sources of a cache, which may be merged from merged ones."""
    if description.get("type") != MERGED:
        yield description
        return
    for part in description[PARTS]:
        yield from _parts(part)


def _locations(part: Mapping[str, Any]) -> list[str]:
    """Return the files, folders and URLs that a source is opened from; of a pattern, the folder before it.

    Names on the Hub, of languages and of datasets are left out.
    """
    path = str(part.get("path", ""))
    texts = [path, str(part.get("settings", {}).get("root", ""))]
    if part.get("type") == "webdataset":
        shards = path.split(SHARD_SEPARATOR)
        texts = [shard.partition("{")[0].rpartition("/")[0] if "{" in shard else shard for shard in shards]
    return [text for text in texts if is_url(text) or text.startswith("/")]


def _resolve(place: str) -> str:
    if is_url(place) and not place.startswith("file:///"):
        return place.rstrip("/")
    return str(Path(place.removeprefix("file://")).resolve())


def below_named(source: Source) -> Source:
    """Return a source that the user opened; if they named places, it reads its items there and in its own folder."""
    if not _NAMED.get() or isinstance(source, RestrictedSource | RecordedSource):
        return source
    return RestrictedSource(source, [*_NAMED.get(), *own_places(source.describe())])


class RestrictedSource:
    """A source whose items are read below some places only, and up to `max_bytes` of each local file."""

    def __init__(self, source: Source, places: Sequence[str], max_bytes: int | None = None) -> None:
        self._source = source
        self.places = places
        self._max_bytes = max_bytes

    def __getattr__(self, name: str) -> Any:
        """Return an optional attribute of the source, such as `skipped`."""
        return getattr(self._source, name)

    def describe(self) -> Mapping[str, Any]:
        """Return what the source says."""
        return self._source.describe()

    def samples(self) -> Iterator[Sample]:
        """Iterate over the samples of the source."""
        return self._source.samples()

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item; ItemError if it is elsewhere."""
        with restrict_reads(self.places, self._max_bytes):
            return self._source.read(item)


class RecordedSource:
    """The source that a cache recorded, as a place where the items of the cache's own samples are read.

    It is opened when the first item is read, so that texts, which are in the cache, need no source.
    """

    def __init__(self, description: Mapping[str, Any], index_digest: str) -> None:
        self._description = description
        self._index_digest = index_digest

    @cached_property
    def opened(self) -> Source:
        """The source itself; the errors are those of `reopen_source`."""
        return reopen_source(self._description, self._index_digest)

    @property
    def places(self) -> Sequence[str] | None:
        """Where its items are read; None: anywhere."""
        return getattr(self.opened, "places", None)

    def describe(self) -> Mapping[str, Any]:
        """Return what the cache recorded."""
        return self._description

    def samples(self) -> Iterator[Sample]:
        """Raise a SourceError: the samples are those of the cache."""
        raise SourceError(f"{self._description['path']}: expected a source of samples, got one of a cache's items")

    def read(self, item: FileItem) -> bytes:
        """Return the bytes of an item."""
        return self.opened.read(item)
