"""Every command on millions of pairs: seconds, peak memory and bytes on disk, each command in a fresh process.

    python -m benchmarks scale [--pairs N,N] [--folder FOLDER]

The pairs are made: vectors of width 64 around 20,000 centers, a table with keys and captions, three captions for a
tenth of the samples, and 1 % of the items failed. One sample in fifty is a near-duplicate of the one before, every
second of these a copy. Memory is anonymous and shared memory; mapped pages, which the system may drop, are stated
beside it.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Usage, run_measured
from embedcache.arrays import Array, Ints, blocks, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.encoders.base import Fingerprint
from embedcache.sources import open_source
from embedcache.store.commits import hash_item
from embedcache.store.group import add_feature, create_group
from embedcache.store.indexing import index
from embedcache.store.layout import read_info
from embedcache.store.writer import commit_chunk

WIDTH, NUM_CENTERS = 64, 20_000
SIZES = (2_000_000, 20_000_000)
_BLOCK = 65_536
_NUM_CONCEPTS, _NUM_TEST, _NUM_ADDED = 1000, 100_000, 1000
_TARGET_GB, _START_S = 8.0, 5.0
_CHUNK_SIZE = 2048  # of caches; pairs are whole chunks, since --extend compares the items of the last one


def main(*, quick: bool, pairs: Sequence[int] = (), folder: str = "", commands: Sequence[str] = ()) -> None:
    """Print a table for each number of pairs, then the growth of each command from one to the next."""
    sizes = [-(-size // _CHUNK_SIZE) * _CHUNK_SIZE for size in pairs or ([2000] if quick else SIZES)]
    results = {}
    for size in sizes:
        with TemporaryDirectory(dir=folder or None) as name:
            results[size] = measure_commands(Path(name), size, commands)
        _print(size, results[size])
    for before, after in pairwise(sizes):
        growth = [
            [name, f"{results[after][name].seconds / results[before][name].seconds:.1f}"]
            for name in results[after]
            if name in results[before]
        ]
        print_table([f"seconds of {after:,} pairs / those of {before:,}", "ratio"], growth)


def _print(size: int, usages: Mapping[str, Usage]) -> None:
    rows = [
        [
            name,
            f"{usage.seconds:.1f}",
            f"{usage.memory_gb:.2f}",
            f"{usage.mapped_gb:.2f}",
            f"{usage.disk_bytes / 1e9:.3f}",
            usage.remark,
        ]
        for name, usage in usages.items()
    ]
    columns = ["command", "seconds", "memory, GB", "mapped, GB", "disk, GB", ""]
    print_table(columns, rows, title=f"{size:,} pairs of width {WIDTH}")
    above = [name for name, usage in usages.items() if usage.memory_gb > _TARGET_GB]
    late = [name for name in ("inspect", "search by key") if name in usages and usages[name].seconds > _START_S]
    print_line(
        f"above {_TARGET_GB:g} GB: {', '.join(above) or 'none'}; above {_START_S:g} s: {', '.join(late) or 'none'}"
    )


def measure_commands(folder: Path, num_pairs: int, commands: Sequence[str] = ()) -> dict[str, Usage]:
    """Make the data in a folder and run every command on it; return name -> what it used, in order.

    Data that an earlier call left in the folder are used again. `commands` are the beginnings of the names of those to
    run; empty: all.
    """
    if not (folder / "images").is_dir():
        _write_data(folder, num_pairs)
    usages: dict[str, Usage] = {}
    for step in _steps(num_pairs):
        if commands and not step.name.startswith(tuple(commands)):
            continue
        if step.before:
            step.before(folder)
        usage = run_measured(step.words, folder=folder)
        disk = sum(_disk_bytes(folder / name) for name in step.written if (folder / name).exists())
        usages[step.name] = usage = usage._replace(disk_bytes=disk)
        if step.name.startswith("train") and not usage.remark:
            usages[step.name] = usage._replace(remark=f"first step after {_first_step_s(folder):.1f} s")
        print_line(f"{num_pairs:,} pairs: {step.name}: {usage.seconds:.1f} s, {usage.memory_gb:.2f} GB {usage.remark}")
        for name in step.removed:
            _remove(folder / name)
    return usages


def _write_data(folder: Path, num_pairs: int) -> None:
    num_test = min(_NUM_TEST, max(num_pairs // 20, 100))
    write_table(folder / "pairs.parquet", num_pairs)
    write_table(folder / "test.parquet", num_test, first=num_pairs // 2, name="t")
    write_concepts(folder / "concepts.parquet", min(_NUM_CONCEPTS, num_pairs // 20))
    for name, first in (("test", num_pairs // 2), ("concepts", 0)):
        write_features(folder / f"{name}.parquet", folder / name, first=first, has_failures=name != "concepts")
    write_vectors(folder, num_pairs)
    write_images(folder / "images")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A command: its words after `python -m`, what it writes, and what is not needed after it."""

    name: str
    words: Sequence[str]
    written: Sequence[str] = ()
    removed: Sequence[str] = ()
    before: Callable[[Path], None] | None = None


def _steps(num_pairs: int) -> Iterator[_Step]:
    held_out, encoder = min(5000, num_pairs // 4), "benchmarks.scale:open_made"
    yield _Step(
        name="import npy",
        words=_words("import npy imported --image-file images.npy --text-file texts.npy --table rows.parquet"),
        written=("imported",),
        removed=("imported",),
    )
    yield _Step(name="index", words=("benchmarks.scale", "index"), written=("cache",))
    yield _Step(name="write features", words=("benchmarks.scale", "write"), written=("cache",))
    yield _Step(
        name=f"extract --extend, {_NUM_ADDED:,} added",
        words=_words(f"extract pairs.parquet cache --extend --image-encoder {encoder} --text-encoder {encoder}"),
        written=("cache",),
        before=lambda folder: append_rows(folder / "pairs.parquet", num_pairs, _NUM_ADDED),
    )
    yield _Step(name="inspect", words=_words("inspect cache"))
    yield _Step(name="verify", words=_words("verify cache"))
    yield _Step(name="train, one epoch", words=("benchmarks.scale", "train", str(held_out)), written=("run",))
    yield _Step(name=f"evaluate, {held_out:,} held out", words=_words("evaluate retrieval cache run"))
    yield _Step(
        name=f"coverage, {_NUM_CONCEPTS:,} concepts",
        words=_words("curate coverage cache concepts --run run --label class"),
    )
    yield _Step(
        name="select clip-score",
        words=_words("curate select cache chosen.parquet --method clip-score --run run --budget 10%"),
        written=("chosen.parquet",),
    )
    yield _Step(
        name="dedup",
        words=_words("curate dedup cache kept.parquet --cosine 0.98 --modality image --scratch ."),
        written=("kept.parquet", "kept.removed.parquet"),
    )
    yield _Step(name="leaks", words=_words("curate leaks cache test clean.parquet"), written=("clean.parquet",))
    yield _Step(
        name="index within 2 GB",
        words=_words("curate index cache found --run run --modality image --memory 2GB --on-disk"),
        written=("found",),
    )
    yield _Step(name="search by key", words=_words("search found --query-key k00000042 -k 5"))
    yield _Step(
        name="export npy",
        words=_words("export npy cache arrays --modality image"),
        written=("arrays",),
        removed=("arrays",),
    )


def _words(line: str) -> list[str]:
    return ["embedcache", *line.split()]


@lru_cache(maxsize=1)
def _centers() -> Array:
    return normalize(np.random.default_rng(1).standard_normal((NUM_CENTERS, WIDTH), np.float32))


@lru_cache(maxsize=2)
def _latent_block(start: int) -> Array:
    rng = np.random.default_rng([2, start])
    near = _centers()[rng.integers(0, NUM_CENTERS, _BLOCK)]
    block = 0.75 * near + 0.66 * normalize(rng.standard_normal((_BLOCK, WIDTH), np.float32))
    block[49::50] = block[48::50] + 0.01 * block[47::50]  # near-duplicates
    block[99::100] = block[98::100]  # copies
    return block


def _latents(first: int, count: int) -> Array:
    """Return (count, WIDTH) float32 directions of samples, which depend on their numbers alone."""
    return np.concatenate(
        [
            _latent_block(start)[max(first - start, 0) : first + count - start]
            for start in range(first // _BLOCK * _BLOCK, first + count, _BLOCK)
        ]
    )


def _captions_of(samples: Ints) -> Ints:
    """Return the number of captions of each sample."""
    return np.where(samples % 10 == 0, 3, 1)


def make_vectors(samples: Ints, modality: str) -> Array:
    """Return (M, WIDTH) float16 vectors of items of samples, ascending."""
    latents = _latents(int(samples[0]), int(samples[-1] - samples[0]) + 1)[samples - samples[0]]
    if modality == "text":
        latents = np.roll(latents, 1, axis=1)
        latents[1:][np.diff(samples) == 0] *= np.linspace(0.8, 1.2, WIDTH, dtype=np.float32)  # further captions
    return latents.astype(np.float16)


def _rows(first: int, count: int, name: str) -> pa.Table:
    samples = np.arange(first, first + count)
    copied = samples - (samples % 100 == 99)
    texts = [
        [f"caption {number} of what is seen in image {copy:08d}" for number in range(captions)]
        for copy, captions in zip(copied.tolist(), _captions_of(samples).tolist(), strict=True)
    ]
    return pa.table(
        {
            "key": [f"{name}{sample:08d}" for sample in samples.tolist()],
            "image": [f"images/{copy % 100:04d}.png" for copy in copied.tolist()],
            "caption": pa.array(texts, pa.list_(pa.string())),
        }
    )


def write_table(path: Path, count: int, *, first: int = 0, name: str = "k") -> None:
    """Write a Parquet table of samples."""
    with pq.ParquetWriter(path, _rows(0, 1, name).schema) as writer:
        for part in blocks(count, _BLOCK):
            writer.write_table(_rows(first + part.start, part.stop - part.start, name))


def append_rows(path: Path, num_before: int, count: int) -> None:
    """Write a table with more samples at the end."""
    with pq.ParquetFile(path) as old, pq.ParquetWriter(path.with_suffix(".new"), old.schema_arrow) as writer:
        for group in range(old.num_row_groups):
            writer.write_table(old.read_row_group(group))
        writer.write_table(_rows(num_before, count, "k"))
    path.with_suffix(".new").rename(path)


def write_concepts(path: Path, count: int) -> None:
    """Write a Parquet table of classes with one prompt each."""
    names = [f"class {number}" for number in range(count)]
    pq.write_table(pa.table({"key": names, "class": names, "caption": names}), path)


def write_vectors(folder: Path, count: int) -> None:
    """Write `images.npy`, `texts.npy` and `rows.parquet` for `import npy`; 1 % of the vectors are NaN."""
    shape = (count, WIDTH)
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}s.npy", "w+", np.float16, shape) for name in ("image", "text")
    }
    with pq.ParquetWriter(folder / "rows.parquet", pa.schema({"key": pa.string(), "caption": pa.string()})) as writer:
        for part in blocks(count, _BLOCK):
            samples = np.arange(part.start, part.stop)
            for name, array in arrays.items():
                array[part] = make_vectors(samples, name)
                array[part][samples % 100 == 7] = np.nan
            rows = _rows(part.start, len(samples), "k")
            writer.write_table(pa.table({"key": rows["key"], "caption": [f"caption of {n}" for n in samples.tolist()]}))


def write_images(folder: Path) -> None:
    """Write 100 images of a few pixels, which the table names again and again."""
    from PIL import Image

    folder.mkdir()
    for number in range(100):
        Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(folder / f"{number:04d}.png")


class Made:
    """A stand-in encoder: a vector of random numbers that depend on the item."""

    batch_size = 1024

    def __init__(self, modality: str) -> None:
        self.modality = modality
        self.features = {"vector": (WIDTH,)}
        self.fingerprint = Fingerprint(
            family="benchmarks.scale:open_made", model="made", weights="0" * 64, preprocessing={}, pooling={}
        )

    def prepare(self, items: Sequence[object]) -> list[Array]:
        """Return a seed per item."""
        contents = (item.encode() if isinstance(item, str) else item.tobytes() for item in items)  # type: ignore[attr-defined]
        return [np.frombuffer(hash_item(content), np.uint32) for content in contents]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Draw the vectors."""
        return {
            name: [np.random.default_rng(seed).standard_normal(WIDTH, np.float32) for seed in prepared]
            for name in names
        }


def open_made(spec: object, *, modality: str, settings: object) -> Made:
    """Open the stand-in encoder."""
    return Made(modality)


def write_features(table: Path, cache: Path, *, first: int = 0, has_failures: bool = True) -> None:
    """Number the samples of a table unless they are, and commit made vectors; one item in a hundred fails."""
    info = read_info(cache) if cache.is_dir() else index(open_source(table), cache)
    for modality in info.num_items:
        made = Made(modality)
        fingerprint = made.fingerprint.to_json()
        group = create_group(cache, modality, "open_made", info, spec=fingerprint["family"], fingerprint=fingerprint)
        add_feature(group, "vector", (WIDTH,), "float16")
        with pq.ParquetFile(cache / modality / "items.parquet") as items:
            for chunk in range(info.num_chunks(modality)):
                rows = info.chunk_rows(modality, chunk)
                columns = items.read_row_group(chunk, columns=["sample", *(["text"] if modality == "text" else [])])
                samples: Ints = columns["sample"].to_numpy()
                failures = [
                    "not an image" if has_failures and row % 100 == 7 else None for row in range(rows.start, rows.stop)
                ]
                values = make_vectors(first + samples, modality)
                vectors = [None if reason else value for reason, value in zip(failures, values, strict=True)]
                hashes = [hash_item(content.encode()) for content in _contents(columns, first + samples)]
                commit_chunk(group, chunk, {"vector": vectors}, hashes, {"vector": failures})
        group.compact()


def _contents(columns: pa.Table, samples: Ints) -> list[str]:
    """Return what stands for the bytes of items: their text, or the number of the image that they are copies of."""
    if "text" in columns.column_names:
        texts: list[str] = columns["text"].to_pylist()
        return texts
    return [f"image {copied}" for copied in (samples - (samples % 100 == 99)).tolist()]


def _train(held_out: int) -> None:
    """Train one epoch on mapped features, and write when the first step was done."""
    from embedcache.progress import NullProgress
    from embedcache.train.settings import train_settings
    from embedcache.train.train import train

    started = time.perf_counter()

    class FirstStep(NullProgress):
        """Notes the time of the first step of the epoch."""

        def __init__(self) -> None:
            self._unit = ""

        def start(self, what: str, total: int, unit: str) -> None:
            self._unit = unit

        def advance(self, count: int) -> None:
            if self._unit == "pairs" and not Path("first_step.json").exists():
                Path("first_step.json").write_text(json.dumps(time.perf_counter() - started))

    info = json.loads(Path("cache/cache.json").read_text())
    fraction = held_out / info["num_samples"]
    settings = train_settings(
        {"epochs": 1, "memory": 2**20, "split": "key", "val_fraction": fraction, "test_fraction": fraction}
    )
    train("cache", "run", settings=settings, progress=FirstStep())


def _first_step_s(folder: Path) -> float:
    seconds: float = json.loads((folder / "first_step.json").read_text())
    return seconds


def _disk_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    done = subprocess.run(["du", "-sb", str(path)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    _PARTS: Mapping[str, Callable[[], object]] = {
        "index": lambda: index(open_source(Path("pairs.parquet")), Path("cache")),
        "write": lambda: write_features(Path("pairs.parquet"), Path("cache")),
        "train": lambda: _train(int(sys.argv[2])),
    }
    _PARTS[sys.argv[1]]()
