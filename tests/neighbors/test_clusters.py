"""Clusters of near vectors: k-means, which clusters an item visits, what is compared, and the scratch file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints, normalize
from embedcache.errors import DiskFullError, PathError
from embedcache.neighbors import pairs as module
from embedcache.neighbors.pairs import Clusters, arrange, find_clusters, scratch_matrix, spherical_means
from embedcache.progress import NullProgress
from tests.neighbors.made import brute, made_vectors, stored

PROGRESS = NullProgress()


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 999), st.integers(1, 8))
@example(200, 30, 0, 64)  # clusters still change after ten iterations
def test_centroids_equal_plain_k_means(count: int, num_clusters: int, seed: int, block: int) -> None:
    rows = normalize(np.random.default_rng(seed).standard_normal((count, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = spherical_means(rows, num_clusters, seed=seed)
    chosen = np.random.default_rng(seed).choice(count, min(num_clusters, count), replace=False)
    centroids = rows[np.sort(chosen)].copy()
    for _ in range(10):
        nearest = (rows @ centroids.T).argmax(axis=1)
        for number in range(len(centroids)):
            if (nearest == number).any():  # an empty cluster keeps its centroid
                centroids[number] = normalize(rows[nearest == number].sum(axis=0, keepdims=True))[0]
    np.testing.assert_allclose(found, centroids, atol=1e-4)


@given(st.integers(5, 120), st.integers(0, 999), st.floats(0.5, 0.999))
def test_visits_cover_all_neighbors(count: int, seed: int, limit: float) -> None:
    # not a width of 5: OpenBLAS 0.3.31 then multiplies unused lanes of the stack (sgemv_kernel_t_5, for AVX-512, where
    # there is one centroid), and NumPy warns of an invalid value if these hold a signaling NaN
    vectors = made_vectors(count, seed, width=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_VISITS", 99)
        found = find_clusters(stored(vectors), limit, seed=seed, progress=PROGRESS)
    assert found.complete == 1
    assert found.numbers.tolist() == (vectors @ found.centroids.T).argmax(axis=1).tolist()
    for one, other in brute(vectors, limit):
        for here, there in ((one, other), (other, one)):
            cluster = found.numbers[there]
            assert cluster == found.numbers[here] or cluster in found.visits[here]


@pytest.mark.parametrize(
    ("num_visits", "degrees", "visits", "complete"),
    [
        (2, 10, [[4, 4, 4], [1, 4, 4], [1, 4, 4], [0, 4, 4]], 1),
        (0, 10, [[]] * 4, 0.25),
        (9, 89, [[1, 3, 4], [1, 2, 3], [1, 2, 3], [0, 3, 2]], 1),
    ],
)
def test_visits_are_the_nearest_borders_within_reach(
    monkeypatch: pytest.MonkeyPatch, num_visits: int, degrees: float, visits: list[list[int]], complete: float
) -> None:
    """Check items on a circle: those near the border of a cluster visit it, the nearest first; the third at 10°."""
    angles = np.deg2rad(np.arange(0, 360, 90))
    centroids: Floats = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    items = np.deg2rad([0.5, 40, 35, 50])
    vectors: Floats = np.stack([np.cos(items), np.sin(items)], axis=1).astype(np.float32)
    monkeypatch.setattr(module, "MAX_VISITS", num_visits)
    found = find_clusters(
        stored(vectors), float(np.cos(np.deg2rad(degrees))), fit=lambda *_, **__: centroids, progress=PROGRESS
    )
    assert found.numbers.tolist() == [0, 0, 0, 1]
    assert found.visits.tolist() == [row[: found.visits.shape[1]] for row in visits]
    assert found.complete == complete


def test_some_items_are_drawn_for_k_means() -> None:
    drawn: list[int] = []

    def fit(vectors_SP: Floats, num_clusters: int, **_: object) -> Floats:
        drawn.extend((len(vectors_SP), num_clusters))
        return vectors_SP[:num_clusters]

    find_clusters(stored(made_vectors(10_000, 0, width=2)), 0.9, fit=fit, progress=PROGRESS)
    find_clusters(stored(made_vectors(1, 0)), 0.9, fit=fit, progress=PROGRESS)
    assert drawn == [40 * 200, 200, 1, 1]


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 999), st.integers(1, 5))
def test_tiles_hold_each_pair_of_a_cluster_and_of_its_visitors_once(
    count: int, num: int, seed: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(num, size=count).astype(np.int32)
    is_visited = (rng.random((count, num)) < 0.3) & (numbers[:, None] != np.arange(num))
    vectors, others = (normalize(rng.standard_normal((size, 3))) for size in (count, 7))
    clusters = Clusters(
        centroids=normalize(rng.standard_normal((num, 3))),
        numbers=numbers,
        visits=np.where(is_visited, np.arange(num), num).astype(np.int32),
        complete=0.5,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        with arrange(stored(vectors), clusters, progress=PROGRESS) as arranged:
            tiles = list(arranged.tiles(PROGRESS))
            across = list(arranged.tiles_with(others))
        assert arranged.num_clusters == num

    found: list[tuple[int, int]] = []
    for tile in tiles:
        assert tile.cosines.dtype == np.float32
        assert max(tile.cosines.shape) <= block
        np.testing.assert_allclose(tile.cosines, vectors[tile.left] @ vectors[tile.right].T, atol=5e-3)
        pairs = [(int(a), int(b)) for a in tile.left for b in tile.right]
        found += [(a, b) for a, b in pairs if a < b] if tile.is_diagonal else pairs
    within = [(a, b) for a in range(count) for b in range(count) if a < b and numbers[a] == numbers[b]]
    visiting = [(a, b) for a in range(count) for b in range(count) if is_visited[a, numbers[b]]]
    assert sorted((min(pair), max(pair)) for pair in found) == sorted((min(p), max(p)) for p in within + visiting)

    nearest: Ints = (others @ clusters.centroids.T).argmax(axis=1)
    for tile in across:
        np.testing.assert_allclose(tile.cosines, vectors[tile.left] @ others[tile.right].T, atol=5e-3)
    assert sorted((int(a), int(b)) for tile in across for a in tile.left for b in tile.right) == [
        (a, b) for a in range(count) for b in range(7) if numbers[a] == nearest[b] or is_visited[a, nearest[b]]
    ]


@pytest.mark.parametrize(("all_pairs", "dtype"), [(True, np.float32), (False, np.float16)])
def test_vectors_are_rounded_only_in_clusters(all_pairs: bool, dtype: type[np.floating]) -> None:
    vectors = stored(made_vectors(20, 1))
    clusters = find_clusters(vectors, 0.9, all_pairs=all_pairs, progress=PROGRESS)
    with arrange(vectors, clusters, progress=PROGRESS) as arranged:
        assert np.array_equal(arranged.read(arranged.positions), vectors.read(np.arange(20)).astype(dtype))
    assert (clusters.complete, len(clusters.centroids)) == (1, 1 if all_pairs else 9)


@pytest.mark.parametrize(
    ("shape", "dtype", "free", "message"),
    [
        ((10**9, 768), np.float16, 10**12, "1536.0 GB"),
        ((1201, 1), np.float16, 2400, "1,201 vectors"),
        ((10**9, 3), np.int8, 2 * 10**9, "2.0 GB free"),
    ],
)
def test_scratch_space_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: Any, free: int, message: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(DiskFullError, match=message), scratch_matrix(tmp_path, shape, dtype):
        pass


def test_scratch_space_is_allocated_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (300, 0):
        with scratch_matrix(tmp_path, (count, 2), "f4") as matrix:
            matrix[:] = 7
            assert (matrix.shape, matrix.dtype) == ((count, 2), np.float32)
    with pytest.raises(PathError, match="scratch"), scratch_matrix(tmp_path / "x", (1, 1), "f4"):
        pass
    allocated = []

    def full(_: int, *span: int) -> None:
        allocated.append(span)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskFullError), scratch_matrix(tmp_path, (2, 2), "f4"):
        pass
    assert allocated == [(0, 16)]
    assert not list(tmp_path.iterdir())
