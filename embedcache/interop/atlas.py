"""The Parquet that embedding-atlas opens: a point a sample, with its text, picture, place, vector and neighbors.

Its version 0.26 reads the file with pandas into DuckDB, which has no float16. `neighbors` is a struct of `ids`, row
numbers from 0, nearest first, and `distances`, of one length in all rows; `image` is a struct of `bytes` and `path`.

Vectors on a plane, and the nearest of each: what a map of a cache shows.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from embedcache.arrays import Array, Floats, Ints, blocks, normalize
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, ItemError
from embedcache.files import replacing
from embedcache.interop.outgoing import Outgoing, check_new_file
from embedcache.interop.parquet import vector_lists, write_rows
from embedcache.progress import Progress
from embedcache.registry import require
from embedcache.reports.thumbnails import Thumbnails
from embedcache.search.faiss_index import exact_search, make_index

EXTRA = "atlas"
Method: TypeAlias = Literal["umap", "pca"]
_NUM_NEIGHBORS = 15
_MOST_EXACT = 100_000
_QUERIES = 4096
_GRAPH, _EFFORT = "HNSW32", {"efSearch": 128}


def lay_out(vectors_NP: Floats, method: Method, *, seed: int = 0) -> Floats:
    """Give each vector a place on a plane: (N, 2) float32.

    Args:
        vectors_NP: (N, P) float32 rows of length 1, at least 4.
        method: `umap` keeps who is near whom (cosine, 15 neighbors), `pca` the two directions of largest variance.
        seed: UMAP runs on one core, so that a seed gives the same map.

    Raises:
        MissingExtraError: umap-learn, or scikit-learn, is not installed.
        DataError: there are too few vectors.
    """
    if len(vectors_NP) < 4:
        raise DataError(f"{len(vectors_NP)} vectors make no map; export at least 4")
    if method == "pca":
        pca = require("sklearn.decomposition", extra=EXTRA).PCA(n_components=2, random_state=seed)
        places = pca.fit_transform(vectors_NP)
    else:
        near = min(_NUM_NEIGHBORS, len(vectors_NP) - 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TensorFlow is missing, and of few points
            umap = require("umap", extra=EXTRA)
            places = umap.UMAP(metric="cosine", n_neighbors=near, random_state=seed, n_jobs=1).fit_transform(vectors_NP)
    return np.ascontiguousarray(places, np.float32)


def nearest(vectors_NP: Floats, k: int = _NUM_NEIGHBORS) -> tuple[Ints, Floats]:
    """Find the k nearest of each vector, itself among them: rows (N, K) int64 and cosine distances (N, K) float32.

    Up to 100,000 vectors each is compared with all; more are found in a graph, whose row is completed where it gave
    fewer. K is smaller where there are fewer vectors.
    """
    k, rows_N = min(k, len(vectors_NP)), np.arange(len(vectors_NP))
    rows_NK, scores_NK = np.empty((len(vectors_NP), k), np.int64), np.empty((len(vectors_NP), k), np.float32)
    graph = None
    if len(vectors_NP) > _MOST_EXACT:
        graph = make_index(_GRAPH, vectors_NP.shape[1])
        graph.add(rows_N, vectors_NP)
    for block in blocks(len(vectors_NP), _QUERIES):
        if graph is None:
            scores_NK[block], rows_NK[block] = exact_search(vectors_NP[block], [(rows_N, vectors_NP)], k)
        else:
            scores_NK[block], rows_NK[block] = graph.search(vectors_NP[block], k, _EFFORT)
    missing = rows_NK < 0
    rows_NK[missing], scores_NK[missing] = np.nonzero(missing)[0], 1.0  # itself again
    return rows_NK, np.maximum(1 - scores_NK, 0)


Images: TypeAlias = Literal["thumbnails", "paths", "none"]
_BLOCK = 1024
_SIZE_PX = 128


def write_atlas(
    outgoing: Outgoing,
    path: Path,
    *,
    method: Method = "umap",
    images: Images = "thumbnails",
    seed: int = 0,
    progress: Progress,
) -> int:
    """Write the file, whole or not at all; give the number of points. An image that cannot be read is null.

    Memory: all vectors as float32, and a block of pictures.

    Args:
        outgoing: samples with vectors of one modality.
        path: a new `.parquet`.
        method: how vectors get their places.
        images: pictures of at most 128 pixels in the file, paths to the files, or none.
        seed: of the places.
        progress: told about points.

    Raises:
        PathError: the file is there, or its name does not end in `.parquet`.
        MissingExtraError: umap-learn, or scikit-learn, is not installed.
        DataError: fewer than four points.
    """
    check_new_file(path, ".parquet")
    [modality] = outgoing.modalities
    vectors = _load(outgoing, modality)
    progress.note(f"placing {len(vectors):,} points with {method}")
    places, near = lay_out(vectors, method, seed=seed), nearest(vectors)
    shows = images if "image" in outgoing.cache.info.num_items and modality == "image" else "none"
    with replacing(path) as temporary:
        tables = _tables(outgoing, shows, vectors, places, near, progress)
        write_rows(temporary, tables, outgoing.metadata)
    return len(vectors)


def _load(outgoing: Outgoing, modality: Modality) -> Floats:
    return np.concatenate([normalize(block) for block in outgoing.vectors(modality, _BLOCK)])


def _tables(
    outgoing: Outgoing,
    images: Images,
    vectors: Floats,
    places: Floats,
    near: tuple[Ints, Floats],
    progress: Progress,
) -> Iterator[pa.Table]:
    pictures = _Thumbnails(outgoing) if images == "thumbnails" else None
    progress.start("writing", len(vectors), "points")
    for rows in blocks(len(vectors), _BLOCK):
        table = outgoing.table(rows)
        table = table.rename_columns(["text" if name == "caption" else name for name in table.column_names])
        if pictures is not None:
            table = table.append_column("image", pictures.column(rows))
        elif images == "paths":
            table = table.append_column("image", table["image_path"])
        table = table.append_column("vector", vector_lists(vectors[rows]))
        for name, column in _map_columns(rows, places, near).items():
            table = table.append_column(name, column)
        yield table
        progress.advance(len(table))
    progress.finish()


def _map_columns(rows: slice, places: Floats, near: tuple[Ints, Floats]) -> dict[str, pa.Array]:
    ids, distances = (_lists(values[rows]) for values in near)
    return {
        "projection_x": pa.array(places[rows, 0]),
        "projection_y": pa.array(places[rows, 1]),
        "neighbors": pa.StructArray.from_arrays([ids, distances], names=["ids", "distances"]),
    }


def _lists(values_NK: Array) -> pa.Array:
    offsets = np.arange(len(values_NK) + 1, dtype=np.int32) * values_NK.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values_NK.reshape(-1)))


class _Thumbnails:
    """Small pictures of an export's rows, as the struct that Hugging Face's datasets hold images in."""

    _KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def __init__(self, outgoing: Outgoing) -> None:
        self._pictures = Thumbnails(outgoing.cache)
        self._rows = outgoing.item_rows("image")

    def column(self, rows: slice) -> pa.Array:
        return pa.array([self._picture(int(row)) for row in self._rows[rows]], self._KIND)

    def _picture(self, row: int) -> dict[str, Any] | None:
        try:
            return {"bytes": self._pictures.webp(row, _SIZE_PX), "path": None}
        except ItemError:
            return None
