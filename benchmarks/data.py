"""Data of the benchmarks, the same on every machine without a download: images, captions, random models and caches."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Array, Floats
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.sources import open_source
from embedcache.store.feature import create_group
from embedcache.store.indexing import index
from embedcache.store.writer import add_feature, commit_chunk

_IMAGENET = [f"imagenet_{number:02d}" for number in range(20)]


def write_images(path: Path, count: int, *, first: int = 0) -> Path:
    """Write a WebDataset tar of `count` JPEGs with captions, numbered from `first`.

    They are random crops of foolbox's 20 images of ImageNet (512 x 512 and larger) and one of iscc-samples: shorter
    side 256 to 512 px, quality 80 to 95, about 50 kB.
    """
    originals, numbers = list(_originals()), range(first, first + count)
    captions = write_captions(first + count)[first:]
    with tarfile.open(path, "w") as tar, ThreadPoolExecutor(os.cpu_count()) as executor:
        jpegs = executor.map(lambda number: _variation(originals[number % len(originals)], number), numbers)
        for number, jpeg, caption in zip(numbers, jpegs, captions, strict=True):
            add_member(tar, f"{number:07d}.jpg", jpeg)
            add_member(tar, f"{number:07d}.txt", caption.encode())
    return path


def write_captions(count: int) -> list[str]:
    """Return `count` distinct captions of 1 to 12 OpenMoji names each, in random order: 1 to about 60 words."""
    names = [text.text for sample in open_source("openmoji:en").samples() for text in sample.texts]
    rng = np.random.default_rng(0)
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[", ".join(rng.choice(names, rng.integers(1, 13)))] = None
    return list(captions)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one file to a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def save_vit(path: Path) -> str:
    """Save a ViT-B/32 with random weights, and return the encoder that reads it."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model("vit_base_patch32_224").state_dict(), path)
    return f"timm:vit_base_patch32_224,weights={path}"


def save_open_clip(path: Path) -> str:
    """Save OpenCLIP's ViT-B-32 with random weights, and return the encoder that reads it."""
    import open_clip
    import torch

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), path)
    return f"open_clip:ViT-B-32,pretrained={path}"


def _originals() -> Iterator[Image.Image]:
    import iscc_samples

    for name in _IMAGENET:
        path = next(file for file in files("foolbox.data").iterdir() if file.name.startswith(name))
        yield Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    yield Image.open(next(path for path in iscc_samples.images() if path.suffix == ".jpg")).convert("RGB")


def _variation(original: Image.Image, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    width, height = original.size
    fraction = rng.uniform(0.7, 1.0)
    left, top = rng.uniform(0, 1 - fraction, 2) * original.size
    scale = int(rng.integers(256, 513)) / (fraction * min(width, height))
    size = (round(fraction * width * scale), round(fraction * height * scale))
    box = (left, top, left + fraction * width, top + fraction * height)
    out = io.BytesIO()
    original.resize(size, Image.Resampling.BICUBIC, box=box).save(out, "JPEG", quality=int(rng.integers(80, 96)))
    return out.getvalue()


@dataclass(frozen=True, kw_only=True)
class RandomSource:
    """A source of samples without bytes; without images they are classes."""

    num_samples: int
    num_captions: int = 0
    num_classes: int = 0
    has_image: bool = True

    def describe(self) -> Mapping[str, Any]:
        return {"type": "made", "path": str(self), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for row in range(self.num_samples):
            columns = {"label": row % self.num_classes} if self.num_classes else {}
            if not self.has_image:
                columns = {"class": f"class {row}", "label": row}
            yield Sample(
                key=f"{row:07}",
                images=(FileItem(path=f"{row:07}.jpg"),) if self.has_image else (),
                texts=tuple(TextItem(text=f"{row} {number}") for number in range(self.num_captions)),
                columns=columns,
            )

    def read(self, item: FileItem) -> bytes:
        return item.path.encode()


DrawVectors = Callable[[np.random.Generator, range], Array]
"""Function that returns the vectors of a range of rows: (B, D)."""


def write_random_cache(
    path: Path, source: RandomSource, width: int, *, seed: int, draw: DrawVectors | None = None
) -> Path:
    """Index the samples and write random vectors as features; without `draw` they are normally distributed."""
    info = index(source, path)
    rng = np.random.default_rng(seed)
    draw = draw or (lambda rng, rows: rng.standard_normal((len(rows), width), np.float32))
    for modality in [name for name, count in info.num_items.items() if count]:
        group = create_group(path, modality, "made", info, spec="imported:made", fingerprint={"family": "imported"})
        add_feature(group, "vector", (width,), "float16")
        for chunk in range(info.num_chunks(modality)):
            rows = info.chunk_rows(modality, chunk)
            vectors = draw(rng, range(rows.start, rows.stop)).astype(np.float16)
            hashes = [f"{seed} {row}".encode().ljust(16) for row in range(rows.start, rows.stop)]
            commit_chunk(group, chunk, {"vector": list(vectors)}, hashes, {"vector": [None] * len(vectors)})
    return path


_CLUSTERS = 2000
_DIRECTIONS = 64
"""Dimensions in which vectors of a cluster differ, as real features do not fill their width."""


def write_clusters(path: Path, count: int, width: int) -> Path:
    """Write a cache of the images 0 to `count`, whose features are `cluster_vectors`."""
    source = RandomSource(num_samples=count)
    return write_random_cache(path, source, width, seed=0, draw=lambda _, rows: cluster_vectors(rows, width))


def cluster_vectors(numbers: Sequence[int], width: int) -> Floats:
    """Compute vectors number N of a fixed set of vectors in clusters, of length about 1.4: (B, D) float32."""
    tables = np.random.default_rng(0)
    centers_CD = tables.standard_normal((_CLUSTERS, width), np.float32) / np.float32(np.sqrt(width))
    directions_RD = tables.standard_normal((_DIRECTIONS, width), np.float32) / np.float32(np.sqrt(_DIRECTIONS * width))

    generators = [np.random.default_rng(number) for number in numbers]
    clusters_B = np.array([rng.integers(_CLUSTERS) for rng in generators])
    offsets_BR = np.stack([rng.standard_normal(_DIRECTIONS, np.float32) for rng in generators])
    vectors_BD: Floats = centers_CD[clusters_B] + offsets_BR @ directions_RD
    return vectors_BD
