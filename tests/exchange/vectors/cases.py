"""Imports and exports as the commands make them, and files as other tools write them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.arrays import Array
from embedcache.interop.clip_retrieval import open_tree, write_tree
from embedcache.interop.importing import Imported, import_vectors
from embedcache.interop.incoming import Incoming
from embedcache.interop.npy import open_arrays, write_arrays
from embedcache.interop.outgoing import ExportSettings, Outgoing
from embedcache.interop.parquet import open_parquet_vectors, write_parquet
from embedcache.progress import NullProgress
from embedcache.store.cache import Cache

Format = tuple[Callable[[Outgoing, Path], int], Callable[[Path], Incoming], tuple[str, str], str]

FORMATS: dict[str, Format] = {
    "clip-retrieval": (
        lambda rows, path: write_tree(rows, path, rows_a_file=15, progress=NullProgress()),
        open_tree,
        ("img_emb", "text_emb"),
        "tree",
    ),
    "parquet": (
        lambda rows, path: write_parquet(rows, path, progress=NullProgress()),
        open_parquet_vectors,
        ("image_vector", "text_vector"),
        "rows.parquet",
    ),
    "npy": (
        lambda rows, path: write_arrays(rows, path, progress=NullProgress()),
        lambda path: open_arrays(image=path / "image.npy", text=path / "text.npy", table=path / "rows.parquet"),
        ("image", "text"),
        "arrays",
    ),
}
"""Name -> how it is written, how it is opened, what it names the features, and a name for it on disk."""


def outgoing(cache: Path, **settings: object) -> Outgoing:
    return Outgoing(cache, ExportSettings(**settings))  # type: ignore[arg-type]


def write_tree_of(folder: Path, vectors: Array, *, rows_a_file: int = 10, **columns: list[object]) -> Path:
    """Write a tree as clip-retrieval does, of images only unless a column `caption` is given."""
    names = ["img_emb", *(["text_emb"] if "caption" in columns else [])]
    for name in (*names, "metadata"):
        (folder / name).mkdir(parents=True)
    columns = {"key": [f"k{row}" for row in range(len(vectors))], **columns}
    for number, start in enumerate(range(0, len(vectors), rows_a_file)):
        rows = slice(start, start + rows_a_file)
        for name in names:
            np.save(folder / name / f"{name}_{number}.npy", vectors[rows])
        table = pa.table({name: values[rows] for name, values in columns.items()})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def unit_rows(count: int, width: int = 8, *, seed: int = 0) -> Array:
    """Draw float16 rows of length 1."""
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def take_in(
    incoming: Incoming, cache: Path, *, chunk_size: int = 8, **settings: object
) -> tuple[Cache, list[Imported]]:
    reports = import_vectors(incoming, cache, chunk_size=chunk_size, **settings)  # type: ignore[arg-type]
    return Cache(cache), reports
