"""Cutting and merging: the same values in new rows, nothing encoded, and the same bytes after a kill."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedcache.derive.derive import derive
from embedcache.derive.rules import Derivation
from embedcache.errors import (
    CorruptError,
    DataError,
    FingerprintError,
    PathError,
    SettingError,
    SourceError,
    UnfinishedError,
    UnknownNameError,
)
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.maintain.copy import cut_cache, merge_caches
from embedcache.maintain.prune import prune_cache
from embedcache.maintain.remove import remove_samples
from embedcache.modalities import FileItem
from embedcache.progress import NullProgress
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.tables import to_file_item
from embedcache.store.verify import verify
from tests.crash import call
from tests.extract.cases import tree
from tests.images import write_images
from tests.maintain.cases import KEYS, make_cache, write_source
from tests.sources.files import reopen
from tests.toy import IMAGE

pytestmark = pytest.mark.slow

CHOSEN = ["00001", KEYS[0], "00006", "00007", "00008", "00011"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of twelve images, its cache of two parts, and a selection of six of them. Not to be changed."""
    folder = tmp_path_factory.mktemp("copy")
    source = write_source(folder / "source")
    late = [path.rename(folder / path.name) for path in source.glob("00011.*")]
    make_cache(source, folder / "c")
    for path in late:
        path.rename(source / path.name)
    make_cache(source, folder / "c", extend=True)
    (folder / "chosen.txt").write_text("".join(f"{key}\n" for key in CHOSEN))
    return folder


@pytest.fixture(scope="module")
def small(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that was cut by the selection. Not to be changed."""
    path = tmp_path_factory.mktemp("small") / "small"
    cut_cache(made / "c", made / "chosen.txt", path)
    return path


def assert_same_values(cache: Cache, expected: Cache, samples: list[int]) -> None:
    """Check that a cache has the items, features, reasons and hashes of some samples of another."""
    for modality, num_items in cache.info.num_items.items():
        of_items = expected.items(modality)["sample"].to_numpy()
        rows = np.concatenate([np.flatnonzero(of_items == sample) for sample in samples])
        assert num_items == len(rows)
        for feature in cache.features(modality):
            other = expected.feature(modality, feature.name)
            assert feature.fingerprint == other.fingerprint
            assert feature.axis == other.axis
            assert list(feature.hashes) == [other.hashes[row] for row in rows.tolist()]
            for one, two in zip(feature.gather_tokens(np.arange(num_items)), other.gather_tokens(rows), strict=True):
                assert (one == two).all()


def test_cut_has_samples_of_selection(made: Path, small: Path) -> None:
    cache, whole = Cache(small), Cache(made / "c")
    assert cache.column("key").to_pylist() == CHOSEN
    assert verify(cache) == []
    assert_same_values(cache, whole, [1, 3, 6, 7, 8, 11])
    assert len(cache.features("image")) == len(whole.features("image"))


class OnceCopying(NullProgress):
    """Calls a function once, while the first chunk is copied."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function
        self._is_copying = False

    def start(self, what: str, total: int, unit: str) -> None:
        self._is_copying = what.startswith("copying")

    def advance(self, count: int) -> None:
        if self._is_copying and self._function is not None:
            function, self._function = self._function, None
            function()


def check_refused(folder: Path) -> None:
    with pytest.raises(PathError, match="another process computes features in this folder"):
        prune_cache(folder, feature="open_toy/cls", modality="image")


def test_feature_that_is_being_copied_is_not_deleted(made: Path, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    progress = OnceCopying(lambda: call(check_refused, folder))
    report = cut_cache(made / "c", made / "chosen.txt", folder, progress=progress)
    assert report.reused == 0
    assert tree(folder) == tree(small)


def test_chunk_that_is_written_again_meanwhile_is_named(made: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made / "c", tmp_path / "c"))
    chunk = cache / "image/open_toy/chunks/00002.json"
    with pytest.raises(UnfinishedError, match="chunk 2 of .*open_toy is being written again by another process"):
        cut_cache(cache, made / "chosen.txt", tmp_path / "small", progress=OnceCopying(chunk.unlink))


@pytest.fixture(scope="module")
def halves(made: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The cache of the selection, and one of all other samples. Not to be changed."""
    folder = tmp_path_factory.mktemp("halves")
    rest = [key for key in Cache(made / "c").column("key").to_pylist() if key not in CHOSEN]
    (folder / "rest.txt").write_text("".join(f"{key}\n" for key in rest))
    cut_cache(made / "c", folder / "rest.txt", folder / "rest")
    return [small, folder / "rest"]


def test_cut_without_some(made: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made / "c", tmp_path / "c"))
    remove_samples(cache, KEYS)
    report = cut_cache(cache, made / "chosen.txt", tmp_path / "small", features=["open_toy/cls", "small"])
    assert report.features == ["image/open_toy/cls", "image/small/pca"]
    assert Cache(tmp_path / "small").column("key").to_pylist() == [key for key in CHOSEN if key not in KEYS]
    assert verify(Cache(tmp_path / "small")) == []
    with pytest.raises(UnknownNameError, match="unknown feature 'open_toy/clss' of .*; did you mean 'open_toy/cls'"):
        cut_cache(cache, made / "chosen.txt", tmp_path / "other", features=["open_toy/clss"])
    (tmp_path / "one.txt").write_text("00001\n")
    with pytest.raises(FingerprintError, match="subset.rows: stored"):
        cut_cache(cache, tmp_path / "one.txt", tmp_path / "small")


def test_cut_of_samples_without_captions_has_no_features_of_them(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "00001.txt").unlink()
    (source / "00000.png").write_bytes(b"junk")
    make_cache(source, tmp_path / "c")
    (tmp_path / "one.txt").write_text("00001\n")
    report = cut_cache(tmp_path / "c", tmp_path / "one.txt", tmp_path / "one", features="open_toy")
    assert report.features == ["image/open_toy/cls", "image/open_toy/patches"]
    assert Cache(tmp_path / "one").feature("image", "open_toy/cls").valid.all()
    assert verify(Cache(tmp_path / "one")) == []


def test_removed_from_a_cut_it_gets_no_features(made: Path, tmp_path: Path) -> None:
    cut_cache(made / "c", made / "chosen.txt", tmp_path / "few", features="open_toy/mean")
    cut_cache(made / "c", made / "chosen.txt", tmp_path / "all")
    for name in ("few", "all"):
        remove_samples(tmp_path / name, KEYS[0])
    cut_cache(made / "c", made / "chosen.txt", tmp_path / "few")
    few, whole = Cache(tmp_path / "few"), Cache(tmp_path / "all")
    assert verify(few) == []
    for feature in (feature for modality in few.info.num_items for feature in few.features(modality)):
        assert feature.failures == {1: "removed"}
        assert list(feature.hashes) == list(whole.feature(feature.modality, feature.name).hashes)


def test_cut_keeps_what_another_derived_feature_was_fitted_to(made: Path, tmp_path: Path) -> None:
    out = cut_cache(made / "c", made / "chosen.txt", tmp_path / "out", features="open_toy").cache
    inputs = [("image", "open_toy/cls")]
    derive(out, Derivation(name="small", inputs=inputs, rule="pca", parameters={"width": 4}))
    before = tree(out / "image" / "small")
    with pytest.raises(FingerprintError, match="derived feature 'small' of cache .* was made with other settings"):
        cut_cache(made / "c", made / "chosen.txt", out)
    assert tree(out / "image" / "small") == before


def test_damaged_fit_is_not_copied(made: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made / "c", tmp_path / "c"))
    out = cut_cache(cache, made / "chosen.txt", tmp_path / "out").cache
    before, path = tree(out), cache / "image" / "small" / "fit.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match=r"fit.safetensors is missing or not the file that the features were"):
        cut_cache(cache, made / "chosen.txt", out)
    assert tree(out) == before


def test_merge(two_caches: list[Path], tmp_path: Path) -> None:
    first, second = two_caches
    with pytest.raises(DataError, match=r"'00000' is the key of row 0 .*--prefix-keys"):
        merge_caches([first, second], tmp_path / "both")
    report = merge_caches([first, second], tmp_path / "both", prefix_keys=True)
    assert (report.num_samples, report.copied) == (120, 240)
    both = Cache(tmp_path / "both")
    assert both.column("key").to_pylist()[39:41] == ["a/00039", "b/00000"]
    assert verify(both) == []
    for place, other in ((slice(0, 40), Cache(first)), (slice(40, 120), Cache(second))):
        rows = np.arange(place.start, place.stop)
        for feature in both.features("text"):
            own = other.feature("text", feature.name).gather_tokens(np.arange(len(rows)))
            assert all((one == two).all() for one, two in zip(feature.gather_tokens(rows), own, strict=True))
    item = to_file_item(both.items("image").slice(41, 1).to_pylist()[0])
    assert item.path == "1/00001.png"
    read = reopen(both.info.source).read(item)
    assert read == reopen(Cache(second).info.source).read(FileItem(path="00001.png"))
    assert merge_caches([first, second], tmp_path / "both", prefix_keys=True).copied == 0
    (renamed := tmp_path / "d").symlink_to(second)
    with pytest.raises(FingerprintError, match="both was made with .*prefixes: stored .*'b/'.*, requested .*'d/'"):
        merge_caches([first, renamed], tmp_path / "both", prefix_keys=True)
    source = reopen(Cache(first).info.source)
    with pytest.raises(SettingError, match="was cut or merged from caches of .*embedcache extract"):
        extract(source, tmp_path / "both", image_encoder=[IMAGE])


def test_copies_take_other_encoders_as_their_own_source(made: Path, halves: list[Path], tmp_path: Path) -> None:
    merge_caches(halves, tmp_path / "whole")
    extract(tmp_path / "whole", tmp_path / "whole", image_encoder="tests.toy:open_other")
    for number, half in enumerate(halves):
        shutil.copytree(half, tmp_path / str(number))
        extract(tmp_path / str(number), tmp_path / str(number), image_encoder="tests.toy:open_other")
    merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "expected")
    found, expected = (Cache(tmp_path / name).feature("image", "open_other/cls") for name in ("whole", "expected"))
    np.testing.assert_array_equal(found.load(), expected.load())
    assert list(found.hashes) == list(expected.hashes)
    assert verify(Cache(tmp_path / "whole")) == []
    with pytest.raises(SettingError, match="to encode its samples"):
        extract(made / "source", halves[0], image_encoder=[IMAGE])


def test_merge_with_a_cache_without_captions(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedcache.maintain.copy.BLOCK", 5)  # samples that are read together
    source = write_images(tmp_path / "source", 5, seed=3)
    for path in source.glob("*.txt"):
        path.unlink()
    extract(open_source(source), tmp_path / "images", image_encoder=[IMAGE])
    both = Cache(merge_caches([made / "c", tmp_path / "images"], tmp_path / "both", prefix_keys=True).cache)
    assert both.info.num_items == {"image": 17, "text": 12}
    assert both.items("text").equals(Cache(made / "c").items("text"))
    assert both.items("image")["sample"].to_pylist() == list(range(17))
    assert verify(both) == []
    first, second = (
        cache.feature("text", "open_toy/mean").gather(np.arange(12)) for cache in (both, Cache(made / "c"))
    )
    assert (first == second).all()


def test_merge_refuses_other_encoders(made: Path, tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 5, seed=3)
    scaled = f"{IMAGE},scale=2"
    extract(open_source(source), tmp_path / "scaled", image_encoder=[scaled])
    with pytest.raises(FingerprintError, match=r"open_toy of .*scaled was made with other settings: weights: stored"):
        merge_caches([made / "c", tmp_path / "scaled"], tmp_path / "both", prefix_keys=True)
    extract(open_source(source), tmp_path / "one", image_encoder=[IMAGE], settings=ExtractSettings(chunk_size=2))
    report = merge_caches([made / "c", tmp_path / "one"], tmp_path / "both", prefix_keys=True)
    assert report.features == ["image/open_toy/cls"]
    assert "image/open_toy@flip/cls" in report.left_out
    caches, patches = [tmp_path / "one", made / "c"], "open_toy/patches"
    report = merge_caches(caches, tmp_path / "none", prefix_keys=True, features=patches)
    assert (report.features, report.left_out) == ([], [f"image/{patches}"])
    (tmp_path / "one/image/open_toy/chunks/00002.json").unlink()
    with pytest.raises(UnfinishedError, match="feature open_toy/cls is not finished: 1 of 3 chunks is missing"):
        merge_caches([made / "c", tmp_path / "one"], tmp_path / "other", prefix_keys=True)
    with pytest.raises(SourceError, match="were merged: extract from each of them"):
        next(iter(reopen(Cache(tmp_path / "both").info.source).samples()))
