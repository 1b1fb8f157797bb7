import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Array, Floats, Ints
from embedcache.curate import copies
from embedcache.curate.copies import Copies
from embedcache.curate.dedup import PAIR, choose_removed, find_near_duplicates
from embedcache.curate.pixels import NO_DISTANCE
from embedcache.curate.settings import DedupSettings
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import open_vectors
from tests.neighbors.made import brute, made_vectors

LIMIT = 0.9


def write_vectors(folder: Path, vectors_NP: Floats, *, chunk_size: int = 64) -> Vectors:
    """A cache of imported vectors, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "vectors.npy", vectors_NP)
    import_vectors(
        open_vectors("npy", files={"image": folder / "vectors.npy"}), folder / "cache", chunk_size=chunk_size
    )
    return Vectors(folder / "cache", "image")


def pairs_of(pairs: Array) -> set[tuple[int, int]]:
    return set(zip(pairs["left"].tolist(), pairs["right"].tolist(), strict=True))


@pytest.mark.slow
@settings(max_examples=12)
@given(st.integers(30, 150), st.integers(0, 99))
def test_clusters_equal_all_pairs_if_complete(count: int, seed: int) -> None:
    vectors = made_vectors(count, seed)
    with tempfile.TemporaryDirectory() as folder:
        opened = write_vectors(Path(folder), vectors, chunk_size=16)
        near = find_near_duplicates(
            opened, np.arange(count), [LIMIT], DedupSettings(pixels=False, all_pairs=False, scratch=folder)
        )
    doubtful = brute(vectors, LIMIT - 1e-4) - brute(vectors, LIMIT + 1e-4)  # float16 in the scratch file
    assert pairs_of(near.pairs) - doubtful <= brute(vectors, LIMIT)
    assert near.recall is not None
    if near.complete == 1:
        assert pairs_of(near.pairs) | doubtful >= brute(vectors, LIMIT)
        assert near.recall.num_found == near.recall.num_pairs


@pytest.mark.slow
def test_all_pairs_equal_brute_force(tmp_path: Path) -> None:
    vectors = made_vectors(4200, 3, width=24, noise=0.15)
    near = find_near_duplicates(
        write_vectors(tmp_path, vectors, chunk_size=2048),
        np.arange(4200),
        [LIMIT],
        DedupSettings(pixels=False, scratch=tmp_path),
    )
    assert near.num_clusters == 1
    assert pairs_of(near.pairs) == brute(vectors, LIMIT)
    assert len(near.pairs) > 500
    cosines = np.einsum("lp,lp->l", vectors[near.pairs["left"]], vectors[near.pairs["right"]])
    np.testing.assert_allclose(near.pairs["cosine"], cosines, atol=1e-6)  # not those of float16


def test_all_pairs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "ALL_PAIRS_LIMIT", 200)
    opened = write_vectors(tmp_path, made_vectors(201, 1))
    for count, is_all_pairs in ((200, True), (201, False)):
        near = find_near_duplicates(opened, np.arange(count), [LIMIT], DedupSettings(pixels=False, scratch=tmp_path))
        assert (near.num_clusters == 1) == is_all_pairs
        assert (near.recall is None) == is_all_pairs


def linked(*links: tuple[int, int, float, int]) -> Array:
    return np.array(list(links), PAIR)


@st.composite
def duplicates(draw: st.DrawFn) -> tuple[Copies, Array, Ints]:
    """Items of some samples, copies among them, links between their contents, and an order of the samples."""
    num_samples = draw(st.integers(1, 12))
    samples = np.sort(np.array(draw(st.lists(st.integers(0, num_samples - 1), min_size=1, max_size=30))))
    raw = np.array(draw(st.lists(st.integers(0, 9), min_size=len(samples), max_size=len(samples))))
    _, first, contents = np.unique(raw, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    count = len(first)
    edges = draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda e: e[0] < e[1])))
    links = [(*edge, 0.9 + 0.01 * (k % 9), NO_DISTANCE) for k, edge in enumerate(sorted(edges))]
    order = np.array(draw(st.permutations(np.unique(samples).tolist())))
    items = Copies(
        item_rows=np.arange(len(samples)), samples=samples, content_ids=rank[contents], unique_rows=np.sort(first)
    )
    return items, linked(*links), order


@pytest.mark.slow
@given(duplicates())
def test_removed_samples_have_a_kept_partner(made: tuple[Copies, Array, Ints]) -> None:
    items, links, order = made
    removed = choose_removed(items, links, order)
    close = {(a, a): 1.0 for a in range(len(items.unique_rows))}
    for a, b, cosine, _ in links.tolist():
        close[a, b] = close[b, a] = cosine
    gone = set(removed["sample"].tolist())
    assert removed["sample"].tolist() == sorted(gone)
    assert not gone & set(removed["kept"].tolist())
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
    for sample, kept, cosine, *_ in removed.tolist():
        weakest = min(best(content, sample) for content in contents_of[sample])
        assert cosine == pytest.approx(weakest)
        assert any((a, b) in close for a in contents_of[sample] for b in contents_of[kept])


def removed_of(items: Copies, links: Array, order: list[int] | None = None) -> list[tuple[int, int]]:
    removed = choose_removed(items, links, np.arange(3) if order is None else np.array(order))
    return list(zip(removed["sample"].tolist(), removed["kept"].tolist(), strict=True))


def test_partner_that_stays() -> None:
    """Check a chain, a picture that is less similar than another item, and a content that two samples hold."""
    items = Copies(item_rows=np.arange(3), samples=np.arange(3), content_ids=np.arange(3), unique_rows=np.arange(3))
    chain = linked((0, 1, 0.96, NO_DISTANCE), (1, 2, 0.97, NO_DISTANCE))
    assert removed_of(items, chain) == [(1, 0)]
    assert removed_of(items, chain, [1, 0, 2]) == [(0, 1), (2, 1)]
    (picture,) = choose_removed(items, linked((0, 2, 0.8, 5), (1, 2, 0.97, 90)), np.arange(3)).tolist()
    assert picture == (2, 0, pytest.approx(0.8), 5, True)
    held_twice = Copies(
        item_rows=np.arange(4),
        samples=np.array([0, 1, 1, 2]),
        content_ids=np.array([0, 0, 1, 0]),
        unique_rows=np.array([0, 2]),
    )
    assert removed_of(held_twice, linked()) == [(2, 0)]


def test_zero_vector_raises(tmp_path: Path) -> None:
    vectors = made_vectors(20, 0)
    vectors[7] = 0
    opened = write_vectors(tmp_path, vectors)
    with pytest.raises(DataError, match="000000007"):
        find_near_duplicates(opened, np.arange(20), [LIMIT], DedupSettings(pixels=False, scratch=tmp_path))
