"""What a source is to the rest of the package."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

IMPORTED = "imported"
"""The kind of source that a cache of imported vectors records: nothing can be extracted from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageItem:
    """Where the bytes of one image are.

    Args:
        path: a file or shard, relative to the source's root where it lies below it.
        offset: first byte inside the file; the row for a table that holds the bytes itself.
        length: number of bytes; 0 where a table holds the bytes itself.
    """

    path: str
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextItem:
    """One caption and, where known, its language (an ISO 639-1 code)."""

    text: str
    language: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row of a dataset.

    Args:
        key: unique in the source and the same every time it is read.
        images: none or more.
        texts: none or more captions, each of them true of every image of the sample.
        columns: whatever else the source knows: `split`, `label`, … as JSON scalars.
    """

    key: str
    images: tuple[ImageItem, ...] = ()
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


class Source(Protocol):
    """Where raw samples come from."""

    def describe(self) -> Mapping[str, Any]:
        """Give what reopens it, as JSON: `type`, `path` and the settings. Goes into the cache."""
        ...

    def samples(self) -> Iterator[Sample]:
        """Go through all samples without opening an image, in an order that never changes.

        Raises:
            SourceError: the source cannot be numbered; the message names the file and the row.
        """
        ...

    def read(self, item: ImageItem) -> bytes:
        """Get the bytes of one image file. Safe to call from many threads at once.

        Raises:
            ItemError: they cannot be had; the text is the reason.
        """
        ...
