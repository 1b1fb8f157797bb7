import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Floats, Ints, normalize
from embedcache.curate import near_duplicates as near_duplicates
from embedcache.curate.keep import Copies, choose_removed
from embedcache.curate.near_duplicates import find_near_duplicates, fit_centroids
from embedcache.curate.settings import DedupSettings
from embedcache.dataset import clusters
from embedcache.dataset.clusters import (
    ClusterAssigner,
    ClusterAssignment,
    concatenate_assignments,
    make_plan,
    scratch_matrix,
)
from embedcache.dataset.similar_pairs import CosineTile, PairCollector, SimilarPairs, histogram
from embedcache.errors import DataError, DiskFullError, PathError
from embedcache.progress import NullProgress
from embedcache.search.vectors import Vectors
from embedcache.store.group import add_feature, create_group
from embedcache.store.layout import CacheInfo, write_info
from embedcache.store.writer import commit_chunk

LIMIT = 0.9


def made_vectors(count: int, seed: int, *, width: int = 16, noise: float = 0.08) -> Floats:
    """Vectors in groups of one to five near-duplicates."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(count), rng.integers(1, 6, count))[:count]
    centers = rng.standard_normal((count, width))
    return normalize(centers[groups] + noise * rng.standard_normal((count, width)))[rng.permutation(count)]


def write_vectors(path: Path, vectors_NP: Floats, *, chunk_size: int = 64) -> Vectors:
    """A cache of vectors, float32, without a source."""
    count, width = vectors_NP.shape
    info = CacheInfo(
        chunk_size=chunk_size, source={}, index_digest="made", num_samples=count, num_items={"image": count}
    )
    path.mkdir(parents=True)
    write_info(path, info)
    group = create_group(path, "image", "made", info, spec="made:m", fingerprint={"family": "made"})
    add_feature(group, "f", (width,), "float32")
    for chunk in range(info.num_chunks("image")):
        rows = info.chunk_rows("image", chunk)
        hashes = [row.to_bytes(16, "big") for row in range(rows.start, rows.stop)]
        none = [None] * (rows.stop - rows.start)
        commit_chunk(group, chunk, {"f": list(vectors_NP[rows])}, hashes, {"f": none})
    return Vectors(path, "image")


def brute(vectors_NP: Floats, limit: float) -> set[tuple[int, int]]:
    cosines = vectors_NP.astype(np.float64) @ vectors_NP.T.astype(np.float64)
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(cosines >= limit), strict=True) if i < j}


def pairs_of(pairs: SimilarPairs) -> set[tuple[int, int]]:
    return set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))


@given(st.integers(2, 60), st.integers(1, 7), st.integers(0, 999))
def test_collector_equals_brute_force(count: int, size: int, seed: int) -> None:
    vectors = made_vectors(count, seed, width=6)
    collector = PairCollector(count, [LIMIT], 10**6)
    items = np.random.default_rng(seed).permutation(count)
    starts = range(0, count, size)
    for a in starts:
        for b in starts[a // size :]:
            left, right = items[a : a + size], items[b : b + size]
            collector.add(
                CosineTile(left=left, right=right, cosines=vectors[left] @ vectors[right].T, is_diagonal=a == b)
            )
    assert pairs_of(collector.pairs()) == brute(vectors, LIMIT)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    assert collector.highest == pytest.approx(cosines.max(axis=1), abs=1e-5)


def test_collector_raises_limit() -> None:
    vectors = made_vectors(80, 1, width=4)
    few = len(brute(vectors, 0.99))
    collector = PairCollector(80, [0.5, 0.9, 0.99], few)
    for half in (np.arange(40), np.arange(40, 80)):
        collector.add(CosineTile(left=half, right=half, cosines=vectors[half] @ vectors[half].T, is_diagonal=True))
    collector.add(CosineTile(left=np.arange(40), right=np.arange(40, 80), cosines=vectors[:40] @ vectors[40:].T))
    assert collector.limit == 0.99
    assert pairs_of(collector.pairs()) == brute(vectors, 0.99)
    assert PairCollector(80, [], 0).limit == np.inf


@given(st.integers(5, 120), st.integers(1, 9), st.integers(0, 999), st.floats(0.5, 0.999))
def test_visits_cover_all_neighbors(count: int, num: int, seed: int, limit: float) -> None:
    vectors = made_vectors(count, seed, width=5)
    centroids = normalize(np.random.default_rng(seed).standard_normal((num, 5)))
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


@settings(max_examples=12)
@given(st.integers(30, 150), st.integers(0, 99))
def test_clusters_equal_all_pairs_if_complete(count: int, seed: int) -> None:
    vectors = made_vectors(count, seed)
    with tempfile.TemporaryDirectory() as folder:
        opened = write_vectors(Path(folder) / "cache", vectors, chunk_size=16)
        near = find_near_duplicates(opened, np.arange(count), [LIMIT], DedupSettings(all_pairs=False, scratch=folder))
    doubtful = brute(vectors, LIMIT - 1e-4) - brute(vectors, LIMIT + 1e-4)  # float16 in the scratch file
    assert pairs_of(near.pairs) - doubtful <= brute(vectors, LIMIT)
    assert near.recall is not None
    if near.complete == 1:
        assert pairs_of(near.pairs) | doubtful >= brute(vectors, LIMIT)
        assert near.recall.num_found == near.recall.num_pairs


def test_all_pairs_equal_brute_force(tmp_path: Path) -> None:
    vectors = made_vectors(4200, 3, width=24, noise=0.15)
    near = find_near_duplicates(
        write_vectors(tmp_path / "cache", vectors, chunk_size=2048),
        np.arange(4200),
        [LIMIT],
        DedupSettings(scratch=tmp_path),
    )
    assert near.num_clusters == 1
    assert pairs_of(near.pairs) == brute(vectors, LIMIT)
    assert len(near.pairs.left) > 500


def test_all_pairs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "ALL_PAIRS_LIMIT", 200)
    opened = write_vectors(tmp_path / "cache", made_vectors(201, 1))
    for count, is_all_pairs in ((200, True), (201, False)):
        near = find_near_duplicates(opened, np.arange(count), [LIMIT], DedupSettings(scratch=tmp_path))
        assert (near.num_clusters == 1) == is_all_pairs
        assert (near.recall is None) == is_all_pairs


def test_recall_equals_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_VISITS", 0)  # as SemDeDup: pairs that a border cuts are missed
    vectors = made_vectors(2000, 5, width=8, noise=0.12)
    opened = write_vectors(tmp_path / "cache", vectors)
    near = find_near_duplicates(opened, np.arange(2000), [LIMIT], DedupSettings(all_pairs=False, scratch=tmp_path))
    true = brute(vectors, LIMIT)
    assert near.recall is not None
    assert near.recall.value == pytest.approx(len(pairs_of(near.pairs) & true) / len(true), abs=0.01)
    assert 0.1 < near.recall.value < 0.95
    assert near.complete < 1


def test_chunk_and_block_size_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = made_vectors(600, 7)
    rows = np.delete(np.arange(600), [3, 64, 599])
    found = []
    for name, chunk_size, block in (("a", 64, 2048), ("b", 600, 16), ("c", 7, 100)):
        monkeypatch.setattr(near_duplicates, "BLOCK", block)
        monkeypatch.setattr(clusters, "BLOCK", block)
        monkeypatch.setattr(clusters, "PLANNED_ROWS", block)
        opened = write_vectors(tmp_path / name, vectors, chunk_size=chunk_size)
        found.append(
            find_near_duplicates(opened, rows, [LIMIT], DedupSettings(all_pairs=False, scratch=tmp_path, seed=4))
        )
    for other in found[1:]:
        assert pairs_of(other.pairs) == pairs_of(found[0].pairs)
        assert other.highest == pytest.approx(found[0].highest, abs=1e-6)
        assert other.recall == found[0].recall
    assert not {3, 64, 599} & {int(rows[i]) for pair in pairs_of(found[0].pairs) for i in pair}


@st.composite
def duplicates(draw: st.DrawFn) -> tuple[Copies, SimilarPairs, Ints]:
    """Items of some samples, copies among them, links between their contents, and an order of the samples."""
    num_samples = draw(st.integers(1, 12))
    samples = np.sort(np.array(draw(st.lists(st.integers(0, num_samples - 1), min_size=1, max_size=30))))
    raw = np.array(draw(st.lists(st.integers(0, 9), min_size=len(samples), max_size=len(samples))))
    _, first, contents = np.unique(raw, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    count = len(first)
    edges = draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda e: e[0] < e[1])))
    left, right = (np.array([edge[k] for edge in sorted(edges)], np.int64) for k in (0, 1))
    cosines = np.array([0.9 + 0.01 * (k % 9) for k in range(len(left))], np.float32)
    order = np.array(draw(st.permutations(np.unique(samples).tolist())))
    items = Copies(
        item_rows=np.arange(len(samples)), samples=samples, content_ids=rank[contents], unique_rows=np.sort(first)
    )
    return items, SimilarPairs(left=left, right=right, cosines=cosines), order


@given(duplicates())
def test_removed_samples_have_a_kept_partner(made: tuple[Copies, SimilarPairs, Ints]) -> None:
    items, links, order = made
    removed = choose_removed(items, links, order)
    close = {(a, a): 1.0 for a in range(len(items.unique_rows))}
    for a, b, cosine in zip(links.left.tolist(), links.right.tolist(), links.cosines.tolist(), strict=True):
        close[a, b] = close[b, a] = cosine
    gone = set(removed.samples.tolist())
    assert removed.samples.tolist() == sorted(gone)
    assert not gone & set(removed.kept.tolist())
    contents_of = {sample: items.content_ids[items.samples == sample].tolist() for sample in order.tolist()}
    position = {sample: k for k, sample in enumerate(order.tolist())}
    stay = [sample for sample in order.tolist() if sample not in gone]

    def best(content: int, sample: int) -> float:
        """Return the largest cosine of a content to the earlier samples that are kept."""
        others = [c for other in stay if position[other] < position[sample] for c in contents_of[other]]
        return max((close.get((content, c), 0.0) for c in others), default=0.0)

    for sample in order.tolist():
        weakest = min(best(content, sample) for content in contents_of[sample])
        assert (weakest > 0) == (sample in gone)
    for sample, kept, cosine in zip(removed.samples.tolist(), removed.kept.tolist(), removed.cosines, strict=True):
        weakest = min(best(content, sample) for content in contents_of[sample])
        assert cosine == pytest.approx(weakest)
        assert any((a, b) in close for a in contents_of[sample] for b in contents_of[kept])


def test_chain_keeps_both_ends() -> None:
    items = Copies(item_rows=np.arange(3), samples=np.arange(3), content_ids=np.arange(3), unique_rows=np.arange(3))
    links = SimilarPairs(left=np.array([0, 1]), right=np.array([1, 2]), cosines=np.array([0.96, 0.97], np.float32))
    removed = choose_removed(items, links, np.arange(3))
    assert (removed.samples.tolist(), removed.kept.tolist()) == ([1], [0])
    from_the_middle = choose_removed(items, links, np.array([1, 0, 2]))
    assert (from_the_middle.samples.tolist(), from_the_middle.kept.tolist()) == ([0, 2], [1, 1])


def test_zero_vector_raises(tmp_path: Path) -> None:
    vectors = made_vectors(20, 0)
    vectors[7] = 0
    with pytest.raises(DataError, match="feature made/f: expected vectors that have a cosine, got 1 of length zero"):
        find_near_duplicates(
            write_vectors(tmp_path / "cache", vectors), np.arange(20), [LIMIT], DedupSettings(scratch=tmp_path)
        )


def test_scratch_space_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(DiskFullError, match="comparing 1,000,000,000 vectors needs 1536.0 GB in .* --scratch"),
        scratch_matrix(tmp_path, (10**9, 768), np.float16),
    ):
        pass
    with (
        pytest.raises(PathError, match="scratch: expected an existing folder"),
        scratch_matrix(tmp_path / "x", (1, 1), "f4"),
    ):
        pass

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskFullError, match="no space left on the disk"), scratch_matrix(tmp_path, (2, 2), "f4"):
        pass
    assert not list(tmp_path.iterdir())


@given(st.lists(st.floats(-2, 1, width=32), min_size=1, max_size=50))
def test_histogram_counts_all(cosines: list[float]) -> None:
    counted = histogram(np.array(cosines, np.float32))
    assert counted.counts.sum() == len(cosines)
    assert len(counted.lows) <= 32
    assert counted.lows[-1] + counted.width == pytest.approx(1)
    assert counted.lows[0] <= max(-1, min(cosines)) + 1e-3  # bins are wide enough to reach it
    for low, count in list(zip(counted.lows, counted.counts, strict=True))[1:]:
        inside = sum(low - 1e-3 <= cosine < low + counted.width + 1e-3 or (cosine >= 1) for cosine in cosines)
        assert count <= inside
    assert len(list(counted.bars())) == len(counted.lows)


def test_centroids_depend_on_seed(capfd: pytest.CaptureFixture[str]) -> None:
    vectors = made_vectors(400, 2)
    one, two, other = (fit_centroids(vectors, 10, seed=seed, progress=NullProgress()) for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert np.linalg.norm(one, axis=1) == pytest.approx(1, abs=1e-5)
    assert len(fit_centroids(vectors[:4], 10, seed=0, progress=NullProgress())) == 4
    assert capfd.readouterr().err == ""  # FAISS would warn of few vectors per cluster
