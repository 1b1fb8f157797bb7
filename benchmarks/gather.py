"""Random and block-wise rows of a cached feature: 200,000 x 768 float16, warm, one process.

The floor is one NumPy map over one file of the same rows; the peer is zarr-python over the very same chunks.
"""

import tempfile
from itertools import cycle
from pathlib import Path

import numpy as np
import zarr

from benchmarks.measure import median_seconds, show
from embedcache.store.feature import Feature
from embedcache.store.group import create_group
from embedcache.store.layout import CacheInfo
from embedcache.store.writer import add_feature, commit_chunk
from embedcache.train.batches import shuffle_blocks

ROWS, WIDTH, BATCH, BLOCK = 200_000, 768, 4096, 64


def main(*, quick: bool) -> None:
    """Print rows per second."""
    with tempfile.TemporaryDirectory() as folder:
        values = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32).astype(np.float16)
        feature = _write(Path(folder), values)
        np.save(Path(folder) / "floor.npy", values)
        floor = np.asarray(np.load(Path(folder) / "floor.npy", mmap_mode="r"))
        array = zarr.open_array(feature.group.path / "f", mode="r")
        rng = np.random.default_rng(1)
        shuffled = shuffle_blocks(ROWS, BLOCK, rng)
        orders = {
            "random rows": [_rows(rng, 1) for _ in range(50)],
            f"blocks of {BLOCK} rows": [_rows(rng, BLOCK) for _ in range(50)],
            "the loader's order of mapped features": [
                shuffled[start : start + BATCH] for start in range(0, ROWS - BATCH, BATCH)
            ],
        }
        for title, order in orders.items():
            batches = cycle(order)
            readers = {
                "one NumPy map": lambda batches=batches: floor[next(batches)],
                "Feature.gather": lambda batches=batches: feature.gather(next(batches)),
            }
            rates = [(name, BATCH / median_seconds(call, repeats=50)) for name, call in readers.items()]
            peer = median_seconds(lambda batches=batches: array.oindex[np.unique(next(batches))], repeats=2)  # type: ignore[misc]
            show(title, "rows/s", [*rates, ("zarr-python", BATCH / peer)])


def _rows(rng: np.random.Generator, block: int) -> np.ndarray:
    starts = rng.permutation(ROWS // block)[: BATCH // block] * block
    return (starts[:, None] + np.arange(block)).ravel()


def _write(path: Path, values: np.ndarray) -> Feature:
    fingerprint = {"family": "random"}
    info = CacheInfo(chunk_size=2048, source={}, index_digest="", num_samples=ROWS, num_items={"image": ROWS})
    group = create_group(path, "image", "random", info, spec="random:r", fingerprint=fingerprint)
    add_feature(group, "f", (WIDTH,), "float16")
    for chunk in range(info.num_chunks("image")):
        items = list(values[info.chunk_rows("image", chunk)])
        none = [None] * len(items)
        commit_chunk(group, chunk, {"f": items}, none, {"f": none})
    return Feature(group, "f")
