"""Concept coverage of 300,000 x 512 float16 vectors on disk, 3,000 concepts, against the bare matrix product.

The baseline multiplies one chunk in memory, 2,048 x 512 float32, with the concepts once per chunk of the pool, without
reading, normalizing or counting, by NumPy and by torch; the faster one is the floor. Each item is near two of the 3,000
concepts. The command runs in a separate process, from start to table. Measurements alternate; medians are shown. CPU
seconds are the minimum, which other processes disturb less than the clock.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import RandomSource, write_random_cache
from benchmarks.measure import median_rates, run_command
from embedcache.arrays import Floats, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.curate.coverage import SAMPLE, CoverageCounter, estimate_background
from embedcache.dataset.vectors import Vectors
from embedcache.neighbors.knn import scan
from embedcache.search.concepts import open_concepts

ROWS, WIDTH, NUM_CONCEPTS, CHUNK, K = 300_000, 512, 3_000, 2_048, 10


def main(*, quick: bool) -> None:
    """Print items per second."""
    num_rows = ROWS // 10 if quick else ROWS
    directions_CD = normalize(np.random.default_rng(0).standard_normal((NUM_CONCEPTS, WIDTH)))
    products = {"product by NumPy": _numpy_product(directions_CD), "product by torch": _torch_product(directions_CD)}
    cpu: dict[str, list[float]] = {name: [] for name in (*products, "the pass", "the command")}
    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_caches(folder, num_rows, directions_CD)
        calls = {name: partial(_product_rate, num_rows, product, cpu[name]) for name, product in products.items()}
        calls["the pass"] = partial(_pass_rate, folder, num_rows, cpu["the pass"])
        calls["the command"] = partial(_command_rate, folder, num_rows, peaks, cpu["the command"])
        rates = median_rates(calls, repeats=1 if quick else 3)

    fastest = max(products, key=lambda name: rates[name])
    rows = []
    for name, rate in rates.items():
        cpu_s = min(cpu[name])
        ratios = rate / rates[fastest], min(cpu[fastest]) / cpu_s
        rows.append([name, f"{rate:,.0f}", f"{ratios[0]:.2f}", f"{cpu_s:.1f}", f"{ratios[1]:.2f}"])
    title = f"{num_rows:,} x {WIDTH}, {NUM_CONCEPTS:,} concepts"
    print_table([title, "items/s", "relative to the product", "CPU s", "relative to the product"], rows)
    print_line(f"peak memory of the command {max(peaks):.2f} GB")


def _write_caches(folder: Path, num_rows: int, directions_CD: Floats) -> None:
    def draw_near_two(rng: np.random.Generator, rows: range) -> Floats:
        first, second = rng.integers(0, NUM_CONCEPTS, (2, len(rows)))
        noise = rng.standard_normal((len(rows), WIDTH), np.float32) / np.float32(np.sqrt(WIDTH))
        return noise + 0.5 * directions_CD[first] + 0.3 * directions_CD[second]

    concepts = RandomSource(num_samples=NUM_CONCEPTS, num_captions=1, has_image=False)
    write_random_cache(
        folder / "concepts", concepts, WIDTH, seed=1, draw=lambda _, rows: directions_CD[rows.start : rows.stop]
    )
    pool = RandomSource(num_samples=num_rows, num_captions=1, has_image=False)
    write_random_cache(folder / "pool", pool, WIDTH, seed=2, draw=draw_near_two)


def _numpy_product(directions_CD: Floats) -> Callable[[], object]:
    chunk_BD, columns_DC = np.ones((CHUNK, WIDTH), np.float32), np.ascontiguousarray(directions_CD.T)
    return partial(np.matmul, chunk_BD, columns_DC, out=np.empty((CHUNK, NUM_CONCEPTS), np.float32))


def _torch_product(directions_CD: Floats) -> Callable[[], object]:
    columns_DC = torch.from_numpy(np.ascontiguousarray(directions_CD.T))
    return partial(torch.mm, torch.ones(CHUNK, WIDTH), columns_DC, out=torch.empty(CHUNK, NUM_CONCEPTS))


def _product_rate(num_rows: int, product: Callable[[], object], cpu: list[float]) -> float:
    num_chunks = -(-num_rows // CHUNK)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_chunks):
        product()
    cpu.append(time.process_time() - cpu_started)
    return num_chunks * CHUNK / (time.perf_counter() - started)


def _pass_rate(folder: Path, num_rows: int, cpu: list[float]) -> float:
    pool = Vectors(folder / "pool", "text")
    concepts = open_concepts(folder / "concepts", pool)
    background = estimate_background(concepts.vectors, pool.sample(SAMPLE), K)
    work = CoverageCounter(concepts.vectors, background, k=K)

    started, cpu_started = time.perf_counter(), time.process_time()
    counts = reduce(work.merge, scan(pool, work.process), work.empty())
    seconds = time.perf_counter() - started
    cpu.append(time.process_time() - cpu_started)
    assert counts.num_items[0] == num_rows
    return num_rows / seconds


def _command_rate(folder: Path, num_rows: int, peaks: list[float], cpu: list[float]) -> float:
    words = ["embedcache", "curate", "coverage", "pool", "concepts", "--modality", "text"]
    usage = run_command(words, folder=folder)
    peaks.append(usage.peak_gb)
    cpu.append(usage.cpu_s)
    return num_rows / usage.seconds
