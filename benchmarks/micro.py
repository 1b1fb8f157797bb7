"""Four small ones: starting a command, rows of a cached feature, indexing a million samples, whole evaluations."""

import io
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import zarr
from PIL import Image

from benchmarks.data import RandomSource, add_member, write_random_cache
from benchmarks.measure import median_seconds, run_command, show
from embedcache.arrays import Ints
from embedcache.cli.console import print_table
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.train.batches import shuffle_blocks


def main(*, quick: bool) -> None:
    """Run all four."""
    for benchmark in (start, gather, indexing, evaluate):
        benchmark(quick=quick)


def start(*, quick: bool) -> None:
    """Print starts per second of `embedcache --help`, relative to those of Python alone."""
    commands = {"python -c pass": ["-c", "pass"], "embedcache --help": ["-m", "embedcache", "--help"]}
    rates = {}
    for name, words in commands.items():
        call = partial(subprocess.run, [sys.executable, *words], capture_output=True, check=True)
        rates[name] = 1 / median_seconds(call)
    show("start", "starts/s", rates)


ROWS, WIDTH, BATCH, BLOCK = 200_000, 768, 4096, 64


def gather(*, quick: bool) -> None:
    """Print random and block-wise rows per second of a cached feature, warm, in one process.

    The floor is one NumPy map over one file of the same rows; the peer is zarr-python over the very same chunks.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = Cache(write_random_cache(folder / "cache", RandomSource(num_samples=ROWS), WIDTH, seed=0))
        feature = cache.feature("image")
        np.save(folder / "floor.npy", feature.load())
        floor = np.asarray(np.load(folder / "floor.npy", mmap_mode="r"))
        array = zarr.open_array(feature.group.path / "vector", mode="r")

        rng = np.random.default_rng(1)
        shuffled = shuffle_blocks(ROWS, BLOCK, rng)
        orders = {
            "random rows": [_draw_rows(rng, 1) for _ in range(50)],
            f"blocks of {BLOCK} rows": [_draw_rows(rng, BLOCK) for _ in range(50)],
            "the loader's order": [shuffled[first : first + BATCH] for first in range(0, ROWS - BATCH, BATCH)],
        }
        for title, order in orders.items():
            batches = cycle(order)

            def read_sorted(batches: Iterator[Ints] = batches) -> object:
                return array.oindex[np.unique(next(batches))]

            seconds = {
                "one NumPy map": median_seconds(lambda b=batches: floor[next(b)], repeats=50),
                "Feature.gather": median_seconds(lambda b=batches: feature.gather(next(b)), repeats=50),
                "zarr-python": median_seconds(read_sorted, repeats=2),
            }
            show(title, "rows/s", {name: BATCH / second for name, second in seconds.items()})


def _draw_rows(rng: np.random.Generator, block: int) -> Ints:
    starts = rng.permutation(ROWS // block)[: BATCH // block] * block
    return (starts[:, None] + np.arange(block)).ravel()


SAMPLES_PER_TAR = 10_000


def indexing(*, quick: bool) -> None:
    """Print samples per second of indexing WebDataset tars, and of reading their headers alone, which is the floor."""
    num_tars = 2 if quick else 100
    count = num_tars * SAMPLES_PER_TAR
    with tempfile.TemporaryDirectory() as name:
        tars = Path(name) / "tars"
        tars.mkdir()
        image = io.BytesIO()
        Image.new("RGB", (8, 8), "white").save(image, "JPEG")
        for number in range(num_tars):
            with tarfile.open(tars / f"{number:05d}.tar", "w") as tar:
                for row in range(SAMPLES_PER_TAR):
                    key = f"{number:05d}{row:04d}"
                    add_member(tar, f"{key}.jpg", image.getvalue())
                    add_member(tar, f"{key}.txt", f"an image with the number {key}".encode())

        seconds = {}
        started = time.perf_counter()
        for _ in open_source(tars).samples():
            pass
        seconds["source alone"] = time.perf_counter() - started
        started = time.perf_counter()
        index(open_source(tars), Path(name) / "cache")
        seconds["index"] = time.perf_counter() - started
    show(f"{count:,} samples", "samples/s", {name: count / second for name, second in seconds.items()})


RUN_WIDTH, NUM_CLASSES, NUM_PROMPTS = 1024, 1000, 7


def evaluate(*, quick: bool) -> None:
    """Print seconds and memory of whole evaluations of a run in a fresh process; targets are 10 s and 2 GB.

    Zero-shot: 50,000 images, 1,000 classes of 7 prompts. Retrieval: 5,000 images with 5 captions each.
    """
    small, repeats = (10, 1) if quick else (1, 3)
    sources = {
        "pairs": RandomSource(num_samples=20_000 // small, num_captions=1),
        "images": RandomSource(num_samples=50_000 // small, num_classes=NUM_CLASSES),
        "prompts": RandomSource(num_samples=NUM_CLASSES, num_captions=NUM_PROMPTS, has_image=False),
        "captioned": RandomSource(num_samples=5_000 // small, num_captions=5),
    }
    training = f"train pairs run --projector mlp --shared-width {RUN_WIDTH} --epochs 0 --split key"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for seed, (cache, source) in enumerate(sources.items(), 1):
            write_random_cache(Path(name) / cache, source, RUN_WIDTH, seed=seed)
        run_command(["embedcache", *training.split()], folder=Path(name))

        for task in ("zero-shot images run --prompts prompts", "retrieval captioned run"):
            words = ["embedcache", "evaluate", *task.split()]
            runs = [run_command(words, folder=Path(name)) for _ in range(repeats)]
            seconds, peak_gb = np.median([run.seconds for run in runs]), max(run.peak_gb for run in runs)
            rows.append([task, f"{seconds:.1f}", f"{peak_gb:.2f}"])
    print_table(["evaluation", "seconds", "peak, GB"], rows)
