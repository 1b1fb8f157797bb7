"""Every command on millions of pairs: seconds, peak memory and bytes on disk, each command in a fresh process.

    python -m benchmarks scale [--pairs N,N] [--key-length N] [--folder FOLDER]

The pairs are made: vectors of width 64 around 20,000 centers, a table with keys (of 9 characters, or as many as
`--key-length` says) and captions, three captions for a tenth of the samples, and 1 % of the items failed. One sample in
fifty is a near-duplicate of the one before, every second of these a copy. Memory is anonymous and shared memory; mapped
pages, which the system may drop, are stated beside it.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Usage, run_measured
from benchmarks.scale_data import (
    WIDTH,
    append_rows,
    make_key,
    write_concepts,
    write_features,
    write_images,
    write_table,
    write_vectors,
)
from embedcache.cli.console import print_line, print_table
from embedcache.sources import open_source
from embedcache.store.indexing import index

SIZES = (2_000_000, 20_000_000)
_NUM_CONCEPTS, _NUM_TEST, _NUM_ADDED = 1000, 100_000, 1000
_TARGET_GB, _START_S = 8.0, 5.0
_CHUNK_SIZE = 2048  # of caches; pairs are whole chunks, since --extend compares the items of the last one


def main(
    *, quick: bool, pairs: Sequence[int] = (), key_length: int = 0, folder: str = "", commands: Sequence[str] = ()
) -> None:
    """Print a table for each number of pairs, then the growth of each command from one to the next."""
    sizes = [-(-size // _CHUNK_SIZE) * _CHUNK_SIZE for size in pairs or ([2000] if quick else SIZES)]
    results = {}
    for size in sizes:
        with TemporaryDirectory(dir=folder or None) as name:
            results[size] = measure_commands(Path(name), size, commands, key_length=key_length)
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


def measure_commands(
    folder: Path, num_pairs: int, commands: Sequence[str] = (), *, key_length: int = 0
) -> dict[str, Usage]:
    """Make the data in a folder and run every command on it; return name -> what it used, in order.

    Data that an earlier call left in the folder are used again. `commands` are the beginnings of the names of those to
    run; empty: all.
    """
    if not (folder / "images").is_dir():
        _write_data(folder, num_pairs, key_length)
    usages: dict[str, Usage] = {}
    for step in _steps(num_pairs, key_length):
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


def _write_data(folder: Path, num_pairs: int, key_length: int) -> None:
    num_test = min(_NUM_TEST, max(num_pairs // 20, 100))
    write_table(folder / "pairs.parquet", num_pairs, key_length=key_length)
    write_table(folder / "test.parquet", num_test, first=num_pairs // 2, name="t", key_length=key_length)
    write_concepts(folder / "concepts.parquet", min(_NUM_CONCEPTS, num_pairs // 20))
    for name, first in (("test", num_pairs // 2), ("concepts", 0)):
        write_features(folder / f"{name}.parquet", folder / name, first=first, has_failures=name != "concepts")
    write_vectors(folder, num_pairs, key_length=key_length)
    write_images(folder / "images")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A command: its words after `python -m`, what it writes, and what is not needed after it."""

    name: str
    words: Sequence[str]
    written: Sequence[str] = ()
    removed: Sequence[str] = ()
    before: Callable[[Path], None] | None = None


def _steps(num_pairs: int, key_length: int) -> Iterator[_Step]:
    held_out, encoder = min(5000, num_pairs // 4), "benchmarks.scale_data:open_made"
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
        before=lambda folder: append_rows(folder / "pairs.parquet", num_pairs, _NUM_ADDED, key_length=key_length),
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
        name="cut, a tenth", words=_words("cache cut cache chosen.parquet part"), written=("part",), removed=("part",)
    )
    yield _Step(
        name="merge",
        words=_words("cache merge cache test merged --prefix-keys"),
        written=("merged",),
        removed=("merged",),
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
    yield _Step(name="search by key", words=_words(f"search found --query-key {make_key('k', 42, key_length)} -k 5"))
    yield _Step(
        name="export npy",
        words=_words("export npy cache arrays --modality image"),
        written=("arrays",),
        removed=("arrays",),
    )


def _words(line: str) -> list[str]:
    return ["embedcache", *line.split()]


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
