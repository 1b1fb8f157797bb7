"""Raw samples in: where they come from, in which order, and the bytes of each image."""

from embedcache.sources.base import ImageItem, Sample, Source, TextItem
from embedcache.sources.open import SOURCES, open_source, reopen_source
from embedcache.sources.settings import SourceSettings

__all__ = [
    "SOURCES",
    "ImageItem",
    "Sample",
    "Source",
    "SourceSettings",
    "TextItem",
    "open_source",
    "reopen_source",
]
