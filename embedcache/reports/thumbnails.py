"""Small pictures of a cache's images, as text that a page can hold.

Items as they are shown on a page: a small picture, or the text.
"""

import base64
import io

from embedcache.errors import EmbedcacheError
from embedcache.reports.base import Shown
from embedcache.sources.base import ImageItem
from embedcache.sources.images import decode_image
from embedcache.sources.open import reopen_source, source_credit
from embedcache.store.cache import Cache

_SIZE_PX = 88


def credit(cache: Cache) -> str:
    """Return the attribution that pages showing the cache's images must carry, or an empty text."""
    return source_credit(cache.info.source)


class Pictures:
    """Reads images again from the source that a cache was made from.

    Args:
        cache: the cache.
    """

    def __init__(self, cache: Cache) -> None:
        self._source = reopen_source(cache.info.source)
        self._items = cache.items("image").drop_columns("sample")
        self._urls: dict[int, str] = {}

    def data_url(self, row: int) -> str:
        """Get a thumbnail of the image in a row as a `data:` URL."""
        if row not in self._urls:
            data = self.webp(row, _SIZE_PX)
            self._urls[row] = "data:image/webp;base64," + base64.b64encode(data).decode()
        return self._urls[row]

    def webp(self, row: int, size_px: int) -> bytes:
        """Get the image in a row as a WebP file that fits a square of that size. Safe from many threads.

        Raises:
            ItemError: it cannot be read; the text is the reason.
        """
        item = ImageItem(**self._items.slice(row, 1).to_pylist()[0])
        image = decode_image(self._source.read(item))
        image.thumbnail((size_px, size_px))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


class Showing:
    """Shows items of one modality of a cache; an image whose file cannot be read is its key.

    Args:
        cache: the cache.
        modality: `image` or `text`.
    """

    def __init__(self, cache: Cache, modality: str) -> None:
        self._keys = cache.samples["key"]
        self._samples = cache.items(modality)["sample"]
        self._texts = cache.items("text")["text"] if modality == "text" else None
        self._pictures: Pictures | None = None
        self.missing: str | None = None
        """Why pictures are missing, where some are."""
        if modality == "image":
            try:
                self._pictures = Pictures(cache)
            except EmbedcacheError as error:
                self.missing = str(error)

    def item(self, row: int) -> Shown:
        """Show the item in a row."""
        if self._texts is not None:
            return Shown(text=self._texts[row].as_py())
        return Shown(text=self._keys[self._samples[row].as_py()].as_py(), picture=self._picture(row))

    def warnings(self) -> list[str]:
        """Say what is missing."""
        return [f"pictures are missing: {self.missing}"] if self.missing else []

    def _picture(self, row: int) -> str | None:
        if self._pictures is None:
            return None
        try:
            return self._pictures.data_url(row)
        except EmbedcacheError as error:
            self.missing = str(error)
            return None
