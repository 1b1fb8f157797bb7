"""Another source with one caption a sample, so that captions can be chosen one by one."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from embedcache.errors import SourceError
from embedcache.sources.contract import ImageItem, Sample, Source
from embedcache.sources.settings import SourceSettings


class PairsSource:
    """The samples of another source, a sample for each caption with all of the images.

    The key is that of the sample, `#` and the caption's number from 0; the column `sample` keeps the former, `language`
    is the caption's. A sample without a caption is left out. Each of its images is encoded once a caption.

    Args:
        location: of the other source, as for `open_source`: `photos/`, `openmoji:en+de`.
        settings: those of the other source.

    Raises:
        SourceError: the other source is of the same kind.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        from embedcache.sources.open import open_source  # which imports this

        if location.startswith("pairs:"):
            raise SourceError(f"{location} has one caption a sample already; leave one pairs: out")
        self._source: Source = open_source(location, settings=settings)

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it."""
        said = self._source.describe()
        return {**said, "type": "pairs", "path": f"{said['type']}:{said['path']}"}

    def samples(self) -> Iterator[Sample]:
        """Go through the captions, in the order of the samples."""
        for sample in self._source.samples():
            for number, text in enumerate(sample.texts):
                columns = {**sample.columns, "sample": sample.key, "language": text.language}
                yield replace(sample, key=f"{sample.key}#{number}", texts=(text,), columns=columns)

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image."""
        return self._source.read(item)
