"""Indexing a million samples of WebDataset tars: samples per second, and the peak memory of a separate process.

Each tar holds 10,000 samples, an image of a few hundred bytes and a caption, so that reading headers is all the work.
"""

import io
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from benchmarks.data import add_member
from embedcache.cli.console import print_line, print_table
from embedcache.records import peak_memory_bytes
from embedcache.sources import open_source
from embedcache.store.indexing import index

SAMPLES_PER_TAR = 10_000


def main(*, quick: bool) -> None:
    """Print samples per second."""
    num_tars = 2 if quick else 100
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        print_line(f"writing {num_tars * SAMPLES_PER_TAR:,} samples")
        write_tars(Path(folder) / "tars", num_tars)
        samples = executor.submit(_iterate, Path(folder) / "tars").result()
        whole, peak = executor.submit(_index, Path(folder) / "tars", Path(folder) / "cache").result()
    rates = [("source alone", samples), ("index", whole)]
    rows = [[name, f"{num_tars * SAMPLES_PER_TAR / seconds:,.0f}", f"{seconds:.1f}"] for name, seconds in rates]
    print_table([f"{num_tars * SAMPLES_PER_TAR:,} samples", "samples/s", "seconds"], rows)
    print_line(f"peak memory {peak / 1e9:.2f} GB")


def write_tars(folder: Path, num_tars: int) -> None:
    """Write tars of 10,000 samples, a tiny JPEG and a caption each."""
    folder.mkdir()
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(out, "JPEG")
    for number in range(num_tars):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for row in range(SAMPLES_PER_TAR):
                key = f"{number:05d}{row:04d}"
                add_member(tar, f"{key}.jpg", out.getvalue())
                add_member(tar, f"{key}.txt", f"an image with the number {key}".encode())


def _iterate(tars: Path) -> float:
    started = time.perf_counter()
    for _ in open_source(tars).samples():
        pass
    return time.perf_counter() - started


def _index(tars: Path, cache_path: Path) -> tuple[float, int]:
    started = time.perf_counter()
    index(open_source(tars), cache_path)
    return time.perf_counter() - started, peak_memory_bytes()
