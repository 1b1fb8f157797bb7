"""Images of a cache by row, decoded and encoded again: no byte of a source's file reaches a browser."""

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
IMAGE_PX = 1280
_NUM_CACHED_THUMBNAILS = 4096  # about 6 kB each

_TRUST = "; if you trust the cache, use --trust-cache"


class ServedImages:
    """Reads images of a possibly untrusted cache: only from files in its source's folder, after following links.

    Args:
        cache: cache with images.
        trust_cache: read images from anywhere the cache names.

    Raises:
        PathError: the source's files no longer exist; or it is remote or a custom class, and not trusted.
    """

    def __init__(self, cache: Cache, *, trust_cache: bool) -> None:
        self.num_images = cache.info.num_items.get("image", 0)
        self.folders = None if trust_cache else source_folders(cache.info.source)
        if self.folders is None:
            self._thumbnails = Thumbnails(cache)
        else:
            with restrict_reads(self.folders):
                self._thumbnails = Thumbnails(cache)
        self.thumbnail = lru_cache(maxsize=_NUM_CACHED_THUMBNAILS)(self._thumbnail)

    def image(self, row: int) -> bytes:
        """Return the image in a row as a WebP file of at most 1,280 pixels per side. Thread-safe.

        Raises:
            ItemError: the image cannot be read.
        """
        return self._webp(row, IMAGE_PX)

    def _thumbnail(self, row: int) -> bytes:
        return self._webp(row, THUMBNAIL_PX)

    def _webp(self, row: int, size_px: int) -> bytes:
        if self.folders is None:
            return self._thumbnails.webp(row, size_px)
        with restrict_reads(self.folders):
            return self._thumbnails.webp(row, size_px)


def source_folders(source: Mapping[str, Any]) -> list[Path]:
    """Return the folders that hold a source's files, from its description in a cache; empty if it has no files.

    Raises:
        PathError: a remote source, or a custom class.
    """
    kind, location = base_source(source)
    if kind not in SOURCES.paths and kind != IMPORTED:
        raise PathError(
            f"images are not shown: the cache names the source class {kind!r}, which is custom code{_TRUST}"
        )
    if kind == "openmoji":
        return []
    if "://" in location:
        raise PathError(f"images are not shown: the cache says that they are at {location}{_TRUST}")
    parts = location.split(SHARD_SEPARATOR) if kind == "webdataset" else [location]
    if kind == "huggingface" and not Path(location).exists():
        raise PathError(f"images are not shown: {location} is not a folder of this machine{_TRUST}")
    return [_folder(kind, part) for part in parts]


def _folder(kind: str, location: str) -> Path:
    if kind == "webdataset":
        return shard_root(location)
    path = Path(location)
    return path if path.is_dir() else path.parent
