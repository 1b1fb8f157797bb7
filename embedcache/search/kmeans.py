"""Spherical k-means by FAISS, on the CPU or on GPUs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.devices import AUTO
from embedcache.metrics.durations import note_duration
from embedcache.progress import Progress
from embedcache.search.faiss_gpu import import_faiss, num_gpus

_LOOKS_EVERY_S = 0.5


def spherical_kmeans(
    vectors_NP: Floats,
    num_clusters: int,
    *,
    seed: int,
    iterations: int,
    max_per_cluster: int,
    progress: Progress,
    device: str = AUTO,
) -> Floats:
    """Cluster rows of length 1 by cosine similarity: (K, P) float32 centroids. Progress is in iterations.

    Before a long clustering on the CPU, it is reported how long it will take. Raises `MissingExtraError` without faiss.
    """
    faiss, gpus, what = import_faiss(), num_gpus(device), f"finding {num_clusters:,} clusters"
    if not gpus:
        num_pairs = iterations * min(len(vectors_NP), num_clusters * max_per_cluster) * num_clusters
        note_duration(progress, what, num_pairs, vectors_NP.shape[1], compare=_find_nearest)
    settings = faiss.ClusteringParameters()
    settings.niter, settings.seed, settings.spherical = iterations, seed, True
    settings.min_points_per_centroid, settings.max_points_per_centroid = 1, max_per_cluster
    index = faiss.IndexFlatIP(vectors_NP.shape[1])
    clustering = faiss.Clustering(vectors_NP.shape[1], num_clusters, settings)
    with _counted(lambda: int(clustering.iteration_stats.size()), progress, what, iterations, "iterations"):
        on_device = faiss.index_cpu_to_all_gpus(index, ngpu=gpus) if gpus else index
        clustering.train(np.ascontiguousarray(vectors_NP, np.float32), on_device)
    centroids_KP: Floats = faiss.vector_to_array(clustering.centroids).reshape(num_clusters, -1)
    return centroids_KP


def _find_nearest(vectors_NP: Floats, centroids_KP: Floats) -> Ints:
    """Find the nearest centroid of each vector as FAISS does, which takes longer than the products: (N,)."""
    index = import_faiss().IndexFlatIP(centroids_KP.shape[1])
    index.add(centroids_KP)
    nearest_N: Ints = index.search(vectors_NP, 1)[1][:, 0]
    return nearest_N


@contextmanager
def _counted(count: Callable[[], int], progress: Progress, what: str, total: int, unit: str) -> Iterator[None]:
    """Show a block as a step of `progress`, although it only counts what it has done, for another thread to look at."""
    is_over, num_shown = threading.Event(), 0

    def show() -> None:
        nonlocal num_shown
        while not is_over.wait(_LOOKS_EVERY_S):
            num_done = min(count(), total)
            if num_done > num_shown:
                progress.advance(num_done - num_shown)
                num_shown = num_done

    progress.start(what, total, unit)
    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    progress.advance(total - num_shown)
    progress.finish()
