"""Images of a cache by row, decoded and encoded again: no byte of a source's file reaches a browser."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from embedcache.errors import PathError
from embedcache.reports.thumbnails import Thumbnails
from embedcache.sources.base import IMPORTED
from embedcache.sources.files import SHARD_SEPARATOR, restrict_reads
from embedcache.sources.open import SOURCES, base_source
from embedcache.sources.webdataset import shard_root
from embedcache.store.cache import Cache

_THUMBNAIL_PX = 224
_IMAGE_PX = 1280
_NUM_CACHED_THUMBNAILS = 4096  # about 6 kB each

_TRUST = "; if you trust the cache, use --trust-cache"


class ServedImages:
    """Images of a possibly untrusted cache, read only from files in its source's folder, after following links.

    `image` and `thumbnail` return the image in a row as a WebP file; both are thread-safe.

    Raises:
        PathError: the source's files no longer exist; or it is remote or a custom class, and not trusted.
    """

    def __init__(self, cache: Cache, *, trust_cache: bool) -> None:
        self.num_images = cache.info.num_items.get("image", 0)
        self.folders = None if trust_cache else source_folders(cache.info.source)
        with self._restricted():
            self._thumbnails = Thumbnails(cache)
        self.thumbnail = lru_cache(maxsize=_NUM_CACHED_THUMBNAILS)(partial(self._webp, size_px=_THUMBNAIL_PX))
        self.image = partial(self._webp, size_px=_IMAGE_PX)

    def _restricted(self) -> AbstractContextManager[None]:
        return nullcontext() if self.folders is None else restrict_reads(self.folders)

    def _webp(self, row: int, *, size_px: int) -> bytes:
        with self._restricted():
            return self._thumbnails.webp(row, size_px)


def source_folders(source: Mapping[str, Any]) -> list[Path]:
    """Return the folders that hold a source's files, from its description in a cache; empty if it has no files."""
    kind, location = base_source(source)
    if kind not in SOURCES.paths and kind != IMPORTED:
        raise PathError(
            f"images are not shown: the cache names the source class {kind!r}, which is custom code{_TRUST}"
        )
    if kind == "openmoji":
        return []
    if "://" in location:
        raise PathError(f"images are not shown: the cache says that they are at {location}{_TRUST}")
    if kind == "huggingface" and not Path(location).exists():
        raise PathError(f"images are not shown: {location} is not a folder of this machine{_TRUST}")
    if kind == "webdataset":
        return [shard_root(shard) for shard in location.split(SHARD_SEPARATOR)]
    path = Path(location)
    return [path if path.is_dir() else path.parent]
