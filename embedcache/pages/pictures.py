"""Small pictures of a cache's images, as text that a page can hold."""

import base64
import io

from embedcache.cache.cache import Cache
from embedcache.sources.contract import ImageItem
from embedcache.sources.media import decode_image
from embedcache.sources.open import reopen_source
from embedcache.sources.openmoji import CREDIT

_SIZE_PX = 88


def credit(cache: Cache) -> str:
    """Say whose the pictures are, where whatever shows them must."""
    return CREDIT if cache.info.source["type"] == "openmoji" else ""


class Pictures:
    """Reads images again from the source that a cache was made from.

    Args:
        cache: the cache.
        size_px: of the longer side, at most.
    """

    def __init__(self, cache: Cache, *, size_px: int = _SIZE_PX) -> None:
        self._size_px = size_px
        self._source = reopen_source(cache.info.source)
        self._items = cache.items("image").drop_columns("sample")
        self._urls: dict[int, str] = {}

    def data_url(self, row: int) -> str:
        """Get a thumbnail of the image in a row as a `data:` URL."""
        if row not in self._urls:
            self._urls[row] = "data:image/webp;base64," + base64.b64encode(self.webp(row)).decode()
        return self._urls[row]

    def webp(self, row: int) -> bytes:
        """Make a thumbnail of the image in a row: the bytes of a WebP file.

        Raises:
            ItemError: the image cannot be read.
        """
        item = ImageItem(**self._items.slice(row, 1).to_pylist()[0])
        image = decode_image(self._source.read(item))
        image.thumbnail((self._size_px, self._size_px))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()
