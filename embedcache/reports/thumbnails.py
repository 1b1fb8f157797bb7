"""Small images of a cache, read again from its source, and items as they are shown on a page."""

import base64
import io

import numpy as np

from embedcache.errors import EmbedcacheError
from embedcache.reports.base import PageItem
from embedcache.sources.base import FileItem
from embedcache.sources.images import decode_image
from embedcache.sources.open import reopen_source, source_credit
from embedcache.store.cache import Cache
from embedcache.store.rows import RowReader
from embedcache.store.tables import ITEM_SCHEMAS

_SIZE_PX = 88


def credit(cache: Cache) -> str:
    """Return the attribution that must be shown with the images of a cache; empty if none is required."""
    return source_credit(cache.info.source)


class Thumbnails:
    """Small images, read again from the source of a cache if it can be opened again."""

    def __init__(self, cache: Cache) -> None:
        self._source = reopen_source(cache.info.source)
        self._items = RowReader(cache, "image", [name for name in ITEM_SCHEMAS["image"].names if name != "sample"])
        self._urls: dict[int, str] = {}

    def data_url(self, row: int) -> str:
        """Return a thumbnail of the image in a row as a `data:` URL; raise an ItemError with the reason if it fails."""
        if row not in self._urls:
            data = self.webp(row, _SIZE_PX)
            self._urls[row] = "data:image/webp;base64," + base64.b64encode(data).decode()
        return self._urls[row]

    def webp(self, row: int, size_px: int) -> bytes:
        """Return the image in a row as a WebP file that fits into a square of `size_px`. Thread-safe."""
        item = FileItem(**self._items.take(np.array([row])).to_pylist()[0])
        image = decode_image(self._source.read(item))
        image.thumbnail((size_px, size_px))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


class ItemRenderer:
    """Renderer of items of one modality for a page; an image that cannot be read is represented by its sample's key."""

    def __init__(self, cache: Cache, modality: str) -> None:
        self._cache, self._is_text = cache, modality == "text"
        self._items = RowReader(cache, modality, ["text" if modality == "text" else "sample"])
        self._thumbnails: Thumbnails | None = None
        self._missing: str | None = None
        if modality == "image":
            try:
                self._thumbnails = Thumbnails(cache)
            except EmbedcacheError as error:
                self._missing = str(error)

    def render(self, row: int, *, is_correct: bool = False) -> PageItem:
        """Return the item in a row as it is shown on a page."""
        value = self._items.take(np.array([row]))[0][0].as_py()
        if self._is_text:
            return PageItem(text=value, is_correct=is_correct)
        image_url = None
        try:
            image_url = None if self._thumbnails is None else self._thumbnails.data_url(row)
        except EmbedcacheError as error:
            self._missing = str(error)
        return PageItem(text=self._cache.key(value), image_url=image_url, is_correct=is_correct)

    def warnings(self) -> list[str]:
        """Return why images are missing from the page, if any are."""
        return [f"some images cannot be shown: {self._missing}"] if self._missing else []
