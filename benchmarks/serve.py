"""The search page under load on loopback: queries per second, latency, errors and memory, up to a million vectors.

Start the server as users do and query its JSON API over keep-alive connections; each connection sends the next query
when it has received an answer. The client competes for the same cores. The first index is OpenMoji with its real
encoders and distinct query texts. The second one holds a million clustered vectors of width 256
(`benchmarks/clusters.py`; the environment variable EMBEDCACHE_BENCH_VECTORS sets another number), whose encoder costs
nothing, so that only the search is measured: without a filter, and with filters that keep 1/2 and 1/100 of the items.

`python -m benchmarks serve-load` measures the first index under 32 connections only, with a server that freezes its
objects before it serves and with one that does not, in turn. `serve-map` draws the map of 100,000 clustered vectors in
headless Chromium, and counts what it transfers.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.data import write_captions
from benchmarks.search import VARIABLE
from embedcache.cli.console import print_line, print_table
from embedcache.dataset.settings import SplitSettings
from embedcache.extract.extract import extract
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train

_ENCODER = "benchmarks.clusters:open_clusters,width=256"
_FACTORY = "IVF2048,SQ8"
_UNFROZEN = ("-c", "import gc; gc.freeze = lambda: None; from embedcache.cli.main import main; main()")
"""Program that serves as before objects were frozen."""
_COLUMNS = [
    "", "connections", "queries", "errors", "queries/s", "p50, ms", "p99, ms", "p99 / p50", "search p50, ms",
    "search p99, ms", "memory first, MB", "last, MB",
]  # fmt: skip


@dataclass
class Load:
    """Measurements of the clients: response times, search times as reported by the server, and errors."""

    answers_ms: list[float] = field(default_factory=list)
    search_ms: list[float] = field(default_factory=list)
    errors: int = 0


def main(*, quick: bool) -> None:
    """Print one row per load."""
    seconds = 2.0 if quick else 15.0
    with TemporaryDirectory() as name:
        folder = Path(name)
        index = _openmoji(folder / "openmoji")
        texts = write_captions(5_000 if quick else 50_000)
        _compare(index, texts, seconds)
        with _server(index) as (address, process):
            loads = ((f"{connections} at a time", connections, seconds) for connections in (1, 8, 32))
            rows = [_row(*load, address, process, texts, {}) for load in loads]
            rows.append(_row("long run", 32, 8 * seconds, address, process, texts, {}))
        print_table(_COLUMNS, rows, title="OpenMoji, 1,893 images, MiniLM, 60 hits per query")
        num = int(os.environ.get(VARIABLE, 1_000_000)) // (20 if quick else 1)
        index, selections = _clusters(folder / "clusters", num)
        numbers = [str(number) for number in range(num, num + 50_000)]
        with _server(index, *(word for path in selections for word in ("--selection", str(path)))) as (
            address,
            process,
        ):
            rows = [
                _row(title, connections, seconds, address, process, numbers, filters)
                for connections in (1, 16)
                for title, filters in (
                    ("all", {}),
                    ("1/2", {"selection": "half"}),
                    ("1/100", {"selection": "hundredth"}),
                )
            ]
        print_table(_COLUMNS, rows, title=f"{num:,} x 256, {_FACTORY}, 60 hits per query")


def under_load(*, quick: bool) -> None:
    """Print response times under load with and without frozen objects."""
    with TemporaryDirectory() as name:
        index = _openmoji(Path(name) / "openmoji")
        _compare(index, write_captions(5_000 if quick else 50_000), 4.0 if quick else 15.0)


def draw_map(*, quick: bool) -> None:
    """Print the time until there is a map, the bytes that the page loads, and the time to draw a frame of the map."""
    from playwright.sync_api import sync_playwright

    num = int(os.environ.get(VARIABLE, 10_000 if quick else 100_000))
    with TemporaryDirectory() as name, sync_playwright() as playwright:
        index, _ = _clusters(Path(name) / "clusters", num)
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        with _server(index) as (address, _):
            started, page = time.perf_counter(), browser.new_page(viewport={"width": 1280, "height": 860})
            sizes: dict[str, int] = {}
            page.on("requestfinished", lambda one: sizes.update({one.url: one.sizes()["responseBodySize"]}))
            page.set_default_timeout(600_000)
            page.goto(address)
            page.wait_for_selector("#sample .hit")
            opened = time.perf_counter() - started
            page.click("#tab-map")
            page.wait_for_function("() => document.querySelector('.frame canvas')?.dataset.ms")
            drawn = page.evaluate(_DRAW_FRAMES, 30 if quick else 100)
        browser.close()
    elsewhere = [url for url in sizes if not url.startswith(address)]
    points = next(size for url, size in sizes.items() if "/api/map/points" in url)
    rows = [
        [title, str(len(ms)), *(f"{np.percentile(ms, percentile):.1f}" for percentile in (50, 99))]
        for title, ms in drawn.items()
    ]
    print_table(["", "frames", "p50, ms", "p99, ms"], rows, title=f"{num:,} points on 950 x 600 pixels")
    print_line(
        f"sample shown {opened:.1f} s after the link was printed; points {points:,} bytes, all {sum(sizes.values()):,} "
        f"bytes in {len(sizes)} requests, {len(elsewhere)} to other servers"
    )


_DRAW_FRAMES = """async (number) => {
  const frame = document.querySelector(".frame");
  const next = () => new Promise((resolve) => requestAnimationFrame(resolve));
  const found = {};
  const moves = { moved: ["ArrowLeft", "ArrowRight"], zoomed: ["+", "+", "ArrowLeft", "-", "-", "ArrowRight"] };
  for (const [title, keys] of Object.entries(moves)) {
    found[title] = [];
    for (let i = 0; i < number; i += 1) {
      const key = keys[i % keys.length];
      frame.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
      await next();
      await next();
      found[title].push(Number(frame.querySelector("canvas").dataset.ms));
    }
  }
  return found;
}"""


def _compare(index: Path, texts: Sequence[str], seconds: float) -> None:
    """Print two rows for each server, which are loaded in turn so that a slow minute affects both."""
    with _server(index, program=_UNFROZEN) as (before, unfrozen), _server(index) as (after, frozen):
        rows = [
            _row(title, 32, seconds, address, process, texts, {})
            for _ in range(2)
            for title, address, process in (("collected", before, unfrozen), ("frozen", after, frozen))
        ]
    print_table(_COLUMNS, rows, title="objects of the encoders collected by the garbage collector, and frozen")


def _row(
    title: str,
    connections: int,
    seconds: float,
    address: str,
    process: "subprocess.Popen[str]",
    texts: Sequence[str],
    filters: Mapping[str, Any],
) -> list[str]:
    asyncio.run(_load(address, connections, 0.1 * seconds, texts, filters))  # a filter is read once, memory fills
    first, started = _memory_mb(process), time.perf_counter()
    load = asyncio.run(_load(address, connections, seconds, texts, filters))
    elapsed = time.perf_counter() - started
    num_answers = len(load.answers_ms)
    return [
        title, str(connections), f"{num_answers:,}", str(load.errors), f"{num_answers / elapsed:,.0f}",
        *(f"{np.percentile(load.answers_ms, percentile):.1f}" for percentile in (50, 99)),
        f"{np.percentile(load.answers_ms, 99) / np.percentile(load.answers_ms, 50):.1f}",
        *(f"{np.percentile(load.search_ms, percentile):.1f}" for percentile in (50, 99)),
        f"{first:,.0f}", f"{_memory_mb(process):,.0f}",
    ]  # fmt: skip


async def _load(
    address: str, connections: int, seconds: float, texts: Sequence[str], filters: Mapping[str, Any]
) -> Load:
    load, numbers, until = Load(), count(), time.perf_counter() + seconds
    await asyncio.gather(*(_client(address, load, numbers, until, texts, filters) for _ in range(connections)))
    return load


async def _client(
    address: str, load: Load, numbers: Iterator[int], until: float, texts: Sequence[str], filters: Mapping[str, Any]
) -> None:
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    while time.perf_counter() < until:
        body = json.dumps({"text": texts[next(numbers) % len(texts)], **filters}).encode()
        started = time.perf_counter()
        head = f"POST /api/search HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status, answer = await _read(reader)
        response = json.loads(answer)
        if status != 200 or not response.get("hits"):  # a response without hits is an error, too
            load.errors += 1
            continue
        load.answers_ms.append(1000 * (time.perf_counter() - started))
        load.search_ms.append(response["search_ms"])
    writer.close()


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


@contextmanager
def _server(
    index: Path, *words: str, program: Sequence[str] = ("-m", "embedcache")
) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    command = [sys.executable, *program, "serve", str(index), "--port", "0", "--trust", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("open http")), process
        process.terminate()


def _memory_mb(process: "subprocess.Popen[str]") -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1000


def _openmoji(folder: Path) -> Path:
    extract(
        open_source("openmoji:en"),
        folder / "cache",
        image_encoder=["lite:efficientnet-lite0"],
        text_encoder=["st:all-MiniLM-L6-v2"],
    )
    settings = TrainSettings(
        model=ModelSettings(projector="linear"), optimizer=OptimizerSettings(epochs=0), split=SplitSettings(kind="key")
    )
    train(folder / "cache", folder / "run", settings=settings)
    build_index(folder / "cache", folder / "index", IndexSettings(run=folder / "run"))
    return folder / "index"


def _clusters(folder: Path, num: int) -> tuple[Path, list[Path]]:
    folder.mkdir()
    started = time.perf_counter()
    (folder / "numbers.txt").write_text("".join(f"{number}\n" for number in range(num)))
    extract(open_source(folder / "numbers.txt"), folder / "cache", text_encoder=[_ENCODER])
    extracted = time.perf_counter()
    card = build_index(folder / "cache", folder / "index", IndexSettings(modality="text", factory=_FACTORY))
    built = time.perf_counter() - extracted
    print_line(
        f"{num:,}: extracted in {extracted - started:.0f} s, indexed in {built:.0f} s, recall {card.recall_at_10:.3f}"
    )
    keys = Cache(folder / "cache").samples["key"].to_pylist()
    for name, step in (("half", 2), ("hundredth", 100)):
        (folder / f"{name}.txt").write_text("".join(f"{key}\n" for key in keys[::step]))
    return folder / "index", [folder / "half.txt", folder / "hundredth.txt"]
