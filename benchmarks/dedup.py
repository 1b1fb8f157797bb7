"""Near-duplicate search with planted pairs, 768 wide: 50,000 vectors against brute force, a million as a command.

Vectors are drawn around 20,000 centers, with an expected cosine of 0.55 between two of one center. One in twenty is a
near-duplicate of another, rotated by at most the angle of cosine 0.95: half of them in a random direction, half towards
another center, where the borders of clusters are.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
from sklearn.neighbors import NearestNeighbors

from benchmarks.measure import run_embedcache
from embedcache.arrays import Array, Ints, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.curate.near_duplicates import NearDuplicates, find_near_duplicates
from embedcache.curate.settings import DedupSettings
from embedcache.search.vectors import Vectors
from embedcache.sources.base import FileItem, Sample
from embedcache.store.group import create_group
from embedcache.store.indexing import index
from embedcache.store.writer import add_feature, commit_chunk

WIDTH, NUM_CENTERS, FRACTION, LIMIT = 768, 20_000, 0.05, 0.95


def main(*, quick: bool) -> None:
    """Print seconds, memory and recall."""
    small = 10 if quick else 1
    with TemporaryDirectory() as name:
        _compare(Path(name), 50_000 // small)
        _command(Path(name), 1_000_000 // small)


@dataclass(frozen=True, kw_only=True)
class _EmptySource:
    """A source of samples without bytes."""

    num_samples: int

    def describe(self) -> Mapping[str, Any]:
        return {"type": "made", "path": str(self.num_samples), "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for row in range(self.num_samples):
            yield Sample(key=f"{row:07}", images=(FileItem(path=f"{row:07}.jpg"),))

    def read(self, item: FileItem) -> bytes:
        return item.path.encode()


def _write(path: Path, count: int) -> Ints:
    """Write a cache of vectors and return the planted pairs of rows: (M, 2)."""
    values, planted = _vectors(count)
    info = index(_EmptySource(num_samples=count), path)
    group = create_group(path, "image", "made", info, spec="made:m", fingerprint={"family": "made"})
    add_feature(group, "vector", (WIDTH,), "float16")
    for chunk in range(info.num_chunks("image")):
        rows = info.chunk_rows("image", chunk)
        none = [None] * (rows.stop - rows.start)
        hashes = [row.to_bytes(16, "big") for row in range(rows.start, rows.stop)]
        commit_chunk(group, chunk, {"vector": list(values[rows])}, hashes, {"vector": none})
    return planted


def _vectors(count: int) -> tuple[Array, Ints]:
    rng = np.random.default_rng(0)
    centers = _directions(rng, NUM_CENTERS)
    values = np.empty((count, WIDTH), np.float16)
    for start in range(0, count, 10_000):
        block = values[start : start + 10_000]
        near = centers[rng.integers(0, NUM_CENTERS, len(block))]
        block[:] = normalize(np.sqrt(0.55) * near + np.sqrt(0.45) * _directions(rng, len(block)))
    pairs = rng.permutation(count)[: 2 * int(FRACTION * count)].reshape(-1, 2)
    for block in np.array_split(pairs, max(1, len(pairs) // 10_000)):
        values[block[:, 1]] = _rotate(rng, normalize(values[block[:, 0]]), centers)
    return values, pairs


def _rotate(rng: np.random.Generator, vectors: Array, centers: Array) -> Array:
    aim = _directions(rng, len(vectors))
    half = len(vectors) // 2
    aim[:half] = centers[rng.integers(0, NUM_CENTERS, half)]
    aim = normalize(aim - (aim * vectors).sum(axis=1, keepdims=True) * vectors)
    angle = rng.uniform(0, np.arccos(LIMIT + 0.001), (len(vectors), 1))
    return np.cos(angle) * vectors + np.sin(angle) * aim


def _directions(rng: np.random.Generator, count: int) -> Array:
    return normalize(rng.standard_normal((count, WIDTH), np.float32))


def _compare(folder: Path, count: int) -> None:
    """Compare all pairs and clusters with hand-written baselines."""
    _write(folder / "small", count)
    vectors = Vectors(folder / "small", "image")
    values, rows = vectors.read(vectors.rows), vectors.rows
    found: dict[str, set[tuple[int, int]]] = {}

    def find_pairs(*, all_pairs: bool) -> set[tuple[int, int]]:
        settings = DedupSettings(all_pairs=all_pairs, scratch=folder, pixels=False)
        near: NearDuplicates = find_near_duplicates(vectors, rows, [LIMIT], settings)
        return set(zip(near.pairs.left.tolist(), near.pairs.right.tolist(), strict=True))

    def search_flat() -> set[tuple[int, int]]:
        searched = faiss.IndexFlatIP(WIDTH)
        searched.add(values)
        limits, _, others = searched.range_search(values, LIMIT)
        return {(a, b) for a in range(count) for b in others[limits[a] : limits[a + 1]].tolist() if a < b}

    def search_sklearn() -> set[tuple[int, int]]:
        fitted = NearestNeighbors(metric="cosine", algorithm="brute").fit(values)
        found = fitted.radius_neighbors(values, 1 - LIMIT, return_distance=False)
        return {(a, int(b)) for a, others in enumerate(found) for b in others if a < b}

    calls = {
        "embedcache, all pairs (default)": lambda: find_pairs(all_pairs=True),
        "embedcache, clusters": lambda: find_pairs(all_pairs=False),
        "FAISS IndexFlatIP.range_search": search_flat,
        "scikit-learn radius_neighbors": search_sklearn,
    }
    seconds, cpu_seconds = {}, {}
    for name, call in calls.items():
        started, cpu_started = time.perf_counter(), time.process_time()
        found[name] = call()
        seconds[name], cpu_seconds[name] = time.perf_counter() - started, time.process_time() - cpu_started
    true = found["FAISS IndexFlatIP.range_search"]
    table = [
        [
            name,
            f"{seconds[name]:.1f}",
            f"{cpu_seconds[name]:.1f}",
            f"{len(pairs):,}",
            f"{len(pairs & true) / len(true):.5f}",
            str(len(pairs - true)),
        ]
        for name, pairs in found.items()
    ]
    print_table(
        [f"{count:,} × {WIDTH}", "seconds", "CPU s", "pairs", "fraction of FAISS's pairs", "additional pairs"], table
    )


def _command(folder: Path, count: int) -> None:
    """Run the whole command in a separate process."""
    print_line(f"writing {count:,} vectors")
    planted = _write(folder / "large", count)
    out = folder / "kept.parquet"
    words = ["curate", "dedup", "large", str(out), "--cosine", str(LIMIT), "--scratch", str(folder), "--no-all-pairs"]
    usage = run_embedcache(words, folder=folder, is_quiet=False)
    removed = pq.read_table(out.with_suffix(".removed.parquet"))["row"].to_numpy()
    is_removed = np.isin(planted, removed).any(axis=1)
    table = [
        [
            f"{usage.seconds:.0f}",
            f"{usage.peak_gb:.2f}",
            f"{usage.cpu_s:.0f}",
            f"{len(planted):,}",
            f"{is_removed.mean():.5f}",
            f"{len(removed) - int(is_removed.sum()):,}",
        ]
    ]
    print_table(
        ["seconds", "peak, GB", "CPU s", "planted", "recall", "other removed"], table, title=f"{count:,} × {WIDTH}"
    )
