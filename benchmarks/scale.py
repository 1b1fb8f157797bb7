"""Every command on millions of pairs: seconds and peak memory, each command in a fresh process.

    python -m benchmarks scale [--pairs N,N] [--folder FOLDER] [--commands NAME,NAME]

The pairs are made: vectors of width 64 around 20,000 centers, a table with keys and captions, three captions for a
tenth of the samples, and 1 % of the items failed. One sample in fifty is a near-duplicate of the one before, every
second of these a copy. Memory is anonymous and shared memory; mapped pages, which the system may drop, are beside it.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import scale_data
from benchmarks.measure import run_command
from embedcache.cli.console import print_line, print_table

SIZES = (2_000_000, 20_000_000)
_NUM_CONCEPTS, _NUM_TEST, _NUM_ADDED = 1000, 100_000, 1000
_CHUNK_SIZE = 2048  # of caches; pairs are whole chunks, since --extend compares the items of the last one
_ENCODER = "benchmarks.scale_data:open_made"
_IMPORT = "embedcache import npy imported --file image=images.npy --file text=texts.npy --table rows.parquet"
_EXTEND = f"embedcache extract pairs.parquet cache --extend --image-encoder {_ENCODER} --text-encoder {_ENCODER}"
_TRAIN = "embedcache train cache run --epochs 1 --memory 1MB --split key --val-fraction {held} --test-fraction {held}"
STEPS = {
    "import npy": _IMPORT,
    "index": "benchmarks.scale_data index",
    "write features": "benchmarks.scale_data write",
    "extract --extend, 1,000 added": _EXTEND,
    "inspect": "embedcache inspect cache",
    "verify": "embedcache verify cache",
    "train, one epoch": _TRAIN,
    "evaluate, 5,000 held out": "embedcache evaluate retrieval cache run",
    "coverage, 1,000 concepts": "embedcache curate coverage cache concepts --run run --label class",
    "select": "embedcache curate select cache chosen.parquet --method clip-score --run run --budget 10%",
    "cut, a tenth": "embedcache cache cut cache chosen.parquet part",
    "merge": "embedcache cache merge cache test merged --prefix-keys",
    "dedup": "embedcache curate dedup cache kept.parquet --cosine 0.98 --modality image --scratch .",
    "leaks": "embedcache curate leaks cache test clean.parquet",
    "index within 2 GB": "embedcache curate index cache found --run run --modality image --memory 2GB --on-disk",
    "search by key": "embedcache search found --query-key k00000042 -k 5",
    "export npy": "embedcache export npy cache arrays --modality image",
}
"""Step -> words after `python -m`."""


def main(*, quick: bool, pairs: Sequence[int] = (), folder: str = "", commands: Sequence[str] = ()) -> None:
    """Print a table for each number of pairs; `commands` are the beginnings of the names of those to run."""
    for size in pairs or ([2000] if quick else SIZES):
        num_pairs = -(-size // _CHUNK_SIZE) * _CHUNK_SIZE
        with TemporaryDirectory(dir=folder or None) as name:
            _write_data(Path(name), num_pairs)
            steps = [step for step in STEPS if not commands or step.startswith(tuple(commands))]
            rows = [_run(Path(name), num_pairs, step) for step in steps]
        columns = ["command", "seconds", "memory, GB", "mapped, GB"]
        print_table(columns, rows, title=f"{num_pairs:,} pairs of width {scale_data.WIDTH}")


def _write_data(folder: Path, num_pairs: int) -> None:
    num_test = min(_NUM_TEST, max(num_pairs // 20, 100))
    scale_data.write_table(folder / "pairs.parquet", num_pairs)
    scale_data.write_table(folder / "test.parquet", num_test, first=num_pairs // 2, name="t")
    scale_data.write_concepts(folder / "concepts.parquet", min(_NUM_CONCEPTS, num_pairs // 20))
    for name, first in (("test", num_pairs // 2), ("concepts", 0)):
        is_failing = name != "concepts"
        scale_data.write_features(folder / f"{name}.parquet", folder / name, first=first, has_failures=is_failing)
    scale_data.write_vectors(folder, num_pairs)
    scale_data.write_images(folder / "images")


def _run(folder: Path, num_pairs: int, step: str) -> list[str]:
    if STEPS[step] == _EXTEND:
        scale_data.append_rows(folder / "pairs.parquet", num_pairs, _NUM_ADDED)
    words = STEPS[step].format(held=min(5000, num_pairs // 4) / num_pairs)
    usage = run_command(words.split(), folder=folder)
    print_line(f"{num_pairs:,} pairs: {step}: {usage.seconds:.1f} s, {usage.memory_gb:.2f} GB")
    for name in ("imported", "part", "merged", "arrays"):  # not needed any more
        shutil.rmtree(folder / name, ignore_errors=True)
    return [step, f"{usage.seconds:.1f}", f"{usage.memory_gb:.2f}", f"{usage.mapped_gb:.2f}"]
