"""Reopen the source that a cache recorded: the one place where files that a cache names are read.

A cache may be a stranger's, and says where its items are. They are read only below the folders and URLs that the user
named (`read_below`, which is what `--image-folder` is), and below those of the source if this user indexed the cache.
That is recorded outside of it (`remember`), where no stranger can write. `trust_files` lifts the rule.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from embedcache.errors import PathError, SourceError
from embedcache.files import is_url
from embedcache.provenance import digest
from embedcache.registry import has_trust, names_from
from embedcache.samples import IMPORTED_SOURCE, MERGED, FileItem, Sample, Source
from embedcache.sources.files import (
    JSON_SUFFIXES,
    MEDIA_SUFFIXES,
    SHARD_SEPARATOR,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    is_below,
    restrict_reads,
)
from embedcache.sources.open import (
    WITHOUT_LOCATION,
    MergedSource,
    merged_parts,
    open_source,
)
from embedcache.sources.settings import SourceSettings

_READ_BELOW = frozenset({"coco", "folder", "huggingface", "table", "webdataset", IMPORTED_SOURCE})
"""Kinds of sources that read their location, below it, and what their items name: nothing else."""

_FILE_SUFFIXES = JSON_SUFFIXES | TABLE_SUFFIXES | TAR_SUFFIXES | MEDIA_SUFFIXES["points"]
_NAMED: ContextVar[tuple[str, ...]] = ContextVar("named_places", default=())

_log = logging.getLogger(__name__)


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
        return MergedSource([_open(part) for part in merged_parts(description)], description)
    settings = SourceSettings.from_json(description.get("settings", {}))
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
        kind, path = str(part.get("type", "")), str(part.get("path", ""))
        locations = _locations(part)
        is_confined = kind in _READ_BELOW and locations and (kind != "huggingface" or Path(path).exists())
        if not (is_own or is_confined or kind in WITHOUT_LOCATION):
            raise PathError(
                f"the cache says that its source is {kind}:{path}, which may read and run anything, and you did not "
                "extract it on this machine; use --trust if you trust the cache"
            )
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
            is_file = PurePosixPath(location).suffix.lower() in _FILE_SUFFIXES
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
    for part in merged_parts(description):
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
