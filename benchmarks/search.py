"""Index building and search under a memory limit, against autofaiss 2.18 with the same memory, vectors and queries.

Two data sets: a million vectors in clusters (`benchmarks/clusters.py`; EMBEDCACHE_BENCH_VECTORS sets the number), and
150,000 sentences, CuPL's prompts for ImageNet by wordllama, searched with `a photo of a …`. No query is in an index,
and neither tool has seen one. Each build runs in a separate process, training and tuning included. autofaiss needs
numpy<2: the benchmark creates an environment for it, or skips it if pip cannot; EMBEDCACHE_BENCH_AUTOFAISS names the
Python of an existing environment.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.clusters import Clusters
from embedcache.arrays import Floats, Ints, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.extract.extract import extract
from embedcache.records import peak_memory_bytes
from embedcache.search.card import read_card
from embedcache.search.faiss_index import exact_search, read_index
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.search.vectors import Vectors
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.units import parse_size

VARIABLE = "EMBEDCACHE_BENCH_VECTORS"
PEER_VARIABLE = "EMBEDCACHE_BENCH_AUTOFAISS"
_NUM_QUERIES = 1000
_K = 10
_PEER = Path(__file__).with_name("peer_autofaiss.py")
_SENTENCES = "wordllama:l2_supercat_256"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Rows (Q, K) found by a tool, with its time and memory."""

    kind: str
    rows: Ints
    build_s: float
    peak_bytes: int
    size_bytes: int
    single_ms: float
    batch_ms: float


def main(*, quick: bool) -> None:
    """Print recall, latency, build time and memory side by side, for each set and two budgets of memory."""
    count = int(os.environ.get(VARIABLE, 1_000_000)) // (10 if quick else 1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        python = _peer_environment(folder / "autofaiss")
        for set_name, make, budgets in (
            ("sentences", _sentences, ("1G", "50M")),
            ("clusters", _clusters, (f"{4 * count // 1000}M", f"{9 * count // 10_000}M")),
        ):
            cache_path, queries = make(folder / set_name, count)
            vectors = Vectors(cache_path, "text")
            _, truth = exact_search(queries, vectors.blocks(), _K)
            _write_for_peer(folder / set_name, vectors, queries)
            for budget in budgets:
                _compare(folder / set_name, cache_path, vectors, truth, budget, python)


def _compare(folder: Path, cache: Path, vectors: Vectors, truth: Ints, budget: str, python: Path | None) -> None:
    results = {"embedcache": _run_embedcache(folder, cache, budget)}
    if python is not None:
        peer = _run_autofaiss(folder, budget, python)
        results |= {} if peer is None else {"autofaiss": peer}
    rows = [[name, one.kind, *_figures(one, truth)] for name, one in results.items()]
    title = f"{folder.name}, {len(vectors.rows):,} x {vectors.width}, memory {budget}"
    columns = ["", "kind", "recall@10", "ms per query", "ms per query in a batch", "build, s", "index, MB", "peak, GB"]
    print_table(columns, rows, title=title)


def _figures(one: SearchResult, truth: Ints) -> list[str]:
    recall = float(np.mean((one.rows[:, :, None] == truth[:, None, :]).any(axis=2)))
    return [
        f"{recall:.3f}", f"{one.single_ms:.2f}", f"{one.batch_ms:.3f}", f"{one.build_s:.1f}",
        f"{one.size_bytes / 1e6:,.0f}", f"{one.peak_bytes / 1e9:.2f}",
    ]  # fmt: skip


def _run_embedcache(folder: Path, cache_path: Path, budget: str) -> SearchResult:
    index_path = folder / f"index-{budget}"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        build_s, peak = executor.submit(_build, cache_path, index_path, budget).result()
    index, card = read_index(index_path / "index.faiss"), read_card(index_path)
    queries = np.load(folder / "queries.npy")
    single_ms, batch_ms = index.measure_latency_ms(queries, _K, card.search)
    parameters = " ".join(f"{name} {value}" for name, value in card.search.items())
    return SearchResult(
        kind=f"{card.factory} {parameters}",
        rows=index.search(queries, _K, card.search)[1],
        build_s=build_s,
        peak_bytes=peak,
        size_bytes=(index_path / "index.faiss").stat().st_size,
        single_ms=single_ms,
        batch_ms=batch_ms,
    )


def _build(cache_path: Path, index_path: Path, budget: str) -> tuple[float, int]:
    started = time.perf_counter()
    build_index(cache_path, index_path, IndexSettings(modality="text", memory=parse_size(budget)))
    return time.perf_counter() - started, peak_memory_bytes()


def _run_autofaiss(folder: Path, budget: str, python: Path) -> SearchResult | None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (folder / "answers.npz").unlink(missing_ok=True)
    done = subprocess.run([python, _PEER, folder, budget, str(_K)], check=False, env=clean, capture_output=True)
    if done.returncode:
        print_line(f"autofaiss with {budget} failed: {''.join(done.stderr.decode().strip().splitlines()[-1:])}")
        return None
    with np.load(folder / "answers.npz") as answers:
        return SearchResult(
            kind=str(answers["kind"]),
            rows=answers["rows"],
            build_s=float(answers["build_s"]),
            peak_bytes=int(answers["peak"]),
            size_bytes=int(answers["size"]),
            single_ms=float(answers["single_ms"]),
            batch_ms=float(answers["batch_ms"]),
        )


def _clusters(folder: Path, count: int) -> tuple[Path, Floats]:
    folder.mkdir()
    (folder / "numbers.txt").write_text("".join(f"{number}\n" for number in range(count)))
    extract(open_source(folder / "numbers.txt"), folder / "cache", text_encoder=["benchmarks.clusters:open_clusters"])
    return folder / "cache", normalize(Clusters().vectors(np.arange(count, count + _NUM_QUERIES)))


def _sentences(folder: Path, count: int) -> tuple[Path, Floats]:
    """Encode all of CuPL, whatever the count: it takes seconds."""
    for name, prompts in (("cache", "imagenet1k+cupl"), ("queries", "imagenet1k+imagenet1k")):
        extract(open_source(f"prompts:{prompts}"), folder / name, text_encoder=[_SENTENCES])
    queries = Vectors(folder / "queries", "text")
    texts = Cache(folder / "queries").items("text")["text"].to_pylist()
    rows = [row for row in queries.rows if texts[row].startswith("a photo of a ")]
    return folder / "cache", queries.read(np.array(rows)[:_NUM_QUERIES])


def _write_for_peer(folder: Path, vectors: Vectors, queries: Floats) -> None:
    (folder / "vectors").mkdir()
    np.save(folder / "vectors" / "0.npy", np.concatenate([block for _, block in vectors.blocks()]))
    np.save(folder / "queries.npy", queries)


def _peer_environment(folder: Path) -> Path | None:
    if PEER_VARIABLE in os.environ:
        return Path(os.environ[PEER_VARIABLE])
    python = folder / "bin" / "python"
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
        packages = ["autofaiss==2.18.0", "faiss-cpu<1.11", "numpy<2", "pyarrow<20"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode().strip().splitlines()[-1:]
        print_line(f"autofaiss skipped: pip cannot install it: {''.join(last)}")
        return None
    return python
