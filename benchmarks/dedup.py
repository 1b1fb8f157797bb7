"""Near-duplicate search with planted pairs, 768 wide: 50,000 vectors against brute force, a million as a command.

Vectors are drawn around 20,000 centers, with an expected cosine of 0.55 between two of one center. One in twenty is a
near-duplicate of another, rotated by at most the angle of cosine 0.95: half of them in a random direction, half towards
another center, where the borders of clusters are.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import pyarrow.parquet as pq
from sklearn.neighbors import NearestNeighbors

from benchmarks.data import RandomSource, write_random_cache
from benchmarks.measure import run_command
from embedcache.arrays import Array, Ints, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.curate.dedup import find_near_duplicates
from embedcache.curate.settings import DedupSettings
from embedcache.dataset.vectors import Vectors

WIDTH, NUM_CENTERS, FRACTION, LIMIT = 768, 20_000, 0.05, 0.95


def main(*, quick: bool) -> None:
    """Print seconds, memory and recall."""
    small = 10 if quick else 1
    with TemporaryDirectory() as name:
        _compare(Path(name), 50_000 // small)
        _run(Path(name), 1_000_000 // small)


def _compare(folder: Path, count: int) -> None:
    """Compare all pairs and clusters with hand-written baselines."""
    _write(folder / "small", count)
    vectors = Vectors(folder / "small", "image")
    values = vectors.read(vectors.rows)

    def find_pairs(*, all_pairs: bool) -> set[tuple[int, int]]:
        settings = DedupSettings(all_pairs=all_pairs, scratch=folder, pixels=False)
        pairs = find_near_duplicates(vectors, vectors.rows, [LIMIT], settings).pairs
        return set(zip(pairs["left"].tolist(), pairs["right"].tolist(), strict=True))

    def search_flat() -> set[tuple[int, int]]:
        index = faiss.IndexFlatIP(WIDTH)
        index.add(values)
        limits, _, neighbors = index.range_search(values, LIMIT)
        return {(a, b) for a in range(count) for b in neighbors[limits[a] : limits[a + 1]].tolist() if a < b}

    def search_sklearn() -> set[tuple[int, int]]:
        index = NearestNeighbors(metric="cosine", algorithm="brute").fit(values)
        neighbors = index.radius_neighbors(values, 1 - LIMIT, return_distance=False)
        return {(a, int(b)) for a, row in enumerate(neighbors) for b in row if a < b}

    calls = {
        "FAISS IndexFlatIP.range_search": search_flat,
        "scikit-learn radius_neighbors": search_sklearn,
        "embedcache, all pairs (default)": lambda: find_pairs(all_pairs=True),
        "embedcache, clusters": lambda: find_pairs(all_pairs=False),
    }
    true: set[tuple[int, int]] = set()
    rows = []
    for name, call in calls.items():
        started, cpu_started = time.perf_counter(), time.process_time()
        pairs = call()
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        true = true or pairs
        share = f"{len(pairs & true) / len(true):.5f}"
        rows.append([name, f"{seconds:.1f}", f"{cpu_s:.1f}", f"{len(pairs):,}", share, str(len(pairs - true))])
    columns = ["seconds", "CPU s", "pairs", "fraction of FAISS's pairs", "additional pairs"]
    print_table([f"{count:,} × {WIDTH}", *columns], rows)


def _run(folder: Path, count: int) -> None:
    """Run the whole command in a separate process."""
    print_line(f"writing {count:,} vectors")
    planted = _write(folder / "large", count)
    words = f"curate dedup large kept.parquet --cosine {LIMIT} --scratch {folder} --no-all-pairs"
    usage = run_command(["embedcache", *words.split()], folder=folder)

    removed = pq.read_table(folder / "kept.removed.parquet")["row"].to_numpy()
    is_removed = np.isin(planted, removed).any(axis=1)
    num_others = len(removed) - int(is_removed.sum())
    costs = [f"{usage.seconds:.0f}", f"{usage.peak_gb:.2f}", f"{usage.cpu_s:.0f}"]
    row = [*costs, f"{len(planted):,}", f"{is_removed.mean():.5f}", f"{num_others:,}"]
    columns = ["seconds", "peak, GB", "CPU s", "planted", "recall", "other removed"]
    print_table(columns, [row], title=f"{count:,} × {WIDTH}")


def _write(path: Path, count: int) -> Ints:
    """Write a cache of vectors and return the planted pairs of rows: (M, 2)."""
    values, planted = _draw(count)
    source = RandomSource(num_samples=count)
    write_random_cache(path, source, WIDTH, seed=0, draw=lambda _, rows: values[rows.start : rows.stop])
    return planted


def _draw(count: int) -> tuple[Array, Ints]:
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
