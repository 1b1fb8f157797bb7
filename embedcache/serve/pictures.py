"""The pictures of a cache by row, decoded and written anew: no byte of a source's file reaches a browser."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from embedcache.errors import PathError
from embedcache.reports.thumbnails import Thumbnails
from embedcache.sources.base import IMPORTED
from embedcache.sources.files import SHARD_SEPARATOR, restrict_reads
from embedcache.sources.open import SOURCES, base_source
from embedcache.sources.webdataset import shard_root
from embedcache.store.cache import Cache

THUMBNAIL_PX = 224
PICTURE_PX = 1280
_KEPT_THUMBNAILS = 4096  # some 6 kB each

_TRUST = "; where you trust the cache, give --trust-cache"


class ServedPictures:
    """Reads pictures of a cache that may be a stranger's: only from files in its source's folder, links followed.

    Args:
        cache: the cache.
        trusts_cache: read them wherever it says.

    Raises:
        PathError: the source's files are gone, or it is elsewhere, or of a kind of one's own, and is not trusted.
    """

    def __init__(self, cache: Cache, *, trusts_cache: bool) -> None:
        self.num = cache.info.num_items.get("image", 0)
        self.folders = None if trusts_cache else source_folders(cache.info.source)
        if self.folders is None:
            self._pictures = Thumbnails(cache)
        else:
            with restrict_reads(self.folders):
                self._pictures = Thumbnails(cache)
        self.thumbnail = lru_cache(maxsize=_KEPT_THUMBNAILS)(self._thumbnail)

    def picture(self, row: int) -> bytes:
        """Get the image in a row as a WebP file of at most 1,280 pixels a side. Safe from many threads.

        Raises:
            ItemError: it cannot be read.
        """
        return self._webp(row, PICTURE_PX)

    def _thumbnail(self, row: int) -> bytes:
        return self._webp(row, THUMBNAIL_PX)

    def _webp(self, row: int, size_px: int) -> bytes:
        if self.folders is None:
            return self._pictures.webp(row, size_px)
        with restrict_reads(self.folders):
            return self._pictures.webp(row, size_px)


def source_folders(source: Mapping[str, Any]) -> list[Path]:
    """Get the folders that a source's files lie in, from what a cache says of it; none where it has no files.

    Raises:
        PathError: a source that is elsewhere, or of a kind of one's own.
    """
    kind, location = base_source(source)
    if kind not in SOURCES.paths and kind != IMPORTED:
        raise PathError(
            f"pictures are not shown: the cache says that {kind!r} reads them, which is code of its own{_TRUST}"
        )
    if kind == "openmoji":
        return []
    if "://" in location:
        raise PathError(f"pictures are not shown: the cache says that they are at {location}{_TRUST}")
    parts = location.split(SHARD_SEPARATOR) if kind == "webdataset" else [location]
    if kind == "huggingface" and not Path(location).exists():
        raise PathError(f"pictures are not shown: {location} is no folder of this machine{_TRUST}")
    return [_folder(kind, part) for part in parts]


def _folder(kind: str, location: str) -> Path:
    if kind == "webdataset":
        return shard_root(location)
    path = Path(location)
    return path if path.is_dir() else path.parent
