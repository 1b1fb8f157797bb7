"""Spherical k-means: the centroids of FAISS, with progress."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from embedcache.arrays import Floats, Ints, normalize
from embedcache.search import kmeans
from embedcache.search.faiss_gpu import import_faiss
from tests.recorded import RecordedProgress

VECTORS = normalize(np.random.default_rng(0).standard_normal((2000, 8)))


def test_centroids_are_those_of_faiss() -> None:
    faiss, progress = import_faiss(), RecordedProgress()
    found = kmeans.spherical_kmeans(VECTORS, 50, seed=3, iterations=7, max_per_cluster=20, progress=progress)
    expected = faiss.Kmeans(
        8, 50, niter=7, spherical=True, seed=3, min_points_per_centroid=1, max_points_per_centroid=20
    )
    expected.train(VECTORS)
    np.testing.assert_array_equal(found, expected.centroids)
    assert progress.started == [("finding 50 clusters", 7, "iterations")]
    assert progress.counts == {"finding 50 clusters": 7}


def test_duration_is_of_finding_the_nearest_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    announced, compares = [], []

    def note(_: object, *what: object, compare: Callable[[Floats, Floats], Ints]) -> None:
        announced.append(what)
        compares.append(compare)

    monkeypatch.setattr(kmeans, "note_duration", note)
    kmeans.spherical_kmeans(VECTORS, 50, seed=3, iterations=7, max_per_cluster=20, progress=RecordedProgress())
    assert announced == [("finding 50 clusters", 7 * 1000 * 50, 8)]
    found = compares[0](VECTORS[:100], VECTORS[100:150])
    assert found.tolist() == (VECTORS[:100] @ VECTORS[100:150].T).argmax(axis=1).tolist()


def test_iterations_are_shown_while_faiss_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_LOOKS_EVERY_S", 0.001)
    before, progress = threading.active_count(), RecordedProgress()
    kmeans.spherical_kmeans(VECTORS, 200, seed=0, iterations=60, max_per_cluster=20, progress=progress)
    assert len(progress.advances) > 2
    assert sum(progress.advances) == 60
    assert threading.active_count() == before


def test_as_many_clusters_as_vectors_need_no_iteration() -> None:
    progress = RecordedProgress()
    found = kmeans.spherical_kmeans(VECTORS[:9], 9, seed=0, iterations=5, max_per_cluster=20, progress=progress)
    assert sorted(found.tolist()) == sorted(VECTORS[:9].tolist())
    assert progress.counts == {"finding 9 clusters": 5}
