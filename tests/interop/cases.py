"""Imports and exports as the commands make them, and files as other tools write them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache import files
from embedcache.arrays import Array
from embedcache.interop.clip_retrieval import open_clip_retrieval, write_clip_retrieval
from embedcache.interop.exporting import VectorExport
from embedcache.interop.importing import import_vectors
from embedcache.interop.npy import open_npy_vectors, write_npy
from embedcache.interop.parquet import open_parquet_vectors, write_parquet
from embedcache.interop.settings import ImportSettings, VectorExportSettings
from embedcache.interop.vector_files import VectorImport
from embedcache.progress import NullProgress
from embedcache.store.cache import Cache
from embedcache.store.producer import FillReport

Format = tuple[Callable[[VectorExport, Path], int], Callable[[Path], VectorImport], tuple[str, str], str]

FORMATS: dict[str, Format] = {
    "clip-retrieval": (
        lambda rows, path: write_clip_retrieval(rows, path, rows_per_file=15, progress=NullProgress()),
        open_clip_retrieval,
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
        lambda rows, path: write_npy(rows, path, progress=NullProgress()),
        lambda path: open_npy_vectors(
            {"image": path / "image.npy", "text": path / "text.npy"}, table=path / "rows.parquet"
        ),
        ("image", "text"),
        "arrays",
    ),
}
"""Name -> how it is written, how it is opened, what it names the features, and a name for it on disk."""


def export_of(cache: Path, **settings: object) -> VectorExport:
    return VectorExport(cache, VectorExportSettings(**settings))  # type: ignore[arg-type]


def export_and_die(form: str, cache: Path, path: Path) -> None:
    """Kill this process at the end of an export, before its result is flushed and renamed."""
    files.flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    FORMATS[form][0](export_of(cache), path)


def write_tree(folder: Path, vectors: Array, *, rows_per_file: int = 10, **columns: list[object]) -> Path:
    """Write a tree as clip-retrieval does, of images only unless a column `caption` is given."""
    names = ["img_emb", *(["text_emb"] if "caption" in columns else [])]
    for name in (*names, "metadata"):
        (folder / name).mkdir(parents=True)
    columns = {"key": [f"k{row}" for row in range(len(vectors))], **columns}
    for number, start in enumerate(range(0, len(vectors), rows_per_file)):
        rows = slice(start, start + rows_per_file)
        for name in names:
            np.save(folder / name / f"{name}_{number}.npy", vectors[rows])
        table = pa.table({name: values[rows] for name, values in columns.items()})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


def unit_rows(count: int, width: int = 8, *, seed: int = 0) -> Array:
    """Draw float16 rows of length 1."""
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def import_files(
    vectors: VectorImport, cache: Path, *, chunk_size: int = 8, **settings: object
) -> tuple[Cache, list[FillReport]]:
    reports = import_vectors(vectors, cache, ImportSettings(chunk_size=chunk_size, **settings))  # type: ignore[arg-type]
    return Cache(cache), reports
