"""Concept coverage of 300,000 x 512 float16 vectors on disk, 3,000 concepts, against the bare matrix product.

The baseline multiplies one chunk in memory, 2,048 x 512 float32, with the concepts once per chunk of the pool, without
reading, normalizing or counting, by NumPy and by torch; the faster one is the reference. Each item is near two of the
3,000 concepts. The command runs in a separate process, from start to table. Measurements alternate; medians are shown.
CPU seconds are the minimum, which other processes disturb less than the clock.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import RandomSource, write_random_cache
from benchmarks.measure import median_rates, run_embedcache
from embedcache.arrays import Floats, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.curate.counting import SAMPLE, CoverageCounter, estimate_background
from embedcache.metrics.neighbors import top_k
from embedcache.search.concepts import open_concepts
from embedcache.search.vectors import Vectors, run_pass
from embedcache.store.cache import Cache

ROWS, WIDTH, NUM_CONCEPTS, CHUNK, K = 300_000, 512, 3_000, 2_048, 10
LARGE = 10_000_000


def main(*, quick: bool) -> None:
    """Print items per second."""
    num_rows = ROWS // 10 if quick else ROWS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        directions = normalize(np.random.default_rng(0).standard_normal((NUM_CONCEPTS, WIDTH)))
        write_random_cache(
            folder / "concepts",
            RandomSource(NUM_CONCEPTS, num_captions=1, has_image=False),
            WIDTH,
            seed=1,
            draw=lambda _, rows: directions[rows.start : rows.stop],
        )
        pool = RandomSource(num_rows, num_captions=1, has_image=False)
        write_random_cache(
            folder / "pool", pool, WIDTH, seed=2, draw=lambda rng, rows: _near_two(rng, len(rows), directions)
        )
        peaks: list[float] = []
        cpu: dict[str, list[float]] = {
            "product by NumPy": [],
            "product by torch": [],
            "the pass": [],
            "the command": [],
        }
        rates = median_rates(
            {
                "product by NumPy": lambda: _product(num_rows, directions, cpu["product by NumPy"]),
                "product by torch": lambda: _torch_product(num_rows, directions, cpu["product by torch"]),
                "the pass": lambda: _pass(folder, num_rows, cpu["the pass"]),
                "the command": lambda: _command(folder, num_rows, peaks, cpu["the command"]),
            },
            repeats=1 if quick else 3,
        )
    fastest = max(("product by NumPy", "product by torch"), key=lambda name: rates[name])
    floor, least = rates[fastest], min(cpu[fastest])
    rows = [
        [name, f"{rate:,.0f}", f"{rate / floor:.2f}", f"{min(cpu[name]):.1f}", f"{least / min(cpu[name]):.2f}"]
        for name, rate in rates.items()
    ]
    title = f"{num_rows:,} x {WIDTH}, {NUM_CONCEPTS:,} concepts"
    print_table([title, "items/s", "relative to the product", "CPU s", "relative to the product"], rows)
    print_line(f"peak memory of the command {max(peaks):.2f} GB")
    print_line(f"{LARGE:,} items at the pass's rate, extrapolated: {LARGE / rates['the pass'] / 3600:.2f} hours")


def _near_two(rng: np.random.Generator, num: int, directions: Floats) -> Floats:
    first, second = rng.integers(0, len(directions), (2, num))
    noise = rng.standard_normal((num, WIDTH), np.float32) / np.float32(np.sqrt(WIDTH))
    return noise + 0.5 * directions[first] + 0.3 * directions[second]


def _product(num_rows: int, directions: Floats, cpu: list[float]) -> float:
    chunk, columns = np.ones((CHUNK, WIDTH), np.float32), np.ascontiguousarray(directions.T)
    out = np.empty((CHUNK, NUM_CONCEPTS), np.float32)
    num_chunks = -(-num_rows // CHUNK)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_chunks):
        np.matmul(chunk, columns, out=out)
    cpu.append(time.process_time() - cpu_started)
    return num_chunks * CHUNK / (time.perf_counter() - started)


def _torch_product(num_rows: int, directions: Floats, cpu: list[float]) -> float:
    chunk, columns = torch.ones(CHUNK, WIDTH), torch.from_numpy(np.ascontiguousarray(directions.T))
    out = torch.empty(CHUNK, NUM_CONCEPTS)
    num_chunks = -(-num_rows // CHUNK)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_chunks):
        torch.mm(chunk, columns, out=out)
    cpu.append(time.process_time() - cpu_started)
    return num_chunks * CHUNK / (time.perf_counter() - started)


def _pass(folder: Path, num_rows: int, cpu: list[float]) -> float:
    pool = Vectors(folder / "pool", "text")
    concepts = open_concepts(Cache(folder / "concepts"), pool)
    background = estimate_background(concepts.vectors, pool.sample(SAMPLE), K)
    nearest, _ = top_k(concepts.vectors, concepts.vectors, 8)
    work = CoverageCounter(concepts.vectors, background, nearest_CJ=nearest, k=K)
    started, cpu_started = time.perf_counter(), time.process_time()
    counts = run_pass(pool, work)
    counts.top.table()
    seconds = time.perf_counter() - started
    cpu.append(time.process_time() - cpu_started)
    assert counts.num_items[0] == num_rows
    return num_rows / seconds


def _command(folder: Path, num_rows: int, peaks: list[float], cpu: list[float]) -> float:
    """Run the command in a separate process; append its peak memory in GB and its CPU seconds."""
    usage = run_embedcache(["curate", "coverage", "pool", "concepts", "--modality", "text"], folder=folder)
    peaks.append(usage.peak_gb)
    cpu.append(usage.cpu_s)
    return num_rows / usage.seconds
