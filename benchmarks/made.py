"""Caches whose samples hold no bytes and whose features are drawn, not encoded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.sources.base import ImageItem, Sample, TextItem
from embedcache.store.group import add_feature, create_group
from embedcache.store.indexing import index
from embedcache.store.writer import commit_chunk

Draw = Callable[[np.random.Generator, range], Array]
"""Gives the vectors of a range of rows: (B, D)."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    num_samples: int
    num_captions: int = 0
    num_classes: int = 0
    has_image: bool = True


class Made:
    """A source of samples without any bytes; without images they are classes."""

    def __init__(self, num_samples: int, **shape: Any) -> None:
        self.shape = _Shape(num_samples=num_samples, **shape)

    def describe(self) -> Mapping[str, Any]:
        return {"type": "made", "path": str(self.shape), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for row in range(self.shape.num_samples):
            columns = {"label": row % self.shape.num_classes} if self.shape.num_classes else {}
            if not self.shape.has_image:
                columns = {"class": f"class {row}", "label": row}
            yield Sample(
                key=f"{row:07}",
                images=(ImageItem(path=f"{row:07}.jpg"),) if self.shape.has_image else (),
                texts=tuple(TextItem(text=f"{row} {number}") for number in range(self.shape.num_captions)),
                columns=columns,
            )

    def read(self, item: ImageItem) -> bytes:
        return item.path.encode()


def write_made(path: Path, source: Made, width: int, *, seed: int, draw: Draw | None = None) -> Path:
    """Number the samples, and write drawn vectors as what an encoder gave; None draws normal ones."""
    info = index(source, path)
    rng = np.random.default_rng(seed)
    draw = draw or (lambda rng, rows: rng.standard_normal((len(rows), width), np.float32))
    for modality in [name for name, count in info.num_items.items() if count]:
        group = create_group(path, modality, "made", info, spec="made:m", fingerprint={"family": "made"})
        add_feature(group, "vector", (width,), "float16")
        for chunk in range(info.num_chunks(modality)):
            rows = info.chunk_rows(modality, chunk)
            vectors = draw(rng, range(rows.start, rows.stop)).astype(np.float16)
            hashes = [f"{seed} {row}".encode().ljust(16) for row in range(rows.start, rows.stop)]
            commit_chunk(group, chunk, {"vector": list(vectors)}, hashes, {"vector": [None] * len(vectors)})
    return path
