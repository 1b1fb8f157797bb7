"""Copies and near-duplicates of some items among others, against plain searches; all pairs and within clusters."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Floats, Inputs, Ints, normalize
from embedcache.dataset import matches as module
from embedcache.dataset.inputs import Reader
from embedcache.dataset.matches import ItemSet, NearItems, find_equal, find_near, near_duplicate_groups, pair_sides
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.settings import SplitSettings
from embedcache.neighbors import pairs as near_pairs
from embedcache.progress import NullProgress
from tests.curate.test_near_duplicates import write_vectors
from tests.neighbors.made import made_vectors
from tests.recorded import RecordedProgress

LIMIT = 0.9


def made_sets(path: Path, test_QP: Floats, train_CP: Floats) -> tuple[ItemSet, ItemSet]:
    """Items of two caches; the hash of each is its row."""
    sets = []
    for name, vectors_NP in (("test", test_QP), ("train", train_CP)):
        opened = write_vectors(path / name, vectors_NP, chunk_size=100)
        rows = np.arange(len(vectors_NP))
        sets.append(ItemSet(opened.feature, Items(rows=rows, samples=rows, contents=rows)))
    return sets[0], sets[1]


def find(sets: tuple[ItemSet, ItemSet], **options: Any) -> NearItems:
    return find_near(*sets, LIMIT, progress=NullProgress(), **options)


def near(found: NearItems) -> tuple[list[int], list[int]]:
    """Items and other items that have a near-duplicate."""
    sims = found.sims, found.other_sims
    return np.flatnonzero(sims[0] >= LIMIT).tolist(), np.flatnonzero(sims[1] >= LIMIT).tolist()


@pytest.mark.parametrize(("num_test", "num_train"), [(60, 150), (150, 1), (1, 40), (300, 700)])
def test_closest_pairs_equal_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_test: int, num_train: int
) -> None:
    vectors = made_vectors(num_test + num_train, 3, width=48, noise=0.27)
    sets = made_sets(tmp_path, vectors[:num_test], vectors[num_test:])
    cosines = vectors[:num_test] @ vectors[num_test:].T
    exact = find(sets, all_pairs=True)
    assert exact.closest.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(exact.sims, cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(exact.other_sims, cosines.max(axis=0), atol=1e-6)
    assert (exact.num_clusters, exact.complete, exact.recall) == (1, 1, None)

    monkeypatch.setattr(module, "_BATCH", 64)
    found = find(sets, all_pairs=False)
    assert near(found) == near(exact)  # so few clusters that every border is crossed
    is_near = exact.sims >= LIMIT
    assert found.closest[is_near].tolist() == exact.closest[is_near].tolist()
    assert found.recall is not None
    assert found.recall.num_found == found.recall.num_pairs == pytest.approx((cosines >= LIMIT).sum(), abs=1)
    assert ((found.closest >= 0) == np.isfinite(found.sims)).all()


def test_recall_is_that_of_drawn_items(tmp_path: Path) -> None:
    vectors = made_vectors(2700, 5, width=8, noise=0.12)
    sets = made_sets(tmp_path, vectors[:700], vectors[700:])
    cosines, is_probe = vectors[:700] @ vectors[700:].T, np.arange(700) % 7 != 0
    with patch.object(near_pairs, "MAX_VISITS", 1):
        found = find(sets, all_pairs=False, is_probe=is_probe)
    assert found.recall is not None
    assert (found.recall.num_items, found.recall.num_pairs) == (
        600,
        pytest.approx((cosines >= LIMIT)[is_probe].sum(), abs=2),
    )
    leaked = np.flatnonzero((cosines >= LIMIT).any(axis=1))
    assert set(near(found)[0]) < set(leaked.tolist())
    assert 0.3 < (found.recall.value or 0) < 0.97
    assert (found.recall.value or 0) <= len(near(found)[0]) / len(leaked) + 0.02  # an item is found by any of its pairs
    assert found.complete < 1


def test_all_pairs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = made_vectors(60, 1)
    sets = made_sets(tmp_path, vectors[:20], vectors[20:])
    for limit, is_exact in ((40 * 20 * 16, True), (40 * 20 * 16 - 1, False)):
        monkeypatch.setattr(module, "ALL_PAIRS_LIMIT", limit)
        assert (find(sets).recall is None) == is_exact


@pytest.mark.parametrize("all_pairs", [True, False])
def test_the_first_of_equal_items_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_pairs: bool) -> None:
    monkeypatch.setattr(module, "_BATCH", 100)
    vectors = made_vectors(160, 2)
    sets = made_sets(tmp_path, vectors[:60], np.tile(vectors[60:], (3, 1)))
    assert find(sets, all_pairs=all_pairs).closest.max() < 100


def test_equal_items_are_found_by_hash(tmp_path: Path) -> None:
    sets = made_sets(tmp_path, made_vectors(5, 0), made_vectors(8, 1))
    items = [ItemSet(Hashed(hashes), sets[0].items.where(np.arange(5) < len(hashes))) for hashes in ("abc", "bbxc")]  # type: ignore[arg-type]
    rows, is_equal = find_equal(*items)
    assert (rows.tolist(), is_equal.tolist()) == ([-1, 0, 3], [True, True, False, True])


class Hashed:
    """A feature of which only the hashes are known, one letter each; x is no hash."""

    def __init__(self, letters: str) -> None:
        self._hashes = pa.chunked_array([pa.array([None if letter == "x" else letter for letter in letters])])

    def hashes_of(self, rows: Ints) -> pa.ChunkedArray:
        """Return the hashes of some rows."""
        return self._hashes.take(pa.array(rows))


COSINES = SplitSettings(cosines={"image": 0.9, "text": 0.5}, seed=3)


def made(seed: int, num_samples: int) -> tuple[Pairs, dict[str, Reader], list[tuple[Items, Floats, float]]]:
    """Return samples, of which each second one is used, with one image and one or two texts in a table with others."""
    rng = np.random.default_rng(seed)
    used = np.arange(1, 2 * num_samples, 2)
    sides, vectors = [], []
    for samples in (used, np.sort(np.concatenate([used, used[: num_samples // 2]]))):
        rows = np.sort(rng.permutation(2 * len(samples))[: len(samples)])
        sides.append(Items(rows=rows, samples=samples, contents=np.arange(len(samples))))
        vectors.append(normalize(rng.standard_normal((2 * len(samples), 4))))
    readers = {"image": lambda rows: Inputs(vectors[0][rows]), "text": lambda rows: Inputs(vectors[1][rows])}
    of_sides = [(items, of_side[items.rows], cosine) for items, of_side, cosine in zip(sides, vectors, (0.9, 0.5))]  # noqa: B905
    return Pairs(first=sides[0], second=sides[1]), readers, of_sides


def components(pairs: Pairs, sides: list[tuple[Items, Floats, float]]) -> Ints:
    """Return the connected components of all pairs of samples with items above a cosine."""
    size = len(pairs.samples)
    near = np.zeros((size, size), bool)
    for items, vectors, cosine in sides:
        left, right = np.nonzero(vectors @ vectors.T > cosine)
        place = np.searchsorted(pairs.samples, items.samples)
        near[place[left], place[right]] = True
    return scipy.sparse.csgraph.connected_components(near)[1]


def together(groups: Ints) -> list[list[bool]]:
    return (groups[:, None] == groups[None, :]).tolist()


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(2, 40), st.sampled_from([2, 7]))
def test_groups_are_connected_components(seed: int, num_samples: int, block: int) -> None:
    """Check both ways; blocks of any size, and edges that are merged at any time, give the same."""
    pairs, readers, sides = made(seed, num_samples)
    expected = together(components(pairs, sides))
    progress = RecordedProgress()
    assert together(near_duplicate_groups(pairs.samples, COSINES, pair_sides(pairs, readers), progress)) == expected
    assert progress.counts == {what: count for what, count, _ in progress.started}
    progress = RecordedProgress()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_COMPARED_ITEMS", 1)
        patch.setattr(near_pairs, "BLOCK", block)
        found = near_duplicate_groups(pairs.samples, COSINES, pair_sides(pairs, readers), progress)
    assert found.dtype == np.int64
    assert together(found) == expected  # so few clusters that every border is crossed
    assert progress.counts == {what: count for what, count, _ in progress.started}
