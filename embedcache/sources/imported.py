"""The source that a cache of imported vectors records: nothing can be extracted from it."""

from collections.abc import Mapping
from typing import Any

IMPORTED_SOURCE = "imported"
"""Type of the source in the record of a cache of imported vectors."""


def how_to_import(source: Mapping[str, Any], modality: str) -> str:
    """Return how to get features of a modality beside those of an imported source, as nothing can be extracted."""
    form = str(source.get("format"))
    options = {
        "npy": f"--{modality}-file FILE{' --table FILE' if modality == 'text' else ''}",
        "parquet": f"--{modality}-vector-column NAME",
        "datacomp": f"--{modality}-array NAME",
        "clip-retrieval": f"a folder that has {'img' if modality == 'image' else 'text'}_emb too",
    }
    if modality not in ("image", "text") or form not in options:
        return "it was imported, and only vectors of images and texts are; extract them into a cache of its own"
    return f"import both into a new cache: embedcache import {form}, also with {options[form]}"
