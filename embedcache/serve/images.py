"""Images of a cache by row, decoded and encoded again: no byte of a source's file reaches a browser."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

from embedcache.dataset.thumbnails import Thumbnails
from embedcache.store.cache import Cache

_THUMBNAIL_PX = 224
_IMAGE_PX = 1280
_NUM_CACHED_THUMBNAILS = 4096  # about 6 kB each


class ServedImages:
    """Images of a possibly untrusted cache; arguments and errors are those of `Thumbnails`.

    `image` and `thumbnail` return the image in a row as a WebP file; both are thread-safe.
    """

    def __init__(self, cache: Cache, folders: Sequence[Path] = ()) -> None:
        self.num_images = cache.info.num_items.get("image", 0)
        thumbnails = Thumbnails(cache, folders)
        self.folders = thumbnails.folders
        self.thumbnail = lru_cache(maxsize=_NUM_CACHED_THUMBNAILS)(partial(thumbnails.webp, size_px=_THUMBNAIL_PX))
        self.image = partial(thumbnails.webp, size_px=_IMAGE_PX)
