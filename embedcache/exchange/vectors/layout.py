"""Vectors on a plane, and the nearest of each: what a map of a cache shows."""

import warnings
from typing import Literal, TypeAlias

import numpy as np

from embedcache.arrays import Floats, Ints, blocks
from embedcache.curate.indexes.faiss_index import exact_search, make_index
from embedcache.errors import DataError
from embedcache.registry import require

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
        method: `umap` keeps who is near whom (cosine, 15 neighbours), `pca` the two directions of largest variance.
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
