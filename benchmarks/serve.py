"""The search page under load on loopback: queries per second, latency, errors and memory, up to a million vectors.

The server is started as users do, and its JSON API queried over keep-alive connections; each connection sends the next
query when it has received an answer. The client competes for the same cores. The first index is OpenMoji with its real
encoders and distinct query texts. The second one has a million clustered vectors of width 256 (EMBEDCACHE_BENCH_VECTORS
sets another number) and is queried by keys, so that no encoder runs.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import numpy as np

from benchmarks.data import write_captions, write_clusters
from benchmarks.measure import run_command
from benchmarks.search import VARIABLE
from embedcache.cli.console import print_table
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings

_FACTORY = "IVF2048,SQ8"
_COLUMNS = [
    "connections", "queries", "queries/s", "p50, ms", "p99, ms", "search p50, ms", "search p99, ms",
    "memory first, MB", "last, MB",
]  # fmt: skip


def main(*, quick: bool) -> None:
    """Print one row per load."""
    seconds = 2.0 if quick else 15.0
    texts = [{"text": text} for text in write_captions(5_000 if quick else 50_000)]
    num = int(os.environ.get(VARIABLE, 1_000_000)) // (20 if quick else 1)
    keys = [{"key": f"{row:07}"} for row in range(0, num, 7)]
    with TemporaryDirectory() as name:
        folder = Path(name)
        with _serve(_index_openmoji(folder / "openmoji")) as (address, pid):
            rows = [_measure(number, seconds, address, pid, texts) for number in (1, 8, 32)]
            rows.append(_measure(32, 8 * seconds, address, pid, texts))
        print_table(_COLUMNS, rows, title="OpenMoji, 1,893 images, MiniLM, 60 hits per query")

        with _serve(_index_clusters(folder / "clusters", num)) as (address, pid):
            rows = [_measure(number, seconds, address, pid, keys) for number in (1, 16)]
        print_table(_COLUMNS, rows, title=f"{num:,} x 256, {_FACTORY}, 60 hits per query")


def _measure(
    connections: int, seconds: float, address: str, pid: int, queries: Sequence[Mapping[str, str]]
) -> list[str]:
    asyncio.run(_query(address, connections, 0.1 * seconds, queries))  # memory fills
    first_mb, started = _memory_mb(pid), time.perf_counter()
    times = asyncio.run(_query(address, connections, seconds, queries))
    elapsed = time.perf_counter() - started

    answer_ms, search_ms = (np.percentile(column, [50, 99]) for column in zip(*times, strict=True))
    figures = [f"{ms:.1f}" for ms in (*answer_ms, *search_ms)]
    memory = [f"{mb:,.0f}" for mb in (first_mb, _memory_mb(pid))]
    return [str(connections), f"{len(times):,}", f"{len(times) / elapsed:,.0f}", *figures, *memory]


async def _query(
    address: str, connections: int, seconds: float, queries: Sequence[Mapping[str, str]]
) -> list[tuple[float, float]]:
    """Return the milliseconds of each answer, and those of its search as the server reports them."""
    times: list[tuple[float, float]] = []
    bodies, until = cycle(json.dumps(query).encode() for query in queries), time.perf_counter() + seconds
    parts = urlsplit(address)
    head = f"POST /api/search HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"

    async def run_client() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        while time.perf_counter() < until:
            body = next(bodies)
            started = time.perf_counter()
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
            response = json.loads(await reader.readexactly(length))
            assert response.get("hits"), response
            times.append((1000 * (time.perf_counter() - started), response["search_ms"]))
        writer.close()

    await asyncio.gather(*(run_client() for _ in range(connections)))
    return times


@contextmanager
def _serve(index: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "embedcache", "serve", str(index), "--port", "0", "--trust"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("open http")), process.pid
        process.terminate()


def _memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1000


def _index_openmoji(folder: Path) -> Path:
    folder.mkdir()
    for words in (
        "extract openmoji:en cache --image-encoder lite:efficientnet-lite0 --text-encoder st:all-MiniLM-L6-v2",
        "train cache run --projector linear --epochs 0 --split key",
        "curate index cache index --run run",
    ):
        run_command(["embedcache", *words.split()], folder=folder)
    return folder / "index"


def _index_clusters(folder: Path, num: int) -> Path:
    cache = write_clusters(folder / "cache", num, 256)
    build_index(cache, folder / "index", IndexSettings(factory=_FACTORY))
    return folder / "index"
