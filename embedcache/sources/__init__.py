"""Sources of raw samples: folders, tables, WebDataset shards, Hugging Face datasets, texts and prompts."""

from embedcache.modalities import FileItem, Sample, Source, TextItem
from embedcache.sources.open import SOURCES, SourceSettings, open_source, read_below, reopen_source

__all__ = [
    "SOURCES",
    "FileItem",
    "Sample",
    "Source",
    "SourceSettings",
    "TextItem",
    "open_source",
    "read_below",
    "reopen_source",
]
