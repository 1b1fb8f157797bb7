"""Imports and exports as the commands make them, and files as other tools write them."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedcache import files
from embedcache.arrays import Array
from embedcache.store.cache import Cache
from embedcache.store.producer import FillReport
from embedcache.vectors.exporting import export_vectors
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import VectorImport, open_vectors
from embedcache.vectors.settings import ImportSettings

FORMATS: dict[str, tuple[tuple[str, str], str]] = {
    "clip-retrieval": (("img_emb", "text_emb"), "tree"),
    "parquet": (("image_vector", "text_vector"), "rows.parquet"),
    "npy": (("image", "text"), "arrays"),
}
"""Name -> what it names the features, and a name for it on disk."""


def reopen_vectors(form: str, path: Path, modalities: Sequence[str] = ("image", "text")) -> VectorImport:
    """Open what was exported in a format."""
    if form == "npy":
        files = {modality: path / f"{modality}.npy" for modality in modalities}
        return open_vectors("npy", files=files, table=path / "rows.parquet")
    return open_vectors(form, path)


def export_and_die(form: str, cache: Path, path: Path) -> None:
    """Kill this process at the end of an export, before its result is flushed and renamed."""
    files.flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    export_vectors(form, cache, path)


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
