"""Layouts of a cache: Zarr shards against plain chunks on an object store, and how tables and commits grow."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.object_server import BUCKET, Proxy, one_client
from embedcache.cli.console import print_table
from embedcache.files import open_path
from embedcache.sources.base import FileItem, Sample
from embedcache.store.commits import Commit, read_commit, write_commit
from embedcache.store.layout import commit_path, items_path
from embedcache.store.table_writer import TableWriter
from embedcache.store.tables import open_table

_NUM_ROWS, _WIDTH, _NUM_RANDOM, _COMMIT_ROWS = 16_384, 64, 32, 2_048
_ROW_BYTES = 2 * _WIDTH


def compare_layouts(proxy: Proxy) -> None:
    """Print requests and bytes of plain chunks and of shards of smaller chunks, written and read by zarr-python."""
    rows = []
    with one_client() as call:

        def count(step: Callable[..., None], url: str, size: int, inner: int | None) -> list[str]:
            proxy.clear()
            call(step, url, size, inner)
            return [f"{sum(proxy.requests().values())}", f"{max(proxy.sent, proxy.received) / 1e6:.2f}"]

        for size, inner in ((256, None), (2_048, None), (2_048, 256), (16_384, None), (16_384, 256)):
            url = f"s3://{BUCKET}/layout-{size}-{inner}"
            cells = [cell for step in (_write, _read, _gather) for cell in count(step, url, size, inner)]
            title = f"chunks of {size:,}" if inner is None else f"shards of {size:,}, chunks of {inner}"
            rows.append([title, f"{_NUM_ROWS // size}", *cells])
        cells = count(_gather_ranges, f"s3://{BUCKET}/layout-16384-None", 16_384, None)
    rows.append(["chunks of 16,384, byte ranges", "1", "", "", "", "", *cells])
    header = ["rows", "objects", "write", "MB", "read all", "MB", f"{_NUM_RANDOM} random rows", "MB"]
    print_table(header, rows, title=f"{_NUM_ROWS:,} x {_WIDTH} float16, uncompressed: requests and MB")


def _write(url: str, size: int, inner: int | None) -> None:
    import zarr

    array = zarr.create_array(
        url,
        shape=(_NUM_ROWS, _WIDTH),
        dtype="float16",
        chunks=(inner or size, _WIDTH),
        shards=(size, _WIDTH) if inner else None,
        filters=None,
        compressors=None,
    )
    for start in range(0, _NUM_ROWS, size):
        array[start : start + size] = np.full(
            (size, _WIDTH), 1 + start, np.float16
        )  # chunks of the fill value are not stored


def _read(url: str, size: int, inner: int | None) -> None:
    import zarr

    array = zarr.open_array(url, mode="r")
    for start in range(0, _NUM_ROWS, size):
        array[start : start + size]


def _random_rows() -> list[int]:
    return [int(row) for row in np.random.default_rng(0).integers(0, _NUM_ROWS, _NUM_RANDOM)]


def _gather(url: str, size: int, inner: int | None) -> None:
    import zarr

    array = zarr.open_array(url, mode="r")
    for row in _random_rows():
        array[row]


def _gather_ranges(url: str, size: int, inner: int | None) -> None:
    """Read rows of an uncompressed chunk by their byte range, which needs no shards."""
    path = open_path(url)
    for row in _random_rows():
        key = f"{path.path}/c/{row // size}/0"  # type: ignore[attr-defined]
        start = row % size * _ROW_BYTES
        data = path.fs.cat_file(key, start=start, end=start + _ROW_BYTES)  # type: ignore[attr-defined]
        assert len(data) == _ROW_BYTES


@dataclass(frozen=True, kw_only=True)
class TableSizes:
    """Sizes that grow with the number of chunks or items.

    Args:
        footer_bytes: bytes in the footer of an item table per row group, that is, per chunk.
        commit_bytes, parse_commit_us: of a commit of 2,048 items of which 1% failed.
        compacted_bytes: per such commit in one table of all commits, without the hashes of items.
    """

    footer_bytes: float
    commit_bytes: float
    parse_commit_us: float
    compacted_bytes: float


def measure_tables(folder: Path, *, num_groups: int) -> TableSizes:
    """Write an item table of many row groups, a commit, and a table of as many commits; print and return the sizes."""
    writer = TableWriter(folder / "cache", chunk_size=2)
    for start in range(0, 2 * num_groups, 1_000):
        numbers = range(start, min(start + 1_000, 2 * num_groups))
        writer.add([_sample(number) for number in numbers])
    writer.close()
    started = time.process_time()
    with open_table(items_path(folder / "cache", "image")) as table:
        footer_s = time.process_time() - started
        footer_bytes = table.metadata.serialized_size / num_groups

    rng = np.random.default_rng(0)
    commit = _commit(rng)
    write_commit(folder, commit)
    commit_bytes = commit_path(folder, 0).stat().st_size
    started = time.process_time()
    for _ in range(20):
        read_commit(folder, 0)
    parse_us = 1e6 * (time.process_time() - started) / 20

    num_failures = sum(reason is not None for reason in commit.failures["cls"])
    compacted = pa.table(
        {
            "chunk": np.arange(num_groups),
            "crc": [f"{rng.integers(2**32):08x}" for _ in range(num_groups)],
            "offsets": [rng.integers(0, _COMMIT_ROWS, num_failures, np.int32) for _ in range(num_groups)],
            "reasons": [[_reason(rng) for _ in range(num_failures)] for _ in range(num_groups)],
        }
    )
    pq.write_table(compacted, folder / "commits.parquet")
    started = time.process_time()
    pq.read_table(folder / "commits.parquet", use_threads=False)
    compacted_s = time.process_time() - started
    compacted_bytes = (folder / "commits.parquet").stat().st_size / num_groups
    rows = [
        ["footer of an item table, per chunk", f"{footer_bytes:.0f}", f"{1e6 * footer_s / num_groups:.1f}"],
        ["commit of 2,048 items, 1% failed", f"{commit_bytes:,.0f}", f"{parse_us:.0f}"],
        ["the same in one table, without hashes", f"{compacted_bytes:.0f}", f"{1e6 * compacted_s / num_groups:.1f}"],
    ]
    print_table(["", "bytes", "CPU microseconds to read"], rows, title=f"Local disk, {num_groups:,} chunks")
    return TableSizes(
        footer_bytes=footer_bytes,
        commit_bytes=commit_bytes,
        parse_commit_us=parse_us,
        compacted_bytes=compacted_bytes,
    )


def _sample(number: int) -> Sample:
    image = FileItem(path=f"shards/{number // 10_000:05d}.tar", offset=number * 51_200, length=50_000)
    return Sample(key=f"{number:010d}", images=(image,))


def _commit(rng: np.random.Generator) -> Commit:
    reasons = {int(row): _reason(rng) for row in rng.integers(0, _COMMIT_ROWS, _COMMIT_ROWS // 100)}
    return Commit(
        chunk=0,
        encoder="0" * 64,
        index_digest="0" * 64,
        features={"cls": {"cls/0": "00000000"}},
        hashes=[rng.bytes(16) for _ in range(_COMMIT_ROWS)],
        failures={"cls": [reasons.get(row) for row in range(_COMMIT_ROWS)]},
        attributes={"cls": "0" * 64},
    )


def _reason(rng: np.random.Generator) -> str:
    return f"cannot decode: {rng.integers(2**20)} bytes are missing"
