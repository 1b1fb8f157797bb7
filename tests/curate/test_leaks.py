import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.arrays import Floats, normalize
from embedcache.curate.leaks import find_leaks, write_clean_selection
from embedcache.curate.settings import LeakSettings
from embedcache.dataset.selections import read_selection
from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.open import EncoderSpec
from embedcache.errors import (
    DataError,
    EmbedcacheError,
    SettingError,
    SourceError,
    UnfinishedError,
    UnknownNameError,
)
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.reports.leaks import (
    closest_pairs,
)
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from tests import toy
from tests.cli.run import embedcache, succeed
from tests.images import write_images
from tests.recorded import RecordedProgress
from tests.toy import IMAGE, TEXT

PLANTED = {"00000": "00011", "00007": "00000"}  # the first item of either cache is copied
FEATURES = {"image": "open_toy/cls", "text": "open_toy/mean"}
BOTH = {"image": "open_toy/cls", "text": "open_toy/mean"}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache to train on, of 80 images, and one of 30 to test on; two of these are copies of the former."""
    folder = tmp_path_factory.mktemp("leaks")
    train = write_images(folder / "train-source", 80, seed=1)
    test = write_images(folder / "test-source", 30, seed=2)
    for name, original in PLANTED.items():
        shutil.copy(train / f"{original}.png", test / f"{name}.png")
    (test / "00005.png").write_bytes(b"not an image")
    settings = ExtractSettings(features=("cls", "patches", "mean"), chunk_size=32)
    for name in ("train", "test"):
        extract(
            open_source(folder / f"{name}-source"),
            folder / name,
            image_encoder=[IMAGE],
            text_encoder=[TEXT],
            settings=settings,
        )
    return folder / "train", folder / "test"


def unit(path: Path, modality: str) -> Floats:
    return normalize(np.nan_to_num(Cache(path).feature(modality, FEATURES[modality]).load()))


def test_leaks_equal_brute_force(caches: tuple[Path, Path]) -> None:
    train, test = caches
    progress = RecordedProgress()
    found = find_leaks(train, test, feature=BOTH, cosine={"image": 0.99, "text": 0.999}, progress=progress)
    assert progress.counts == {what: count for what, count, _ in progress.started}
    leaked, dirty = set(), set()
    for leak in found.leaks:
        cosines = unit(test, leak.modality) @ unit(train, leak.modality).T
        near = cosines >= leak.cosine
        cosines = cosines[leak.test.rows]
        np.testing.assert_allclose(leak.cosines, cosines.max(axis=1), atol=1e-5)
        np.testing.assert_allclose(leak.train_cosines, cosines.max(axis=0), atol=1e-5)
        np.testing.assert_allclose(cosines[np.arange(len(cosines)), leak.train_rows], leak.cosines, atol=1e-5)
        assert set(leak.leaked_samples.tolist()) == set(np.flatnonzero(near.any(axis=1)).tolist())
        assert set(leak.train_samples.tolist()) == set(np.flatnonzero(near.any(axis=0)).tolist())
        leaked |= set(leak.leaked_samples.tolist())
        dirty |= set(leak.train_samples.tolist())
    assert set(found.leaked_samples.tolist()) == leaked
    assert found.clean_selection().rows.tolist() == sorted(set(range(80)) - dirty)


def test_clusters_are_recorded(caches: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = caches
    options = "--feature image=open_toy/cls --feature text=open_toy/mean --no-all-pairs --json"
    options += " --cosine image=0.99 --cosine text=0.95"
    by = json.loads(succeed("curate", "leaks", train, test, "clean.parquet", *options.split(), cwd=tmp_path))["by"]
    exact = find_leaks(train, test, feature=BOTH, cosine={"image": 0.99, "text": 0.95})
    for modality, leak in zip(by, exact.leaks, strict=True):
        assert by[modality]["num_clusters"] > 1
        assert by[modality]["complete"] == 1
        assert by[modality]["recall"]["value"] == 1
        assert by[modality]["num_samples_leaked"] == len(leak.leaked_samples)
        assert by[modality]["num_train_samples"] == len(leak.train_samples)
        assert leak.near is not None
        assert (leak.near.num_clusters, leak.near.recall) == (1, None)
    recall = by["image"]["recall"]
    assert recall["num_items"] == 27  # of 29 images, without two copies
    made = json.loads(pq.read_table(tmp_path / "clean.parquet").schema.metadata[b"embedcache"])
    assert made["by"] == by


def test_copies_come_first(caches: tuple[Path, Path]) -> None:
    found = find_leaks(*caches, feature=BOTH)
    images = found.leaks[0]
    keys = Cache(caches[1]).samples["key"].to_pylist()
    assert {keys[row] for row in images.copied_samples} == set(PLANTED)
    pairs = closest_pairs(found, images, 3)
    assert {pair.test: pair.train for pair in pairs if pair.similarity == "equal"} == PLANTED
    assert [pair.similarity for pair in pairs][:2] == ["equal", "equal"]
    assert 0.9 < float(pairs[2].similarity) <= 1
    texts = closest_pairs(found, found.leaks[1], 1)
    assert texts[0].test == texts[0].train


def test_clean_selection(caches: tuple[Path, Path], tmp_path: Path) -> None:
    found = find_leaks(*caches, LeakSettings(cosines={"image": 1.0, "text": 1.0}), feature="open_toy/cls")
    num_samples = write_clean_selection(tmp_path / "clean.parquet", found)
    table = pq.read_table(tmp_path / "clean.parquet")
    assert len(read_selection(tmp_path / "clean.parquet", [Cache(caches[0])])) == len(table) == num_samples
    keys = set(table["key"].to_pylist())
    assert not keys & set(PLANTED.values())
    assert table["closest_image"].null_count == 0
    made = json.loads(table.schema.metadata[b"embedcache"])
    assert made["by"]["image"]["num_samples_copied"] == 2
    with pytest.raises(DataError, match="every sample"):
        write_clean_selection(tmp_path / "none.parquet", find_leaks(*caches, feature=BOTH, cosine="image=0.01"))


def test_report_is_shown_before_a_selection_of_nothing_is_refused(caches: tuple[Path, Path], tmp_path: Path) -> None:
    options = ("--feature", "image=open_toy/cls", "--feature", "text=open_toy/mean", "--cosine", "image=0.01")
    done = embedcache("curate", "leaks", *caches, "none.parquet", *options, cwd=tmp_path)
    assert done.code == 1
    assert "samples of" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: every sample of ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("modalities", [("image", "text"), ("text",)])
def test_training_samples_without_vectors_are_kept(
    caches: tuple[Path, Path], tmp_path: Path, modalities: tuple[str, ...]
) -> None:
    source = write_images(tmp_path / "source", 6, seed=3)
    for file in source.glob("*.txt"):
        file.write_text(f"a caption of {file.stem} alone\n")
    for name in ("00002", "00003"):
        (source / f"{name}.png").write_bytes(b"not an image")
    for name in ("00003", "00004"):
        (source / f"{name}.txt").unlink()
    encoders = {f"{modality}_encoder": [IMAGE if modality == "image" else TEXT] for modality in modalities}
    extract(open_source(source), tmp_path / "train", **encoders)
    options = [f"--feature {modality}={FEATURES[modality]} --cosine {modality}=1" for modality in modalities]
    succeed("curate", "leaks", "train", caches[1], "clean.parquet", *" ".join(options).split(), cwd=tmp_path)
    table = pq.read_table(tmp_path / "clean.parquet")
    assert table["key"].to_pylist() == [f"{number:05d}" for number in range(6)]
    for modality, without in (("image", [2, 3]), ("text", [3, 4])):
        if modality in modalities:
            assert np.flatnonzero(table[f"closest_{modality}"].is_null()).tolist() == without


def test_limit_is_inclusive_and_the_smallest_cosine_is_one(caches: tuple[Path, Path]) -> None:
    found = find_leaks(*caches, feature=BOTH)
    images = found.leaks[0]
    near = replace(
        images,
        cosines=np.full_like(images.cosines, images.cosine),
        is_copy=np.zeros_like(images.is_copy),
        train_cosines=np.full_like(images.train_cosines, images.cosine),
        train_is_copy=np.zeros_like(images.train_is_copy),
    )
    assert near.is_leaked.all()
    assert near.train_samples.tolist() == list(range(80))
    count = len(images.cosines)
    for largest, expected in ((1.0001, 1.0), (0.5, 0.5), (-np.inf, None)):
        cosines = np.full(count, -np.inf, np.float32)
        cosines[1] = largest
        assert replace(images, cosines=cosines, is_copy=np.arange(count) == 2).highest == expected
    opposite = replace(found, leaks=[replace(near, train_cosines=-np.ones_like(images.train_cosines))])
    assert set(opposite.clean_selection().columns["closest_image"].to_pylist()) == {-1}


def test_token_features_are_averaged(caches: tuple[Path, Path]) -> None:
    found = find_leaks(*caches, feature={"image": "open_toy/patches"})
    assert found.leaks[0].feature == "open_toy/patches"
    assert len(found.leaks[0].copied_samples) == 2


def test_other_encoder_compares_hashes(caches: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = caches
    extract(open_source(test.parent / "test-source"), tmp_path / "other", image_encoder=["tests.toy:open_other"])
    found = find_leaks(train, tmp_path / "other")
    images = found.leaks[0]
    assert images.copied_samples.tolist() == [0, 7]
    assert images.train_rows.tolist() == [11, *[-1] * 5, 0, *[-1] * 22]  # of 29 images: the sixth cannot be read
    assert images.train_samples.tolist() == [0, 11]
    assert images.feature is None
    assert images.reason is not None
    assert "no encoder made image features of both: open_toy/cls, open_toy/patches in" in images.reason
    shutil.rmtree(tmp_path / "other" / "image" / "open_other" / "chunks")
    with pytest.raises(UnfinishedError, match="1 of 1"):
        find_leaks(train, tmp_path / "other")


def open_toy(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the toy encoder as one of the same name with other weights."""
    encoder = toy.open_toy(spec, modality=modality, settings=settings)
    encoder.fingerprint = replace(encoder.fingerprint, model="other", revision="1", weights="0")
    return encoder


def test_other_weights_compare_hashes(caches: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = caches
    source = open_source(test.parent / "test-source")
    extract(source, tmp_path / "other", image_encoder=["tests.curate.test_leaks:open_toy"])
    found = find_leaks(train, tmp_path / "other", feature="open_toy/cls")
    assert found.leaks[0].reason is not None
    assert "different encoders (model: stored 'image', requested 'other'; revision: stored" in found.leaks[0].reason
    assert len(found.leaked_samples) == 2


def test_mistakes_are_refused_before_anything_is_compared(
    caches: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.curate.leaks.find_near", None)
    monkeypatch.setattr("embedcache.curate.leaks.MODALITIES", ("text", "image"))  # of which the second has several
    with pytest.raises(SettingError, match="feature: expected one"):
        find_leaks(*caches)
    done = embedcache("curate", "leaks", caches[0], caches[1], "clean.txt", cwd=tmp_path)
    assert done.stderr == "error: selection clean.txt: expected a path that ends in .parquet, got .txt\n"


def test_incomparable_caches_raise(caches: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a red bar\na blue bar\n")
    extract(open_source(tmp_path / "texts.txt"), tmp_path / "texts", text_encoder=[TEXT])
    write_images(tmp_path / "source", 3)
    for file in (tmp_path / "source").glob("*.txt"):
        file.unlink()
    extract(open_source(tmp_path / "source"), tmp_path / "images", image_encoder=[IMAGE])
    assert find_leaks(caches[0], tmp_path / "texts").leaks[0].modality == "text"
    for file in (tmp_path / "source").glob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(SourceError, match="all 3 images failed"):
        extract(open_source(tmp_path / "source"), tmp_path / "broken", image_encoder=[IMAGE])
    calls: list[tuple[tuple[Path, Path], dict[str, Any], type[EmbedcacheError], str]] = [
        ((caches[0], caches[0]), {}, SettingError, "same samples"),
        (caches, {}, SettingError, "feature"),
        (caches, {"feature": {"image": "open_toy/cl"}}, UnknownNameError, "open_toy/cl"),
        (caches, {"feature": {"video": "open_toy/cls"}}, SettingError, "video"),
        (caches, {"feature": {"image": ["open_toy/cls", "open_toy/patches"]}}, SettingError, "patches"),
        ((tmp_path / "texts", tmp_path / "images"), {}, DataError, "one modality"),
        ((tmp_path / "images", tmp_path / "broken"), {}, DataError, "broken"),
    ]
    for pair, options, error, word in calls:
        with pytest.raises(error, match=word):
            find_leaks(*pair, **options)


def test_removed_samples_are_in_no_clean_selection(without: Cache, two_caches: list[Path], tmp_path: Path) -> None:
    report = find_leaks(without.path, two_caches[1], feature=BOTH, cosine={"image": 0.95, "text": 0.95})
    num_kept = write_clean_selection(tmp_path / "clean.parquet", report)
    kept = pq.read_table(tmp_path / "clean.parquet")["row"].to_pylist()
    assert (report.num_train_samples, report.num_test_samples) == (37, 80)
    assert num_kept == 37 - len(np.unique(np.concatenate([leak.train_samples for leak in report.leaks])))
    assert not set(kept) & set(without.removed.tolist())
