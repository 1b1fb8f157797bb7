"""The Parquet file that embedding-atlas opens: one point per sample with its text, image, vector and nearest neighbors.

Version 0.26 reads the file with pandas into DuckDB, which has no float16. `neighbors` is a struct of `ids`, row numbers
from 0, nearest first, and `distances`, of one length in all rows; `image` is a struct of `bytes` and `path`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedcache.arrays import Floats, Ints, blocks, normalize
from embedcache.curate.map import check_projection, project_to_plane
from embedcache.dataset.thumbnails import PICTURED, Thumbnails
from embedcache.devices import AUTO
from embedcache.errors import DataError, ItemError
from embedcache.interop.exporting import VectorExport, check_new_file
from embedcache.interop.parquet import append_columns, to_vector_lists, write_rows
from embedcache.interop.settings import AtlasSettings
from embedcache.outputs import new_output
from embedcache.progress import NullProgress, Progress
from embedcache.search.faiss_index import exact_search, make_index

_MIN_POINTS = 4
_NUM_NEIGHBORS = 15
_MAX_EXACT = 100_000
_QUERIES_PER_BLOCK = 4096
_GRAPH, _GRAPH_SEARCH = "HNSW32", {"efSearch": 128}
_BLOCK = 1024
_SIZE_PX = 128
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as Hugging Face datasets store images


def write_atlas(export: VectorExport, path: Path, settings: AtlasSettings | None = None, *, progress: Progress) -> int:
    """Write the file, whole or not at all; return the number of points. An item that cannot be drawn is null.

    Recordings are drawn as spectrograms, videos as their middle frame; texts and point clouds are not drawn. Memory:
    all vectors as float32, and one block of images.

    Raises:
        PathError: the file exists, or its name does not end in `.parquet`; or as `Thumbnails`.
        MissingExtraError: umap-learn is not installed.
        DataError: fewer than four points.
    """
    settings = settings or AtlasSettings()
    check_new_file(path, ".parquet")
    check_projection(settings.projection)  # before vectors are read, which takes long
    [modality] = export.modalities
    images = "none" if modality == "text" else settings.images
    has_drawings = images == "thumbnails" and modality in PICTURED
    thumbnails = Thumbnails(export.cache, modality) if has_drawings else None
    vectors_NP = np.concatenate([normalize(block) for block in export.vectors(modality, _BLOCK)])
    if len(vectors_NP) < _MIN_POINTS:
        raise DataError(f"points: expected at least {_MIN_POINTS}, got {len(vectors_NP)}; export more samples")
    points_N2 = project_to_plane(vectors_NP, settings.projection, seed=settings.seed, progress=progress)
    neighbors = find_neighbors(vectors_NP, device=settings.device, progress=progress)
    with new_output(path) as temporary:
        tables = _tables(export, images, thumbnails, vectors_NP, points_N2, neighbors, progress)
        write_rows(temporary, tables, export.record)
    return len(vectors_NP)


def find_neighbors(
    vectors_NP: Floats, k: int = _NUM_NEIGHBORS, *, device: str = AUTO, progress: Progress | None = None
) -> tuple[Ints, Floats]:
    """Return the k nearest vectors of each, itself included: rows (N, K) int64 and cosine distances (N, K) float32.

    Up to 100,000 vectors are compared exactly; more are searched in a graph, and a row for which it found fewer is
    padded with itself. K is smaller if there are fewer vectors.
    """
    progress, k, rows_N = progress or NullProgress(), min(k, len(vectors_NP)), np.arange(len(vectors_NP))
    rows_NK, scores_NK = np.empty((len(vectors_NP), k), np.int64), np.empty((len(vectors_NP), k), np.float32)
    graph = None
    if len(vectors_NP) > _MAX_EXACT:
        graph = make_index(_GRAPH, vectors_NP.shape[1], device=device)
        progress.start("building the graph", len(vectors_NP), "points")
        for block in blocks(len(vectors_NP), _QUERIES_PER_BLOCK):
            graph.add(rows_N[block], vectors_NP[block])
            progress.advance(len(rows_N[block]))
    progress.start("finding neighbors", len(vectors_NP), "points")
    for block in blocks(len(vectors_NP), _QUERIES_PER_BLOCK):
        if graph is None:
            scores_NK[block], rows_NK[block] = exact_search(vectors_NP[block], [(rows_N, vectors_NP)], k, device=device)
        else:
            scores_NK[block], rows_NK[block] = graph.search(vectors_NP[block], k, _GRAPH_SEARCH)
        progress.advance(len(rows_N[block]))
    progress.finish()
    is_missing = rows_NK < 0
    rows_NK[is_missing], scores_NK[is_missing] = np.nonzero(is_missing)[0], 1.0
    return rows_NK, np.maximum(1 - scores_NK, 0)


def _tables(
    export: VectorExport,
    images: str,
    thumbnails: Thumbnails | None,
    vectors_NP: Floats,
    points_N2: Floats,
    neighbors: tuple[Ints, Floats],
    progress: Progress,
) -> Iterator[pa.Table]:
    progress.start("writing", len(vectors_NP), "points")
    [modality] = export.modalities
    for rows in blocks(len(vectors_NP), _BLOCK):
        table = _with_text(export.table(rows))
        columns = {}
        if thumbnails is not None:
            item_rows = export.item_rows(modality, rows).tolist()
            columns["image"] = pa.array([_thumbnail(thumbnails, row) for row in item_rows], _IMAGE_TYPE)
        elif images == "paths":
            columns["image"] = table[f"{modality}_path"]
        offsets = np.arange(rows.stop - rows.start + 1, dtype=np.int32) * neighbors[0].shape[1]
        lists = [pa.ListArray.from_arrays(offsets, pa.array(values_NK[rows].reshape(-1))) for values_NK in neighbors]
        columns |= {
            "vector": to_vector_lists(vectors_NP[rows]),
            "projection_x": pa.array(points_N2[rows, 0]),
            "projection_y": pa.array(points_N2[rows, 1]),
            "neighbors": pa.StructArray.from_arrays(lists, names=["ids", "distances"]),
        }
        yield append_columns(table, columns)
        progress.advance(len(table))
    progress.finish()


def _with_text(table: pa.Table) -> pa.Table:
    """Rename `caption`, if there are captions, to `text`, in place of a column of the cache of that name."""
    if "caption" in table.column_names and "text" in table.column_names:
        table = table.drop_columns("text")
    return table.rename_columns(["text" if name == "caption" else name for name in table.column_names])


def _thumbnail(thumbnails: Thumbnails, row: int) -> dict[str, Any] | None:
    try:
        return {"bytes": thumbnails.webp(row, _SIZE_PX), "path": None}
    except ItemError:
        return None
