import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedcache.arrays import Inputs, Ints, normalize
from embedcache.dataset import keytable
from embedcache.dataset.inputs import Reader, open_input
from embedcache.dataset.matches import ItemSet
from embedcache.dataset.pairs import Pairs, read_items
from embedcache.dataset.settings import SplitSettings, with_split_seed
from embedcache.dataset.splits import PARTS, Split, draw_groups, make_split, read_split, split_samples, write_split
from embedcache.errors import CorruptError, DataError, PathError, SettingError, SourceError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.data import open_data
from embedcache.train.settings import TrainSettings
from tests.images import write_images
from tests.toy import IMAGE, TEXT

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
