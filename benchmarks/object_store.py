"""A cache on an object store: requests, errors, killed workers, leases, compaction and layouts, for a billion pairs.

embedcache's own store writes and reads through s3fs to an S3 server on loopback (`benchmarks/object_server.py`), with
injected latency and errors; the payload is metadata-sized, the encoder a stand-in, and no client imports torch. What
does not depend on the number of chunks is measured; the billion pairs are computed from it with the latencies below.

The environment variable EMBEDCACHE_BENCH_CHUNKS sets the number of chunks that are really written, 128 by default.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.data import RandomSource
from benchmarks.object_layout import TableSizes, compare_layouts, measure_tables
from benchmarks.object_server import BUCKET, Conditions, Proxy, client, object_store, one_client
from embedcache.arrays import Array
from embedcache.cli.console import print_table
from embedcache.encoders.base import Encoder, Fingerprint, ItemShape, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.encoders.settings import EncoderSettings
from embedcache.extract.engines import Worker
from embedcache.extract.settings import ExtractJob, ExtractSettings
from embedcache.files import open_path
from embedcache.locks import Leases
from embedcache.store.cache import Cache
from embedcache.store.indexing import index
from embedcache.store.verify import verify

VARIABLE = "EMBEDCACHE_BENCH_CHUNKS"
NUM_PAIRS, NUM_WORKERS = 1_000_000_000, 256
MEDIAN_MS = {"GET": 30.0, "HEAD": 30.0, "PUT": 60.0, "DELETE": 30.0, "LIST": 100.0}
"""Assumed medians of an object store in the same region; their means are 1.13 times as much."""

CONDITIONS = Conditions(median_ms=MEDIAN_MS, busy=0.01, lost=0.002)
_ROWS, _WIDTH, _CLIENTS, _PAGE = 16, 4, 4, 1000
_SPEC = "benchmarks.object_store:open_standin"


class Standin:
    """Encoder of texts with one feature, `vector` (4,), that costs nothing: the byte sums of four parts of a text."""

    modality: Modality = "text"
    batch_size = 1024
    features: Mapping[str, ItemShape] = {"vector": (_WIDTH,)}
    fingerprint = Fingerprint(
        family=_SPEC, model="standin", revision=None, weights="", preprocessing={}, pooling={"vector": "sum"}
    )

    def prepare(self, items: Sequence[str]) -> list[Array]:
        return [np.array([sum(item[part::_WIDTH].encode()) for part in range(_WIDTH)]) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        return {"vector": [item.astype(np.float32) for item in prepared]}


def open_standin(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder as `benchmarks.object_store:open_standin`."""
    return Standin()


def main(*, quick: bool) -> None:
    """Print one table per question."""
    num_chunks = int(os.environ.get(VARIABLE, 128)) // (8 if quick else 1)
    with object_store() as proxy:
        steps = _measure_steps(proxy)
        _kill_half(proxy, num_chunks)
        _compare_leases(proxy)
        compare_layouts(proxy)
    with TemporaryDirectory() as name:
        sizes = measure_tables(Path(name), num_groups=500 if quick else 5_000)
    _extrapolate(steps, sizes)


def _source(num_chunks: int) -> RandomSource:
    return RandomSource(num_chunks * _ROWS, num_captions=1, has_image=False)


def _worker(url: str, num_chunks: int, shard: str = "0/1") -> Worker:
    settings = ExtractSettings(shard=shard, devices=("cpu",), threads=1)
    source = _source(num_chunks)
    job = ExtractJob(cache=url, source=source.describe(), encoders={"text": (_SPEC + ":m",)}, settings=settings)
    return Worker(job, source=source)  # type: ignore[arg-type]


def _index(url: str, num_chunks: int) -> None:
    index(_source(num_chunks), open_path(url), chunk_size=_ROWS)


def _extract(url: str, num_chunks: int, shard: str = "0/1") -> int:
    """Return the number of chunks that this worker encoded."""
    return sum(len(report.chunks) for report in _worker(url, num_chunks, shard).run())


def _open(url: str, num_chunks: int) -> None:
    Cache(url).feature("text")


def _scan(url: str, num_chunks: int) -> None:
    assert not _worker(url, num_chunks).missing("text")


def _count(url: str, num_chunks: int) -> None:
    Cache(url).encoders("text")[0].count_items("vector", ())


def _read_commits(url: str, num_chunks: int) -> None:
    Cache(url).feature("text").require_complete()


def _read_rows(url: str, num_chunks: int) -> None:
    feature = Cache(url).feature("text")
    for commit in feature.commits:
        assert commit is not None
        list(feature.read_chunk(commit))


def _verify(url: str, num_chunks: int) -> None:
    assert not verify(Cache(url)), "expected an intact cache"


_STEPS: Mapping[str, Callable[..., Any]] = {
    "index": _index,
    "extract": _extract,
    "resume: find what is missing": _scan,
    "report: count items": _count,
    "open a feature": _open,
    "read all commits": _read_commits,
    "read all rows": _read_rows,
    "verify": _verify,
}


def _measure_steps(proxy: Proxy) -> dict[str, dict[str, float]]:
    """Return step -> kind of request -> requests per chunk; without latency or errors, from caches of two sizes."""
    small, large = 8, 24
    counts_of: dict[str, list[dict[str, int]]] = {name: [] for name in _STEPS}
    with one_client() as call:
        for num_chunks in (small, large):
            for name, step in _STEPS.items():
                proxy.clear()
                call(step, f"s3://{BUCKET}/{num_chunks}", num_chunks)
                counts_of[name].append(proxy.requests())
    per_chunk, rows = {}, []
    for name, counts in counts_of.items():
        kinds = sorted({*counts[0], *counts[1]})
        slope = {kind: (counts[1].get(kind, 0) - counts[0].get(kind, 0)) / (large - small) for kind in kinds}
        per_chunk[name] = slope
        once = sum(counts[0].values()) - small * sum(slope.values())
        rows.append(
            [name, *(f"{slope.get(kind, 0):.1f}" for kind in MEDIAN_MS), f"{sum(slope.values()):.1f}", f"{once:.0f}"]
        )
    print_table(["requests per chunk", *MEDIAN_MS, "all", "once"], rows, title="One encoder, one feature")
    return per_chunk


def _kill_half(proxy: Proxy, num_chunks: int) -> None:
    """Extract with injected latency and errors; kill half of the workers in the middle, and start them again."""
    url = f"s3://{BUCKET}/killed"
    with one_client() as call:
        call(_index, url, num_chunks)
    proxy.clear()
    proxy.conditions, context, started = CONDITIONS, get_context("spawn"), time.monotonic()

    def start(number: int) -> Any:
        process = context.Process(target=_extract, args=(url, num_chunks, f"{number}/{_CLIENTS}"))
        process.start()
        return process

    workers = [start(number) for number in range(_CLIENTS)]
    while len(proxy.commits) < num_chunks // 2:
        time.sleep(0.05)
    for worker in workers[::2]:
        worker.kill()
        worker.join()
    num_stored, killed = len(proxy.commits), time.monotonic()
    num_orphans = sum(what == "array" for what, _ in proxy.puts) - num_stored
    workers[::2] = [start(number) for number in range(0, _CLIENTS, 2)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, "expected every worker to finish"
    seconds, counts, injected = time.monotonic() - started, proxy.requests(), dict(proxy.injected)
    first = min(at for key, at in proxy.commits.items() if at > killed and _number(key) % 2 == 0)
    twice = sum(count > 1 for (what, _), count in proxy.puts.items() if what == "array")
    proxy.conditions = Conditions()
    verify_started = time.monotonic()
    with one_client() as call:
        call(_verify, url, num_chunks)
    rows = [
        ["seconds, all chunks", f"{seconds:.0f}"],
        ["requests per chunk, retries and openings included", f"{sum(counts.values()) / num_chunks:.1f}"],
        ["requests refused as busy; answers lost", f"{injected.get('busy', 0):,}; {injected.get('lost', 0):,}"],
        ["committed when half of the workers were killed", f"{num_stored:,}"],
        ["arrays without a commit at that moment", f"{num_orphans:,}"],
        ["arrays written twice in all", f"{twice:,}"],
        ["seconds from the restart to the first new commit of a restarted worker", f"{first - killed:.1f}"],
        ["findings of verify afterwards", "0"],
        ["seconds of verify, without latency", f"{time.monotonic() - verify_started:.0f}"],
    ]
    print_table(["", f"{num_chunks:,} chunks, {_CLIENTS} workers"], rows)


def _number(key: str) -> int:
    return int(Path(key).stem)


def _compare_leases(proxy: Proxy) -> None:
    """Compare leases on a local disk with none on an object store, and with objects that only one client can create."""
    rows = []
    for num_holders in (8, NUM_WORKERS):
        with TemporaryDirectory() as name, one_client() as call:
            lease_us = call(_hold_locally, Path(name), num_holders)
        rows.append([f"record locks on a local disk, {num_holders} processes", "0", "1.00", f"{lease_us:.0f}"])
    num_chunks, url = 32, f"s3://{BUCKET}/unshared"
    with ProcessPoolExecutor(_CLIENTS, mp_context=get_context("spawn")) as executor:
        executor.submit(_index, url, num_chunks).result()
        proxy.conditions = CONDITIONS
        encode, claim = partial(_extract, url, num_chunks), partial(_claim, num_chunks)
        encoded = sum(future.result() for future in [executor.submit(encode) for _ in range(_CLIENTS)])
        rows.append([f"object store, {_CLIENTS} workers without --shard", "0", f"{encoded / num_chunks:.2f}", ""])
        for order in ("in order", "from a random chunk"):
            proxy.clear()
            claimed = sum(
                future.result() for future in [executor.submit(claim, order, seed) for seed in range(_CLIENTS)]
            )
            assert claimed == num_chunks, "expected every lease to be granted once"
            requests = f"{sum(proxy.requests().values()) / num_chunks:.1f}"
            rows.append([f"conditional PUT, {_CLIENTS} workers, {order}", requests, "1.00", ""])
    proxy.conditions = Conditions()
    print_table(["leases", "requests per chunk", "encodings per chunk", "CPU microseconds per lease"], rows)


def _hold_locally(folder: Path, num_holders: int) -> float:
    """Return the microseconds of a lease while other processes hold one each."""
    held, done = get_context("fork").Semaphore(0), get_context("fork").Event()

    def hold(number: int) -> None:
        leases = Leases(folder)  # they end with the object
        assert leases.acquire(number)
        held.release()
        done.wait()

    holders = [get_context("fork").Process(target=hold, args=(number,)) for number in range(num_holders - 1)]
    for holder in holders:
        holder.start()
    for _ in holders:
        held.acquire()
    leases, count, started = Leases(folder), 2_000, time.process_time()
    granted = sum(leases.acquire(number % (2 * num_holders)) for number in range(count))
    seconds = time.process_time() - started
    done.set()
    for holder in holders:
        holder.join()
    assert 0 < granted < count, "expected some leases to be held by others"
    return 1e6 * seconds / count


def _claim(num_chunks: int, order: str, seed: int) -> int:
    """Return how many leases this client got: objects that are created only if they do not exist."""
    s3, first = client(), 0 if order == "in order" else int(np.random.default_rng(seed).integers(num_chunks))
    claimed = 0
    for number in range(num_chunks):
        key = f"{order}/{(first + number) % num_chunks:05d}.lease"
        try:
            s3.put_object(Bucket=BUCKET, Key=key, Body=b"", IfNoneMatch="*")
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise
        else:
            claimed += 1
            time.sleep(0.02)  # the stand-in for encoding
    return claimed


def _extrapolate(steps: Mapping[str, Mapping[str, float]], sizes: TableSizes) -> None:
    """Compute times and bytes for a billion pairs: the requests of one process follow one another."""
    mean = math.exp(CONDITIONS.spread**2 / 2) / 1000
    seconds = {
        name: sum(MEDIAN_MS[kind] * mean * count for kind, count in kinds.items()) for name, kinds in steps.items()
    }
    layouts = [(2_048, 1), (16_384, 1), (65_536, 1), (16_384, 50)]
    chunks = [2 * math.ceil(NUM_PAIRS / num_caches / size) for size, num_caches in layouts]
    workers = [max(1, NUM_WORKERS // num_caches) for _, num_caches in layouts]
    items = [2 * NUM_PAIRS / num_caches for _, num_caches in layouts]
    parse_s = [count * sizes.parse_commit_us / 2_048 / 1e6 for count in items]

    def times(step: str, num_processes: Sequence[int]) -> list[str]:
        return [_time(count * seconds[step] / number) for count, number in zip(chunks, num_processes, strict=True)]

    rows = [
        ["caches", *(f"{num_caches}" for _, num_caches in layouts)],
        ["chunks per cache", *(f"{count:,}" for count in chunks)],
        ["workers per cache", *(f"{number}" for number in workers)],
        ["requests of a worker: extract", *times("extract", workers)],
        ["a worker finds what is missing", *times("resume: find what is missing", workers)],
        ["a command counts the items at its end", *times("report: count items", [1] * 4)],
        ["a reader reads all commits", *times("read all commits", [1] * 4)],
        ["a reader parses them", *map(_time, parse_s)],
        ["requests of verify", *times("verify", [1] * 4)],
        ["pages of the listing of a folder of commits", *(f"{math.ceil(count / 2 / _PAGE):,}" for count in chunks)],
        ["footer of an item table, MB", *(f"{count / 2 * sizes.footer_bytes / 1e6:.1f}" for count in chunks)],
        ["commits, GB", *(f"{count * sizes.commit_bytes / 2_048 / 1e9:.1f}" for count in items)],
        ["the same compacted, GB", *(f"{count * sizes.compacted_bytes / 2_048 / 1e9:.2f}" for count in items)],
    ]
    header = ["items per chunk", *(f"{size:,}" for size, _ in layouts)]
    print_table(header, rows, title=f"1 B images with 1 B captions, {NUM_WORKERS} workers, computed")


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"
