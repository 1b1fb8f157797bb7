"""Index building and search of a million vectors in clusters under two limits of memory; no query is in the index.

EMBEDCACHE_BENCH_VECTORS sets the number of vectors. Each build is the command in a process of its own; training, tuning
and measuring are included. Recall is that of the ten nearest of 1,000 queries, relative to an exhaustive search.
"""

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.data import cluster_vectors, write_clusters
from benchmarks.measure import run_command
from embedcache.arrays import normalize
from embedcache.cli.console import print_table
from embedcache.dataset.vectors import Vectors
from embedcache.neighbors.knn import knn_of_blocks
from embedcache.search.faiss_index import open_row_index, read_card
from embedcache.search.index import measure_latency_ms

VARIABLE = "EMBEDCACHE_BENCH_VECTORS"
WIDTH, NUM_QUERIES, K = 768, 1000, 10


def main(*, quick: bool) -> None:
    """Print recall, latency, build time and memory for two budgets of memory."""
    count = int(os.environ.get(VARIABLE, 1_000_000)) // (10 if quick else 1)
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        cache = write_clusters(folder / "cache", count, WIDTH)
        queries = normalize(cluster_vectors(range(count, count + NUM_QUERIES), WIDTH))
        truth, _ = knn_of_blocks(queries, Vectors(cache, "image").blocks(), K)

        for budget in (f"{4 * count}KB", f"{9 * count // 10}KB"):
            words = f"embedcache curate index cache {budget} --memory {budget}"
            usage = run_command(words.split(), folder=folder)
            path = folder / budget
            card = read_card(path)
            index = open_row_index(path, card)
            _, found = index.search(queries, K, card.search)
            recall = float(np.mean((found[:, :, None] == truth[:, None, :]).any(axis=2)))
            single_ms = measure_latency_ms(index, queries, K, card.search)
            started = time.perf_counter()
            index.search(queries, K, card.search)
            batch_ms = 1000 * (time.perf_counter() - started) / len(queries)
            size_mb = card.file_bytes / 1e6
            kind = " ".join([card.factory, *(f"{name} {value}" for name, value in card.search.items())])
            costs = [f"{usage.seconds:.1f}", f"{size_mb:,.0f}", f"{usage.peak_gb:.2f}"]
            rows.append([budget, kind, f"{recall:.3f}", f"{single_ms:.2f}", f"{batch_ms:.3f}", *costs])
    columns = ["memory", "kind", "recall@10", "ms per query", "ms in a batch", "build, s", "index, MB", "peak, GB"]
    print_table(columns, rows, title=f"{count:,} x {WIDTH}")
