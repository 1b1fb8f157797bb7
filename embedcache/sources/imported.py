"""What is left of a source where vectors were imported: paths of images, if the import named some."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedcache.errors import ItemError, SourceError
from embedcache.sources.contract import ImageItem, Sample
from embedcache.sources.files import place_of, read_file
from embedcache.sources.settings import SourceSettings

KIND = "imported"


class ImportedSource:
    """Gives the images that an import named and that are there still; it has no samples to extract from.

    Args:
        location: what was imported.
        settings: none.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.allow_only(KIND)
        self._location = Path(location)
        self._root = self._location if self._location.is_dir() else self._location.parent

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        return {"type": KIND, "path": str(self._location), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        """Refuse: there are vectors, and nothing that an encoder could take.

        Raises:
            SourceError: always.
        """
        raise SourceError(
            f"{self._location} was imported: it has vectors, and no images or texts to encode; extract from the images "
            "and captions themselves"
        )

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of an image.

        Raises:
            ItemError: the import named no file, or it is not there.
        """
        if not item.path:
            raise ItemError("the import named no file of this image")
        return read_file(place_of(self._root, item.path))
