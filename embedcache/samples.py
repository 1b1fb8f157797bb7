"""Samples with items of any modality, the protocol of their sources, and what a cache records of its source."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

Scalar: TypeAlias = str | int | float | bool | None
"""A value that fits a column of the sample table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileItem:
    """Location of the bytes of one item: an image, a recording, a video or a point cloud.

    Args:
        path: file or shard, relative to the root of the source if it lies below it; of a table that stores the bytes
            itself, followed by `#` and the column.
        offset: first byte within the file; the row if a table stores the bytes themselves.
        length: number of bytes; 0 if unknown or if a table stores the bytes themselves.
        start_s: start of an interval of a recording or video, in seconds; None for its beginning.
        stop_s: end of the interval; None for its end.
    """

    path: str
    offset: int = 0
    length: int = 0
    start_s: float | None = None
    stop_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextItem:
    """One caption and its language (ISO 639-1 code), if known."""

    text: str
    language: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One row of a dataset.

    Args:
        key: unique within the source and the same every time the source is read.
        images: any number of images.
        texts: any number of captions, each describing all other items of the sample.
        columns: other columns of the source, such as `split` and `label`.
        files: items of the other modalities: `audio`, `video`, `points`.
    """

    key: str
    images: tuple[FileItem, ...] = ()
    texts: tuple[TextItem, ...] = ()
    columns: Mapping[str, Scalar] = field(default_factory=dict)
    files: Mapping[str, tuple[FileItem, ...]] = field(default_factory=dict)

    def items_in_files(self, modality: str) -> tuple[FileItem, ...]:
        """Return the items of a modality other than `text`."""
        return self.images if modality == "image" else self.files.get(modality, ())


@runtime_checkable
class Source(Protocol):
    """Where raw samples come from.

    A plug-in is a class called with a location and `SourceSettings`. It may have these attributes:

    - `credit`, of the class: the attribution that every page showing its images must carry;
    - `items_are_files`, of the class: whether the path of an item is that of a file, absolute or relative to the
      location, or to its folder if it is a file; exports then name the whole path;
    - `skipped`: a count per kind of file that the last pass over the samples left out, reported after indexing.
    """

    def describe(self) -> Mapping[str, Any]:
        """Return what reopens the source: `type` and `path`, which are texts, and `settings`. The cache records it.

        Paths are absolute, as a cache may be opened from any folder.
        """

    def samples(self) -> Iterator[Sample]:
        """Iterate over all samples, in an order that never changes, without reading their files.

        Raises:
            SourceError: the samples cannot be listed; the message names the file and the row.
        """

    def read(self, item: FileItem) -> bytes:
        """Read the bytes of one file, the whole file also for an interval. Thread-safe.

        Raises:
            ItemError: it cannot be read; the message is the reason.
        """


IMPORTED_SOURCE = "imported"
"""Type of the source that a cache of imported vectors records. It has no samples."""

MERGED = "merged"
"""Type of the source that a cache records which was merged from caches of several sources. It has no samples."""

PARTS = "parts"
"""Key in the description of a merged source: the descriptions of its parts."""
