"""Pictures, captions and models of random weights: written into a folder, the same on every machine, no download."""

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from embedcache.sources import open_source

_IMAGENET = [f"imagenet_{number:02d}" for number in range(20)]


def write_pictures(path: Path, count: int, *, first: int = 0) -> Path:
    """Write a WebDataset tar of `count` JPEGs, numbered from `first`, each with a caption beside it.

    The pictures are the package foolbox's 20 of ImageNet (512 x 512 and larger) and one of iscc-samples: each time
    another crop, shorter side 256 to 512 px, quality 80 to 95, about 50 kB.
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
    """Make `count` distinct captions of 1 to 12 OpenMoji names each, in random order: 1 to about 60 words."""
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
    """Save a ViT-B/32 with random weights, and name the encoder that reads it."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model("vit_base_patch32_224").state_dict(), path)
    return f"timm:vit_base_patch32_224,weights={path}"


def save_open_clip(path: Path) -> str:
    """Save OpenCLIP's ViT-B-32 with random weights, and name the encoder that reads it."""
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
    share = rng.uniform(0.7, 1.0)
    left, top = rng.uniform(0, 1 - share, 2) * original.size
    scale = int(rng.integers(256, 513)) / (share * min(width, height))
    size = (round(share * width * scale), round(share * height * scale))
    box = (left, top, left + share * width, top + share * height)
    out = io.BytesIO()
    original.resize(size, Image.Resampling.BICUBIC, box=box).save(out, "JPEG", quality=int(rng.integers(80, 96)))
    return out.getvalue()
