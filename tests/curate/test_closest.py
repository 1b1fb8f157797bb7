import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.arrays import Bools, Floats, Ints, normalize
from embedcache.curate import leaks as closest
from embedcache.curate.leaks import ClosestItems, ItemSets, find_closest_items
from embedcache.curate.settings import LeakSettings
from embedcache.dataset import clusters
from embedcache.progress import NullProgress
from tests.curate.test_near_duplicates import made_vectors, write_vectors

LIMIT = 0.9
CLUSTERS = LeakSettings(all_pairs=False)


def made_sets(count: int, num_test: int, seed: int, folder: Path, *, width: int = 16, noise: float = 0.08) -> ItemSets:
    """Items with near-duplicates in both caches; every seventh test item counts as a copy."""
    vectors = made_vectors(count + num_test, seed, width=width, noise=noise)
    train, test = (
        write_vectors(folder / name, part, chunk_size=256).feature
        for name, part in (("train", vectors[num_test:]), ("test", vectors[:num_test]))
    )
    rows = np.arange(num_test)
    return ItemSets(train=train, test=test, num_train=count, test_rows=rows, is_copy=rows % 7 == 0)


def cosines_of(sets: ItemSets) -> Floats:
    train, test = (
        normalize(feature.read(np.arange(count)).values)
        for feature, count in ((sets.train, sets.num_train), (sets.test, len(sets.test_rows)))
    )
    return test @ train.T


def find(sets: ItemSets, leaks: LeakSettings = CLUSTERS) -> ClosestItems:
    return find_closest_items(sets, LIMIT, leaks, NullProgress())


def near(found: ClosestItems) -> tuple[Ints, Ints]:
    """Test and training items that have a near-duplicate."""
    return np.flatnonzero(found.closest.sims >= LIMIT), np.flatnonzero(found.closest.candidate_sims >= LIMIT)


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(20, 150), st.integers(1, 60), st.integers(0, 99))
def test_clusters_equal_all_pairs_if_complete(count: int, num_test: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets = made_sets(count, num_test, seed, Path(folder))
        found, exact = find(sets), find(sets, LeakSettings(all_pairs=True))
    assert (exact.num_clusters, exact.complete, exact.recall) == (1, 1, None)
    assert found.recall is not None
    if found.complete == 1:
        assert found.recall.num_found == found.recall.num_pairs
        for items, expected in zip(near(found), near(exact), strict=True):
            assert items.tolist() == expected.tolist()
        is_near = exact.closest.sims >= LIMIT
        assert found.closest.rows[is_near].tolist() == exact.closest.rows[is_near].tolist()
        assert found.closest.sims[is_near] == pytest.approx(exact.closest.sims[is_near], abs=1e-6)


def test_recall_equals_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "MAX_VISITS", 1)
    sets = made_sets(2000, 700, 5, tmp_path, width=8, noise=0.12)
    found, cosines = find(sets), cosines_of(sets)
    assert found.recall is not None
    assert found.recall.num_items == 600  # those that are no copies
    assert found.recall.num_pairs == int((cosines >= LIMIT)[~sets.is_copy].sum())
    leaked = np.flatnonzero((cosines >= LIMIT).any(axis=1))
    fraction = len(near(found)[0]) / len(leaked)
    assert set(near(found)[0].tolist()) < set(leaked.tolist())
    assert found.recall.value is not None
    assert 0.3 < found.recall.value < 0.97
    assert found.recall.value <= fraction + 0.02  # an item is found by any of its pairs
    assert found.complete < 1


def test_planted_near_duplicates_are_found(tmp_path: Path) -> None:
    sets = made_sets(2000, 800, 3, tmp_path, width=48, noise=0.27)
    found, cosines = find(sets), cosines_of(sets)
    is_leaked: Bools = (cosines >= LIMIT).any(axis=1)
    assert is_leaked.sum() > 150
    assert (found.closest.sims >= LIMIT)[is_leaked].mean() > 0.99
    assert not (found.closest.sims >= LIMIT)[~is_leaked].any()


def test_all_pairs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = made_sets(40, 20, 1, tmp_path)
    for limit, is_exact in ((40 * 20 * 16, True), (40 * 20 * 16 - 1, False)):
        monkeypatch.setattr(closest, "ALL_PAIRS_LIMIT", limit)
        found = find(sets, LeakSettings())
        assert (found.num_clusters == 1) == is_exact
        assert (found.recall is None) == is_exact


def test_batches_and_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = made_sets(600, 90, 7, tmp_path)
    whole = find(sets)
    monkeypatch.setattr(closest, "_BATCH_BYTES", 4 * 16 * 100)
    batched = find(sets)
    assert batched.closest.rows.tolist() == whole.closest.rows.tolist()
    assert batched.recall == whole.recall
    monkeypatch.setattr(closest, "_TEST_BYTES", 4 * 16 * 45)  # two blocks, each with clusters of its own
    blocked = find(sets)
    assert blocked.recall is not None
    assert whole.recall is not None
    assert blocked.recall.num_pairs == whole.recall.num_pairs
    assert blocked.num_clusters == 13 + 13
    if blocked.complete == whole.complete == 1:
        assert [items.tolist() for items in near(blocked)] == [items.tolist() for items in near(whole)]


def test_the_first_of_equal_training_items_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closest, "_BATCH_BYTES", 4 * 16 * 100)
    vectors = made_vectors(160, 2, width=16)
    train = write_vectors(tmp_path / "train", np.tile(vectors[60:], (3, 1)), chunk_size=100).feature
    test = write_vectors(tmp_path / "test", vectors[:60]).feature
    sets = ItemSets(train=train, test=test, num_train=300, test_rows=np.arange(60), is_copy=np.zeros(60, bool))
    for leaks in (CLUSTERS, LeakSettings(all_pairs=True)):
        found = find(sets, leaks)
        assert found.closest.rows.max() < 100


def test_items_without_a_training_item_in_their_cluster(tmp_path: Path) -> None:
    found = find(made_sets(1, 60, 4, tmp_path))
    is_compared = np.isfinite(found.closest.sims)
    assert 0 < is_compared.sum() < 60
    assert found.closest.rows.tolist() == np.where(is_compared, 0, -1).tolist()
