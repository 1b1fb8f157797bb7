"""Near-duplicates among items, and splits that keep them in one part."""

import hashlib
from collections.abc import Callable
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
from embedcache.dataset import keytable
from embedcache.dataset import matches as module
from embedcache.dataset.inputs import Reader, open_input
from embedcache.dataset.matches import ItemSet, NearItems, find_equal, find_near, near_duplicate_groups, pair_sides
from embedcache.dataset.pairs import Items, Pairs, read_items
from embedcache.dataset.settings import SplitSettings, with_split_seed
from embedcache.dataset.splits import PARTS, Split, draw_groups, make_split, read_split, split_samples, write_split
from embedcache.errors import CorruptError, DataError, PathError, SettingError, SourceError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.neighbors import pairs as near_pairs
from embedcache.progress import NullProgress
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.data import open_data
from embedcache.train.settings import TrainSettings
from tests.curate.test_near_duplicates import write_vectors
from tests.images import write_images
from tests.neighbors.made import made_vectors
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT

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


FEATURES = {"image": "open_toy/cls", "text": "open_toy/mean"}


def split_of(cache_path: Path, settings: SplitSettings) -> Split:
    data = open_data(cache_path, {"image": "open_toy/cls", "text": "open_toy/mean"}, memory_bytes=10**9)
    return data.split(data.pairs(None), settings)


def opened(cache_path: Path) -> tuple[Cache, Split]:
    return Cache(cache_path), split_of(cache_path, SplitSettings(cosines={"image": 0.995, "text": 0.95}))


def test_strict_split_separates_near_duplicates(cache_path: Path) -> None:
    cache, split = opened(cache_path)
    parts = np.array(split.parts)
    assert {part: (parts == part).sum() for part in PARTS}["test"] > 30
    for name, modality, threshold in (("open_toy/cls", "image", 0.995), ("open_toy/mean", "text", 0.95)):
        vectors = normalize(cache.feature(modality, name).load())
        for part in PARTS:
            across = vectors[parts == part] @ vectors[parts != part].T
            assert across.max() <= threshold + 1e-6


@pytest.mark.parametrize(
    ("sizes", "quotas"),
    [([1] * 30, [9, 4]), ([5, 1, 1, 7, 3, 2, 1, 1], [6, 5]), ([4, 4], [3, 9]), ([1, 2, 1], [4, 0]), ([2, 2], [0, 9])],
)
def test_drawn_groups_are_those_of_one_after_another(sizes: list[int], quotas: list[int]) -> None:
    expected, draw = groups_one_after_another(sizes, quotas)
    np.testing.assert_array_equal(draw(), expected)


def groups_one_after_another(sizes: list[int], quotas: list[int]) -> tuple[Ints, Callable[[], Ints]]:
    """Draw groups of some sizes in a loop; return what is expected, and a function that draws them."""
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    keys = [f"k{number * 7 % len(groups)}" for number in range(len(groups))]
    members = [np.flatnonzero(groups == group).tolist() for group in range(len(sizes))]
    lead = [min(keys[row] for row in rows) for rows in members]
    rest = sorted(range(len(sizes)), key=lambda group: hashlib.sha256(f"3:{lead[group]}".encode()).digest())
    expected = np.full(len(groups), -1)
    for number, quota in enumerate(quotas):
        for group in list(rest):
            if len(members[group]) <= quota:
                quota -= len(members[group])
                expected[members[group]] = number
                rest.remove(group)
    return expected, lambda: draw_groups(pa.array(keys), groups, quotas, 3)


def test_key_split_keeps_fractions(cache_path: Path) -> None:
    split = split_of(cache_path, SplitSettings(kind="key", val_fraction=0.2, test_fraction=0.3))
    assert [split.parts.count(part) for part in PARTS] == [150, 60, 90]
    capped = split_of(cache_path, SplitSettings(kind="key", max_val=10, max_test=20))
    assert [capped.parts.count(part) for part in PARTS] == [270, 10, 20]
    assert set(capped.rows("test")) <= set(split.rows("test"))  # the order is the same


def test_strict_split_joins_by_any_caption(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "s", 40)
    (folder / "00003.txt").write_text("something of its own\nthe very same words\n")
    (folder / "00020.txt").write_text("the very same words\nsomething else again\n")
    (folder / "00007.txt").unlink()  # a sample without captions: rows and positions differ
    extract(open_source(folder), tmp_path / "c", image_encoder=[IMAGE], text_encoder=[TEXT])
    split = split_of(tmp_path / "c", SplitSettings(cosines={"image": 0.9999, "text": 0.999}, val_fraction=0.2))
    assert split.groups[3] == split.groups[20]
    assert split.parts[3] == split.parts[20]
    assert split.groups[7] == -1
    assert split.parts[7] == ""


def test_split_of_two_caches(cache_path: Path, two_caches: list[Path], tmp_path: Path) -> None:
    """Keys are read and not kept."""
    caches = [Cache(path) for path in two_caches]
    split = split_samples(caches, np.arange(1, 120), SplitSettings(kind="key"))
    write_split(tmp_path / "split.parquet", caches, split)
    assert read_split(tmp_path / "split.parquet", caches) == split
    assert not any("key" in cache._sample_columns for cache in caches)
    first, second = caches
    assert read_split(tmp_path / "split.parquet", [second, first]).parts == split.parts[40:] + split.parts[:40]
    assert read_split(tmp_path / "split.parquet", [second]).parts == split.parts[40:]
    write_split(tmp_path / "split.parquet", [Cache(cache_path)], Split(parts=["train"] * 300, groups=[0] * 300))
    keytable.write(
        tmp_path / "odd.parquet", caches, {"part": split.parts, "group": split.groups}, "split", {"cosines": 5}
    )
    with pytest.raises(CorruptError, match=r"odd\.parquet .*: cosine"):
        read_split(tmp_path / "odd.parquet", caches)
    with pytest.raises(DataError, match="260 of 300 keys"):
        read_split(tmp_path / "split.parquet", [first])
    with pytest.raises(PathError, match="nothing"):
        read_split(tmp_path / "no", caches)


def test_split_of_another_run_is_used(two_caches: list[Path], tmp_path: Path) -> None:
    cache = Cache(two_caches[0])
    split = split_samples([cache], np.arange(0, 40, 2), SplitSettings(kind="key"))
    write_split(tmp_path / "3.parquet", [cache], split)
    kind = str(tmp_path / "{seed}.parquet")
    assert split_samples([cache], np.arange(40), SplitSettings(kind=kind, seed=3)) == split
    with pytest.raises(UnknownNameError, match="unknown split .*; or use the path of another run's split.parquet"):
        split_samples([cache], np.arange(40), SplitSettings(kind=kind, seed=4))
    with pytest.raises(UnknownNameError, match="unknown split 'strict'"):  # needs features
        split_samples([cache], np.arange(40), SplitSettings())


def vectors_of(*groups: int) -> dict[str, Reader]:
    """Return readers of features in which samples of one group are equal, and others are orthogonal."""
    vectors = np.eye(max(groups) + 1, dtype=np.float32)[list(groups)]
    return {name: lambda rows: Inputs(vectors[rows]) for name in ("image", "text")}


def test_groups_that_are_too_large_are_refused_before_all_is_compared(two_caches: list[Path]) -> None:
    """The texts of groups that are too large for their images already are not read."""
    data = open_data(two_caches[:1], FEATURES, memory_bytes=10**9)
    pairs = data.pairs(None).select(np.arange(8))

    def read(rows: Ints) -> Inputs:
        raise AssertionError(rows)

    for groups, size in (([0] * 8, 8), ([0, 0, 0, 0, 0, 1, 1, 1], 5), ([0, 0, 0, 0, 1, 1, 1, 2], 4)):
        readers = {"image": vectors_of(*groups)["image"], "text": read}
        with pytest.raises(SettingError, match=f"the largest near-duplicate group has at least {size} samples"):
            make_split(data.caches, pairs, SplitSettings(), readers)


def test_other_modalities_of_the_samples_are_compared(cache_path: Path) -> None:
    cache, cosines = Cache(cache_path), {"image": 0.9999, "text": 0.9999}
    images, captions = open_input(cache, "image", "open_toy/cls"), open_input(cache, "text", "open_toy/mean")
    items = read_items([cache], [images])
    texts = ItemSet(captions, read_items([cache], [captions]).select(items.samples))
    for modalities, compared in (((), ("image", "text")), (("image",), ("image",)), (("text",), ("text",))):
        settings = SplitSettings(cosines=cosines, modalities=modalities)
        split = make_split([cache], Pairs(first=items, second=items), settings, {"image": images.read})
        assert (split.rule, split.compared) == ("strict", compared)
        parts = np.array(split.parts)[texts.items.samples]
        unit = texts.vectors().read(texts.items.rows)
        closest = (unit @ unit.T)[parts[:, None] != parts[None]].max()
        assert (closest < 0.9999) == ("text" in compared)
    with pytest.raises(SettingError, match="split_by: .* got audio"):
        make_split([cache], Pairs(first=items, second=items), SplitSettings(modalities=("audio",)), {})


def test_parts_that_are_empty_raise(two_caches: list[Path]) -> None:
    data = open_data(two_caches[:1], FEATURES, memory_bytes=10**9)
    pairs = data.pairs(None).select(np.arange(8))

    def split(readers: dict[str, Reader], **settings: Any) -> list[int]:
        made = make_split(data.caches, pairs, SplitSettings(**settings), readers)
        return [made.parts.count(part) for part in PARTS]

    assert split(vectors_of(*range(8)), val_fraction=0.12) == [5, 1, 2]
    for fractions in ({"val_fraction": 0.01}, {"test_fraction": 0.01}):
        with pytest.raises(SettingError, match="at least 3 samples"):
            split(vectors_of(0, 1, 1, 2, 3, 4, 1, 5), **fractions)
        with pytest.raises(SettingError, match="fraction"):
            split({}, kind="key", **fractions)


def test_column_of_several_caches(two_caches: list[Path]) -> None:
    """Check that names are of any case, that unknown ones are in no part, and that samples without a pair are not."""
    caches = [Cache(path) for path in two_caches]
    first, second = ["Train", "TEST", "dev", "other"] * 10, ["valid", "validation", "train", None] * 20
    for cache, names in zip(caches, (first, second), strict=True):
        cache._sample_columns["split"] = pa.chunked_array([names])
        assert "split" not in cache.columns
    settings, samples = SplitSettings(kind="column"), np.arange(1, 120)
    with pytest.raises(SourceError, match=r"the samples of .*a have no column 'split'; use"):
        split_samples(caches, samples, settings)
    for cache in caches:
        vars(cache)["columns"] = ["key", "split"]
    split = split_samples(caches, samples, settings)
    assert split.parts == ["", *(["train", "test", "val", ""] * 10)[1:], *["val", "val", "train", ""] * 20]
    assert list(split.groups) == list(range(120))
    caches[0]._sample_columns["split"] = pa.chunked_array([["Train", "x", None, "val"] * 10])
    with pytest.raises(SourceError, match="expected train"):
        split_samples(caches, samples, settings)


def test_seed_of_the_training_is_that_of_the_split_unless_they_differed() -> None:
    apart = TrainSettings(split=SplitSettings(seed=5), seed=3)
    assert with_split_seed({"seed": 7, "lr": None}) == {"seed": 7, "split_seed": 7}
    assert with_split_seed({"seed": 7}, TrainSettings())["split_seed"] == 7
    assert with_split_seed({"seed": 7}, apart) == {"seed": 7}
