"""A small cache with everything that is made of one, in which two samples have words that nothing else has."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from embedcache.dataset.selections import Selection, write_selection
from embedcache.derive.derive import derive
from embedcache.derive.rules import Derivation
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests.images import write_images
from tests.toy import IMAGE, TEXT

KEYS = ("00003-zebra", "00009-quagga")
CAPTIONS = ("a zebra on the savanna", "quagga standing alone")
FEATURES = ("cls", "patches", "mean", "tokens")


def write_source(folder: Path, count: int = 12) -> Path:
    """Write images and captions, two of them with names and words of their own."""
    write_images(folder, count)
    for key, caption in zip(KEYS, CAPTIONS, strict=True):
        shutil.move(folder / f"{key[:5]}.png", folder / f"{key}.png")
        (folder / f"{key[:5]}.txt").unlink()
        (folder / f"{key}.txt").write_text(caption)
    return folder


def make_cache(source: Path, cache: Path, **settings: object) -> Path:
    """Extract vectors, tokens and a view, and derive features by a rule that is fitted."""
    values = {"features": FEATURES, "chunk_size": 4, "views": ("flip",), **settings}
    extract(
        open_source(source),
        cache,
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        settings=ExtractSettings(**values),  # type: ignore[arg-type]
    )
    derive(cache, Derivation(name="small", inputs=[("image", "open_toy/cls")], rule="pca", parameters={"width": 4}))
    return cache


def make_index(cache: Path, index: Path, factory: str = "Flat") -> Path:
    build_index(cache, index, IndexSettings(feature="open_toy/cls", factory=factory, min_recall=0.0))
    return index


def make_selection(cache: Path, path: Path) -> Path:
    opened = Cache(cache)
    rows = np.arange(opened.info.num_samples)
    write_selection(path, opened, Selection(rows=rows), {"method": "all"})
    return path


def contents_of(cache: Path) -> dict[str, list[bytes]]:
    """Return what identifies the two samples: keys, captions, and the bytes of each of their features, by name."""
    opened = Cache(cache)
    samples = [row for row, key in enumerate(opened.column("key").to_pylist()) if key in KEYS]
    found = {"key": [key.encode() for key in KEYS], "caption": [text.encode() for text in CAPTIONS]}
    for modality in opened.info.num_items:
        of_items = opened.items(modality)["sample"].to_numpy()
        for feature in opened.features(modality):
            rows = np.flatnonzero(np.isin(of_items, samples))
            items = feature.gather_tokens(rows)
            found[f"{modality}/{feature.name}"] = [item.tobytes() for item in items]
            found[f"{modality}/{feature.name} as float32"] = [
                (item / np.linalg.norm(item.astype(np.float32))).astype(np.float32).tobytes()
                for item in items
                if item.ndim == 1
            ]
    return found


def traces(folder: Path, contents: dict[str, list[bytes]]) -> Iterator[tuple[str, str]]:
    """Iterate over files below a folder, and what of the samples is in their bytes, tables or names."""
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if data.startswith(b"PAR1"):  # whose pages are compressed
            data += repr(pq.read_table(path).to_pydict()).encode()
        for name, values in contents.items():
            if any(value in data or value in str(path).encode() for value in values):
                yield str(path.relative_to(folder)), name
