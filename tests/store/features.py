"""Writes features into a new cache, as extraction does, from arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Array
from embedcache.store.feature import Feature, create_group
from embedcache.store.layout import SAMPLES, CacheInfo, Part, TableFile, table_name, write_info
from embedcache.store.writer import add_feature, cast_item, commit_chunk, write_feature_chunk

FINGERPRINT = {"family": "test", "weights": "w"}
SOURCE = {"type": "table", "path": "x"}


def made_info(num_samples: int, num_items: Mapping[str, int], *, chunk_size: int, **values: Any) -> CacheInfo:
    """Return a manifest of one part whose tables nobody reads."""
    counts = {SAMPLES: num_samples, **num_items}
    tables = {
        name: TableFile(name=table_name(name, 0), num_rows=count, num_bytes=0, checksum="0" * 8)
        for name, count in counts.items()
    }
    part = Part(digest="s", tables=tables)
    return CacheInfo(**{"chunk_size": chunk_size, "source": SOURCE, "index_digest": "s", "parts": (part,), **values})


def write_feature(
    path: Path,
    items: Sequence[Array | None],
    item_shape: tuple[int, ...],
    *,
    chunk_size: int,
    dtype: str = "float16",
    skip_chunks: Sequence[int] = (),
) -> Feature:
    """Write one feature `test/f`; None is a failed item, chunks of `skip_chunks` are not committed."""
    info = made_info(len(items), {"image": len(items)}, chunk_size=chunk_size)
    write_info(path, info)
    group = create_group(path, "image", "test", info, spec="test:m", fingerprint=FINGERPRINT)
    add_feature(group, "f", item_shape, dtype)
    for chunk in range(info.num_chunks("image")):
        rows = info.chunk_rows("image", chunk)
        fitted = [None if item is None else cast_item(item, item_shape, dtype, "test/f") for item in items[rows]]
        if chunk in skip_chunks:
            write_feature_chunk(group, "f", chunk, fitted)
            continue
        failures = [None if item is not None else "broken" for item in fitted]
        hashes = [None if item is None else row.to_bytes(16, "big") for row, item in enumerate(fitted)]
        commit_chunk(group, chunk, {"f": fitted}, hashes, {"f": failures})
    return Feature(group, "f")


def random_items(
    count: int, item_shape: tuple[int, ...], *, seed: int, failed: Sequence[int] = ()
) -> list[Array | None]:
    """Return float32 items; ragged ones have 0 to 4 tokens."""
    rng = np.random.default_rng(seed)
    items: list[Array | None] = []
    for row in range(count):
        shape = (int(rng.integers(5)), *item_shape[1:]) if item_shape[0] < 0 else item_shape
        items.append(None if row in failed else rng.standard_normal(shape).astype(np.float32))
    return items


def written(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced, and not when it is read."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
