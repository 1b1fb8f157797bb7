"""The made data of `python -m benchmarks scale`: tables, vectors, images, and caches of a stand-in encoder.

`python -m benchmarks.scale_data index` and `… write` are two of its steps.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from embedcache.arrays import Array, Ints, blocks, normalize
from embedcache.encoders.base import Fingerprint
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.commits import hash_item
from embedcache.store.feature import create_group
from embedcache.store.indexing import index
from embedcache.store.layout import read_info
from embedcache.store.writer import add_feature, commit_chunk

WIDTH, NUM_CENTERS = 64, 20_000
_BLOCK = 65_536


def write_table(path: Path, count: int, *, first: int = 0, name: str = "k") -> None:
    """Write a Parquet table of samples, whose keys are a letter and eight digits."""
    with pq.ParquetWriter(path, _rows(0, 1, name).schema) as writer:
        for part in blocks(count, _BLOCK):
            writer.write_table(_rows(first + part.start, part.stop - part.start, name))


def append_rows(path: Path, num_before: int, count: int) -> None:
    """Write a table with more samples at the end."""
    with pq.ParquetFile(path) as table, pq.ParquetWriter(path.with_suffix(".new"), table.schema_arrow) as writer:
        for group in range(table.num_row_groups):
            writer.write_table(table.read_row_group(group))
        writer.write_table(_rows(num_before, count, "k"))
    path.with_suffix(".new").rename(path)


def _rows(first: int, count: int, name: str) -> pa.Table:
    samples = np.arange(first, first + count)
    originals = (samples - (samples % 100 == 99)).tolist()  # one sample in a hundred is a copy of the one before
    counts = np.where(samples % 10 == 0, 3, 1).tolist()
    texts = [
        [f"caption {number} of what is seen in image {original:08d}" for number in range(captions)]
        for original, captions in zip(originals, counts, strict=True)
    ]
    keys = [f"{name}{sample:08d}" for sample in samples.tolist()]
    images = [f"images/{original % 100:04d}.png" for original in originals]
    return pa.table({"key": keys, "image": images, "caption": pa.array(texts, pa.list_(pa.string()))})


def write_concepts(path: Path, count: int) -> None:
    """Write a Parquet table of classes with one prompt each."""
    names = [f"class {number}" for number in range(count)]
    pq.write_table(pa.table({"key": names, "class": names, "caption": names}), path)


def write_vectors(folder: Path, count: int) -> None:
    """Write `images.npy`, `texts.npy` and `rows.parquet` for `import npy`; 1 % of the vectors are NaN."""
    for modality in ("image", "text"):
        array = np.lib.format.open_memmap(folder / f"{modality}s.npy", "w+", np.float16, (count, WIDTH))
        for part in blocks(count, _BLOCK):
            samples = np.arange(part.start, part.stop)
            array[part] = make_vectors(samples, modality)
            array[part][samples % 100 == 7] = np.nan
    with pq.ParquetWriter(folder / "rows.parquet", pa.schema({"key": pa.string(), "caption": pa.string()})) as writer:
        for part in blocks(count, _BLOCK):
            numbers = range(part.start, part.stop)
            captions = [f"caption of {number}" for number in numbers]
            writer.write_table(pa.table({"key": [f"k{number:08d}" for number in numbers], "caption": captions}))


def write_images(folder: Path) -> None:
    """Write 100 images of a few pixels, which the table names again and again."""
    folder.mkdir()
    for number in range(100):
        Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(folder / f"{number:04d}.png")


def write_features(table: Path, cache: Path, *, first: int = 0, has_failures: bool = True) -> None:
    """Number the samples of a table unless they are, and commit made vectors; one item in a hundred fails."""
    info = read_info(cache) if cache.is_dir() else index(open_source(table), cache)
    for modality in info.num_items:
        fingerprint = Made(modality).fingerprint.to_json()
        group = create_group(cache, modality, "open_made", info, spec=fingerprint["family"], fingerprint=fingerprint)
        add_feature(group, "vector", (WIDTH,), "float16")
        opened = Cache(cache)
        for chunk in range(info.num_chunks(modality)):
            rows = info.chunk_rows(modality, chunk)
            columns = opened.items(modality, chunk=chunk, columns=["sample", *(["text"] if modality == "text" else [])])
            samples: Ints = first + columns["sample"].to_numpy()
            failures = [
                "not an image" if has_failures and row % 100 == 7 else None for row in range(rows.start, rows.stop)
            ]
            values = make_vectors(samples, modality)
            vectors = [None if reason else value for reason, value in zip(failures, values, strict=True)]
            hashes = [hash_item(content.encode()) for content in _contents(columns, samples)]
            commit_chunk(group, chunk, {"vector": vectors}, hashes, {"vector": failures})


def _contents(columns: pa.Table, samples: Ints) -> list[str]:
    """Return what stands for the bytes of items: their text, or the number of the image that they are copies of."""
    if "text" in columns.column_names:
        texts: list[str] = columns["text"].to_pylist()
        return texts
    return [f"image {original}" for original in (samples - (samples % 100 == 99)).tolist()]


class Made:
    """A stand-in encoder: a vector of random numbers that depend on the item."""

    batch_size = 1024

    def __init__(self, modality: str) -> None:
        self.modality = modality
        self.features = {"vector": (WIDTH,)}
        family = "benchmarks.scale_data:open_made"
        self.fingerprint = Fingerprint(family=family, model="made", weights="0" * 64, preprocessing={}, pooling={})

    def prepare(self, items: Sequence[object]) -> list[Array]:
        """Return a seed per item."""
        contents = (item.encode() if isinstance(item, str) else item.tobytes() for item in items)  # type: ignore[attr-defined]
        return [np.frombuffer(hash_item(content), np.uint32) for content in contents]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Draw the vectors."""
        return {"vector": [np.random.default_rng(seed).standard_normal(WIDTH, np.float32) for seed in prepared]}


def open_made(spec: object, *, modality: str, settings: object) -> Made:
    """Open the stand-in encoder."""
    return Made(modality)


def make_vectors(samples: Ints, modality: str) -> Array:
    """Return (M, WIDTH) float16 vectors of items of samples, ascending, which depend on their numbers alone."""
    first, last = int(samples[0]), int(samples[-1])
    starts = range(first // _BLOCK * _BLOCK, last + 1, _BLOCK)
    vectors = np.concatenate([_vector_block(start) for start in starts])[samples - starts[0]]
    if modality == "text":
        vectors = np.roll(vectors, 1, axis=1)
        vectors[1:][np.diff(samples) == 0] *= np.linspace(0.8, 1.2, WIDTH, dtype=np.float32)  # further captions
    return vectors.astype(np.float16)


@lru_cache(maxsize=1)
def _centers() -> Array:
    return normalize(np.random.default_rng(1).standard_normal((NUM_CENTERS, WIDTH), np.float32))


@lru_cache(maxsize=2)
def _vector_block(start: int) -> Array:
    rng = np.random.default_rng([2, start])
    near = _centers()[rng.integers(0, NUM_CENTERS, _BLOCK)]
    block = 0.75 * near + 0.66 * normalize(rng.standard_normal((_BLOCK, WIDTH), np.float32))
    block[49::50] = block[48::50] + 0.01 * block[47::50]  # near-duplicates
    block[99::100] = block[98::100]  # copies
    return block


if __name__ == "__main__":
    if sys.argv[1] == "index":
        index(open_source(Path("pairs.parquet")), Path("cache"))
    else:
        write_features(Path("pairs.parquet"), Path("cache"))
