"""Copies by pixels: planted ones that `curate dedup` finds, and other pairs that it takes for the same picture.

python -m benchmarks copies                                          # OpenMoji, on which the limits were chosen
python -m benchmarks copies --folder /usr/share/tuxpaint/stamps      # Debian's tuxpaint-stamps-default

300 images drawn at random get five copies each. A pHash (the sign of 8 × 8 DCT coefficients of 32 × 32 gray pixels
against their median, as in ImageHash) is compared on the same pairs.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from scipy.fft import dctn

from benchmarks.measure import run_embedcache
from embedcache.arrays import Array, Bools
from embedcache.cli.console import print_line, print_table
from embedcache.curate.dedup import analyze
from embedcache.dataset.similar_pairs import SAME_PICTURE
from embedcache.sources import open_source
from embedcache.sources.images import decode_image

NUM_COPIED, PHASH_LIMITS = 300, (0, 4, 8)
COPIES: Mapping[str, Callable[[Image.Image, Path], None]] = {
    "png.png": lambda image, path: image.save(path, compress_level=1),
    "jpeg40.jpg": lambda image, path: image.save(path, quality=40),
    "half.png": lambda image, path: _resize(image, 0.5).save(path),
    "half-jpeg75.jpg": lambda image, path: _resize(image, 0.5).save(path, quality=75),
    "webp80.webp": lambda image, path: _resize(image, 1.5).save(path, quality=80),
}


def main(*, quick: bool, folder: str | None = None) -> None:
    """Print how many planted copies are found, and the other pairs."""
    with TemporaryDirectory() as name:
        work = Path(name)
        _plant(work / "images", folder, NUM_COPIED // (10 if quick else 1))
        words = ["extract", "images", "cache", "--image-encoder", "lite:efficientnet-lite0"]
        run_embedcache(words, folder=work, is_quiet=False)
        _report(work)


def _resize(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))


def _plant(out: Path, folder: str | None, num_copied: int) -> None:
    """Write the images as `NAME.png` and the copies of some as `NAME~KIND`."""
    out.mkdir()
    source = open_source(folder or "openmoji:en")
    files = [source.read(item) for sample in source.samples() for item in sample.images]
    copied = set(random.Random(0).sample(range(len(files)), num_copied))
    for number, data in enumerate(files):
        (out / f"{number:05}.png").write_bytes(data)
        for kind, save in COPIES.items() if number in copied else ():
            save(decode_image(data), out / f"{number:05}~{kind}")


def _phash(path: Path) -> Bools:
    gray = decode_image(path.read_bytes()).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(gray, np.float64))[:8, :8]
    return (low > np.median(low)).ravel()


def _report(work: Path) -> None:
    analysis = analyze(work / "cache")
    assert analysis.near is not None
    pairs = analysis.near.pairs
    keys = [analysis.cache.key(int(row)) for row in analysis.copies.unique_rows]
    names = np.array([key.partition("~")[0] for key in keys])
    kinds = np.array([key.partition("~")[2] for key in keys])
    paths = {path.stem: path for path in (work / "images").iterdir()}
    hashes = np.array([_phash(paths[key]) for key in keys])
    differences = (hashes[pairs.left] != hashes[pairs.right]).sum(axis=1)
    is_planted = (names[pairs.left] == names[pairs.right]) & ((kinds[pairs.left] == "") | (kinds[pairs.right] == ""))
    is_other = names[pairs.left] != names[pairs.right]
    print_line(f"{len(pairs.left):,} pairs from a cosine of {analysis.near.limit} on, {is_other.sum():,} of two images")
    rules: dict[str, Array] = {
        f"hash distance ≤ {SAME_PICTURE}": pairs.distances <= SAME_PICTURE,
        "cosine ≥ 0.95": pairs.cosines >= 0.95,
        **{f"pHash, bits ≤ {limit}": differences <= limit for limit in PHASH_LIMITS},
    }
    table = []
    for rule, mask in rules.items():
        row = [rule]
        for kind in (name.partition(".")[0] for name in COPIES):
            is_kind = is_planted & mask & ((kinds[pairs.left] == kind) | (kinds[pairs.right] == kind))
            row.append(f"{is_kind.sum() / (kinds == kind).sum():.3f}")
        wrong = np.flatnonzero(is_other & mask)
        ends = np.sort(np.stack([names[pairs.left[wrong]], names[pairs.right[wrong]]]), axis=0)
        found = np.unique(ends, axis=1)
        table.append([*row, f"{found.shape[1]:,}"])
        if rule.startswith("hash"):
            print_line("other pairs: " + ", ".join(f"{left} {right}" for left, right in found.T))
    print_table(["copies found by", *(name.partition(".")[0] for name in COPIES), "pairs of others"], table)
