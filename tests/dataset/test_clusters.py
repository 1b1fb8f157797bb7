"""Clusters of near vectors: which an item visits, what a plan compares, and the scratch file."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints, normalize
from embedcache.dataset import clusters as module
from embedcache.dataset.clusters import (
    ClusterAssigner,
    ClusterAssignment,
    cluster_items,
    concatenate_assignments,
    iterate_tiles,
    make_plan,
    scratch_matrix,
)
from embedcache.errors import DiskFullError, PathError
from embedcache.metrics.neighbors import spherical_means
from tests.recorded import RecordedProgress


def made_vectors(count: int, seed: int, *, width: int = 16, noise: float = 0.08) -> Floats:
    """Vectors in groups of one to five near-duplicates."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 6, count))[:count]
    centers = rng.standard_normal((count, width))
    return normalize(centers[groups] + noise * rng.standard_normal((count, width)))[rng.permutation(count)]


def brute(vectors_NP: Floats, limit: float) -> set[tuple[int, int]]:
    cosines = vectors_NP.astype(np.float64) @ vectors_NP.T.astype(np.float64)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(cosines >= limit), strict=True) if i < j}


@given(st.integers(5, 120), st.integers(1, 9), st.integers(0, 999), st.floats(0.5, 0.999))
def test_visits_cover_all_neighbors(count: int, num: int, seed: int, limit: float) -> None:
    # not a width of 5: OpenBLAS 0.3.31 then multiplies unused lanes of the stack (sgemv_kernel_t_5, for AVX-512, where
    # there is one centroid), and NumPy warns of an invalid value if these hold a signaling NaN
    vectors = made_vectors(count, seed, width=6)
    centroids = normalize(np.random.default_rng(seed).standard_normal((num, 6)))
    assigned = concatenate_assignments(
        [*ClusterAssigner(centroids, limit, num, np.ones(count, bool)).process(np.arange(count), vectors)]
    )
    assert assigned.is_complete.all()
    for one, other in brute(vectors, limit):
        for here, there in ((one, other), (other, one)):
            cluster = assigned.clusters[there]
            assert cluster == assigned.clusters[here] or cluster in assigned.visits[here]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 999))
def test_plan_has_every_member_and_visitor_of_each_cluster(count: int, num: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(num, size=count).astype(np.int32)
    is_visited = rng.random((count, num)) < 0.4
    visits = np.where(is_visited, np.arange(num), -1).astype(np.int32)
    assignment = ClusterAssignment(
        clusters=clusters, cosines=np.ones(count, np.float32), visits=visits, is_complete=np.ones(count, bool)
    )
    plan = make_plan(assignment, count)
    for number in range(len(plan.starts) - 1):
        members = plan.items[plan.starts[number] : plan.starts[number + 1]]
        visitors = plan.items[plan.visitors[plan.visitor_starts[number] : plan.visitor_starts[number + 1]]]
        assert members.tolist() == np.flatnonzero(clusters == number).tolist()
        assert sorted(visitors) == np.flatnonzero(is_visited[:, number]).tolist()


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 999), st.integers(1, 5))
def test_tiles_hold_each_pair_of_a_cluster_and_of_its_visitors_once(
    count: int, num: int, seed: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(num, size=count).astype(np.int32)
    is_visited = (rng.random((count, num)) < 0.3) & (clusters[:, None] != np.arange(num))
    visits = np.where(is_visited, np.arange(num), -1).astype(np.int32)
    assignment = ClusterAssignment(
        clusters=clusters, cosines=np.ones(count, np.float32), visits=visits, is_complete=np.ones(count, bool)
    )
    vectors = normalize(rng.standard_normal((count, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "PLANNED_ROWS", block)
        plan = make_plan(assignment, count)
        tiles = list(iterate_tiles(vectors[plan.items].astype(np.float16), plan))
    found: list[tuple[int, int]] = []
    for tile, _ in tiles:
        assert tile.cosines.dtype == np.float32
        assert max(tile.cosines.shape) <= block
        np.testing.assert_allclose(tile.cosines, vectors[tile.left] @ vectors[tile.right].T, atol=5e-3)
        pairs = [(int(a), int(b)) for a in tile.left for b in tile.right]
        found += [(a, b) for a, b in pairs if a < b] if tile.is_diagonal else pairs
    within = [(a, b) for a in range(count) for b in range(count) if a < b and clusters[a] == clusters[b]]
    across = [(a, b) for a in range(count) for b in range(count) if is_visited[a, clusters[b]]]
    expected = sorted((min(pair), max(pair)) for pair in within + across)
    assert sorted((min(pair), max(pair)) for pair in found) == expected
    assert sum(done for _, done in tiles) == count


def test_items_without_clusters_are_all_compared() -> None:
    plan = make_plan(None, 5)
    assert (plan.items.tolist(), plan.starts.tolist(), len(plan.visitors)) == ([0, 1, 2, 3, 4], [0, 5], 0)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_parts_of_an_assignment_are_concatenated_in_order(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole = ClusterAssignment(
        clusters=rng.integers(9, size=count).astype(np.int32),
        cosines=rng.random(count).astype(np.float32),
        visits=rng.integers(9, size=(count, 2)).astype(np.int32),
        is_complete=rng.random(count) < 0.5,
    )
    names = ("clusters", "cosines", "visits", "is_complete")
    parts = [
        ClusterAssignment(**{name: getattr(whole, name)[start : start + size] for name in names})
        for start in range(0, count, size)
    ]
    joined = concatenate_assignments(parts)
    assert parts == []
    for name in names:
        assert np.array_equal(getattr(joined, name), getattr(whole, name))
        assert getattr(joined, name).dtype == getattr(whole, name).dtype


def test_visits_are_the_nearest_borders_within_reach() -> None:
    """Check items on a circle: those near the border of a cluster visit it, the nearest first, `max_visits` at most."""
    angles = np.deg2rad(np.arange(0, 360, 90))
    centroids: Floats = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    items = np.deg2rad([0, 40, 35, 50, 300])  # the third one at the very angle
    vectors: Floats = np.stack([np.cos(items), np.sin(items)], axis=1).astype(np.float32)
    mask = np.array([True, True, True, True, False])

    def assign(max_visits: int, degrees: float = 10) -> ClusterAssignment:
        (found,) = ClusterAssigner(centroids, float(np.cos(np.deg2rad(degrees))), max_visits, mask).process(
            np.arange(5), vectors
        )
        return found

    found = assign(2)
    assert found.clusters.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(found.cosines, np.cos(np.deg2rad([0, 40, 35, 40])), atol=1e-6)
    assert found.visits.tolist() == [[-1, -1], [1, -1], [1, -1], [0, -1]]
    assert found.is_complete.all()
    assert assign(0).visits.shape == (4, 0)
    assert assign(0).is_complete.tolist() == [True, False, False, False]
    assert assign(9, degrees=89).visits.shape == (4, 3)
    merger = ClusterAssigner(centroids, 0.9, 1, mask)
    assert merger.merge([found], [assign(0)])[0] is found


@pytest.mark.parametrize("count", [1, 50])
def test_items_are_clustered_block_by_block(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    vectors, progress, num_read = made_vectors(count, 3), RecordedProgress(), []

    def read(numbers: Ints) -> Floats:
        num_read.append(len(numbers))
        return vectors[numbers]

    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "READ_ROWS", 8)
    monkeypatch.setattr(module, "_TRAINING_PER_CLUSTER", 2)
    centroids, assigned = cluster_items(read, count, 0.9, seed=1, what="dots", progress=progress)
    num_clusters = {1: 2, 50: 14}[count]
    drawn = np.sort(np.random.default_rng(1).permutation(count)[: 2 * num_clusters])
    np.testing.assert_array_equal(centroids, spherical_means(vectors[drawn], num_clusters, seed=1))
    assert num_read == {1: [1, 1], 50: [8, 8, 8, 4, 16, 16, 16, 2]}[count]
    assert assigned.clusters.tolist() == (vectors @ centroids.T).argmax(axis=1).tolist()
    finding = f"finding {num_clusters} clusters of dots"
    assert progress.started == [(finding, 10, "iterations"), ("clustering dots", count, "items")]
    assert progress.counts == {finding: 10, "clustering dots": count}


def test_few_vectors_are_read_at_once() -> None:
    """Check the documented 40 vectors per cluster, and the numbers of items that are in memory."""
    angles, num_read, progress = np.linspace(0, 6, 10_000), [], RecordedProgress()

    def read(numbers: Ints) -> Floats:
        num_read.append(len(numbers))
        return np.stack([np.cos(angles[numbers]), np.sin(angles[numbers])], axis=1).astype(np.float32)

    centroids, _ = cluster_items(read, len(angles), 0.99999, seed=0, what="dots", progress=progress)
    assert len(centroids) == 200
    assert num_read == [*[1024] * 7, 40 * 200 - 7 * 1024, *[2048] * 4, 10_000 - 4 * 2048]
    assert progress.notes == []


def test_scratch_space_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(DiskFullError, match="1536.0 GB"),
        scratch_matrix(tmp_path, (10**9, 768), np.float16),
    ):
        pass
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2400))
    with scratch_matrix(tmp_path, (300, 2), "f4") as matrix:
        matrix[:] = 7
        assert (matrix.shape, matrix.dtype) == ((300, 2), np.float32)
    with scratch_matrix(tmp_path, (0, 2), "f4") as matrix:
        assert matrix.shape == (0, 2)
    with pytest.raises(DiskFullError), scratch_matrix(tmp_path, (1201, 1), np.float16):
        pass
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 * 10**9))
    with (
        pytest.raises(DiskFullError, match="2.0 GB"),
        scratch_matrix(tmp_path, (10**9, 3), np.int8),
    ):
        pass
    with (
        pytest.raises(PathError, match="scratch"),
        scratch_matrix(tmp_path / "x", (1, 1), "f4"),
    ):
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
