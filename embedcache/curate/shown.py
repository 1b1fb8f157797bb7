"""Items as they are shown on a page: a small picture, or the text."""

from embedcache.cache.cache import Cache
from embedcache.errors import EmbedcacheError
from embedcache.pages.pictures import Pictures
from embedcache.pages.sections import Shown


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
