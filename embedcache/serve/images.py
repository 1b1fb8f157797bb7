"""Images of a cache by row, decoded and encoded again: no byte of a source's file reaches a browser."""

import pwd
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from embedcache.errors import PathError
from embedcache.registry import has_trust
from embedcache.reports.thumbnails import Thumbnails
from embedcache.sources.base import IMPORTED
from embedcache.sources.files import SHARD_SEPARATOR, restrict_reads
from embedcache.sources.open import SOURCES, base_source
from embedcache.sources.webdataset import shard_root
from embedcache.store.cache import Cache

_THUMBNAIL_PX = 224
_IMAGE_PX = 1280
_NUM_CACHED_THUMBNAILS = 4096  # about 6 kB each
_FIRST_PERSON = 1000  # users with smaller numbers are services
_NAME = "; name a folder of images with --image-folder, or use --trust if you trust the cache"


class ServedImages:
    """Images of a possibly untrusted cache, read only from files in some folders, after following links.

    `image` and `thumbnail` return the image in a row as a WebP file; both are thread-safe. Within `trust_files`, images
    are read wherever the cache says that they are.

    Args:
        cache: the cache.
        folders: folders that the operator allows; empty: the folder of the cache's source, see `source_folders`.

    Raises:
        PathError: the source's files no longer exist; or it is remote, a custom class or too large a folder, and the
            cache is not trusted.
    """

    def __init__(self, cache: Cache, folders: Sequence[Path] = ()) -> None:
        self.num_images = cache.info.num_items.get("image", 0)
        self.folders = None if has_trust() else folders or source_folders(cache)
        with self._restricted():
            self._thumbnails = Thumbnails(cache)
        self.thumbnail = lru_cache(maxsize=_NUM_CACHED_THUMBNAILS)(partial(self._webp, size_px=_THUMBNAIL_PX))
        self.image = partial(self._webp, size_px=_IMAGE_PX)

    def _restricted(self) -> AbstractContextManager[None]:
        return nullcontext() if self.folders is None else restrict_reads(self.folders)

    def _webp(self, row: int, *, size_px: int) -> bytes:
        with self._restricted():
            return self._thumbnails.webp(row, size_px)


def source_folders(cache: Cache) -> list[Path]:
    """Return the folders that hold the files of a cache's source; empty if it has no files.

    The cache says where they are, so a folder that holds more than images is rejected: the root, a home or a folder
    above it, and one that holds the cache.
    """
    folders = _recorded_folders(cache.info.source)
    for folder in folders:
        held = _held_by(folder.resolve(), cache)
        if held is not None:
            raise PathError(
                f"images are not shown: the cache says that they are in {folder}, which holds {held}{_NAME}"
            )
    return folders


def _held_by(folder: Path, cache: Cache) -> str | None:
    """Return what a folder holds besides images, if anything."""
    if folder == Path(folder.anchor):
        return "all files of this machine"
    if any(home.is_relative_to(folder) for home in (Path.home().resolve(), *_homes())):
        return "a home"
    return "the cache" if cache.path.resolve().is_relative_to(folder) else None


def _homes() -> Iterator[Path]:
    """Iterate over the homes of people, and of the administrator; those of services are folders of the system."""
    return (Path(user.pw_dir) for user in pwd.getpwall() if user.pw_uid == 0 or user.pw_uid >= _FIRST_PERSON)


def _recorded_folders(source: Mapping[str, Any]) -> list[Path]:
    kind, location = base_source(source)
    if kind not in SOURCES.paths and kind != IMPORTED:
        raise PathError(
            f"images are not shown: the cache names the source class {kind!r}, which is custom code; if you trust the "
            "cache, use --trust"
        )
    if kind == "openmoji":
        return []
    if "://" in location:
        raise PathError(f"images are not shown: the cache says that they are at {location}{_NAME}")
    if kind == "huggingface" and not Path(location).exists():
        raise PathError(f"images are not shown: {location} is not a folder of this machine{_NAME}")
    if kind == "webdataset":
        return [shard_root(shard) for shard in location.split(SHARD_SEPARATOR)]
    path = Path(location)
    return [path if path.is_dir() else path.parent]
