"""Folders of real image files with captions that say what is in them."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 210, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
PLACES = {"left": (0, 0, 16, 32), "right": (16, 0, 32, 32), "top": (0, 0, 32, 16), "bottom": (0, 16, 32, 32)}


def write_images(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Write `count` PNG files, a background with a bar, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        back, front = rng.choice(list(COLORS), 2, replace=False)
        place = rng.choice(list(PLACES))
        image = Image.new("RGB", (32, 32), COLORS[back])
        image.paste(COLORS[front], PLACES[place])
        noise = rng.integers(0, 12, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(np.maximum(np.asarray(image), 12) - noise).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(f"{front} bar {place} on {back}\n")
    return folder


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG of a kilobyte whose header states that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
