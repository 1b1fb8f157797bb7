"""Tiny files for the tests of sources."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embedcache.sources import Source
from embedcache.sources.open import open_below

COLORS = ("red", "green", "blue", "black", "white")


def reopen(description: Mapping[str, Any]) -> Source:
    """Open a source again that was described in this process, wherever it is."""
    return open_below(description, None)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(color: str = "red") -> bytes:
    """Return a JPEG of 20 x 10 pixels in one color."""
    return encode(Image.new("RGB", (20, 10), color))


def noise(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    """Return an image of deterministic noise."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write files, by path relative to the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    """Write a tar of plain files."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, *, row_group_size: int = 2, **columns: object) -> Path:
    """Write a Parquet file."""
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path
