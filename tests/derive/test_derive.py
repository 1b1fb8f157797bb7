"""Derived features: values, resume, extension, refusals, verification and repair."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.derive.derive import derive
from embedcache.derive.rules import Block, Derivation, open_rule
from embedcache.errors import DataError, FingerprintError, SettingError, UnfinishedError, UnknownNameError
from embedcache.extract.extract import retry_failed
from embedcache.extract.repair import measure_drift, repair, verify_cache
from embedcache.extract.settings import ExtractSettings, VerifySettings
from embedcache.maintain.prune import prune_cache
from embedcache.registry import trust_code, trust_files
from embedcache.reports.summary import summarize
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.derive.cases import (
    CLS,
    HALVE,
    MEAN,
    PATCHES,
    TOKENS,
    derive_pca,
    halve,
    halved,
    labels,
    run,
)
from tests.extract.cases import tree
from tests.images import write_images
from tests.toy import IMAGE, TEXT

NUM_IMAGES = 20
NOT_AN_IMAGE = "not an image (JPEG, PNG, WEBP, GIF, BMP, TIFF)"


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images and captions in chunks of 8, of which image 3 is broken. Not to be changed."""
    folder = tmp_path_factory.mktemp("derive")
    source = write_images(folder / "source", NUM_IMAGES)
    shutil.copytree(source, folder / "good")
    (source / "00003.png").write_bytes(b"junk")
    run(source, folder / "c")
    return folder / "c"


@pytest.fixture
def cache(extracted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(extracted, tmp_path / "c"))


def values(cache: Path, modality: str, name: str) -> np.ndarray:
    return Cache(cache).feature(modality, name).load()


def test_values_of_both_modalities(cache: Path) -> None:
    report = derive(cache, halved(CLS, TOKENS))
    assert report.line() == f"halved (half, total): derived 20 images, reused 0, failed 1: 1 {NOT_AN_IMAGE}"
    cls = values(cache, "image", "open_toy/cls")
    np.testing.assert_allclose(values(cache, "image", "halved/half"), cls / 2, atol=1e-3)
    tokens = [None if item is None else item for _, chunk in Cache(cache).feature(*TOKENS).chunks() for item in chunk]
    expected = cls.sum(axis=1, dtype=np.float64) + [item.sum(dtype=np.float64) for item in tokens]
    np.testing.assert_allclose(values(cache, "image", "halved/total")[:, 0], expected, rtol=1e-5)
    assert Cache(cache).feature("image", "halved/half").failures == Cache(cache).feature(*CLS).failures


def test_derived_feature_is_the_default_only_without_another(cache: Path) -> None:
    prune_cache(cache, feature=["open_toy/tokens"])
    derive(cache, halved(MEAN))
    assert Cache(cache).feature("text").name == "open_toy/mean"

    prune_cache(cache, feature=["halved/total", "open_toy/mean"])
    assert Cache(cache).feature("text").name == "halved/half"


def test_integer_output_and_reason_of_the_rule(cache: Path) -> None:
    cls = values(cache, "image", "open_toy/cls").astype(np.float32)
    least = float(np.nanmedian(cls.max(axis=1)))
    report = derive(cache, labels(least))
    is_bright = np.nan_to_num(cls.max(axis=1)) >= least
    assert 0 < is_bright.sum() < NUM_IMAGES - 1
    feature = Cache(cache).feature("image", "labels")
    assert feature.dtype == "int16"
    np.testing.assert_array_equal(feature.load()[:, 0], np.where(is_bright, np.nan_to_num(cls).argmax(axis=1), -1))
    assert report.failures == {"too dark (from labels)": (~is_bright).sum() - 1, NOT_AN_IMAGE: 1}
    assert derive(cache, labels(least)).computed == 0


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (halved(factor=0.25), "factor"),
        (halved(PATCHES), "inputs.0.feature"),
        (halved(CLS, MEAN), "inputs.1.modality"),
        (replace(halved(), rule=replace(HALVE, weights="other")), "weights"),
        (replace(halved(), rule=replace(HALVE, name="other")), "model"),
        (replace(halved(), rule=replace(HALVE, apply=lambda inputs, parameters: halve(inputs, parameters))), "code"),
    ],
)
def test_other_derivation_of_the_same_name_raises(cache: Path, other: Derivation, words: str) -> None:
    derive(cache, halved())
    before = tree(cache)
    with pytest.raises(FingerprintError, match=words):
        derive(cache, other)
    assert tree(cache) == before


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"name": "other"}, SettingError, "tests.toy:open_toy"),
        ({"name": "open_toy"}, SettingError, "input"),
        ({"inputs": (("image", "open_toy/clss"),)}, UnknownNameError, "clss"),
        ({"dtype": "int16"}, DataError, "whole"),
        ({"rule": "paca"}, UnknownNameError, "pca"),
        ({"rule": "tests.derive.cases:halve"}, SettingError, "function"),
        ({"rule": replace(HALVE, outputs=lambda *_: {"more": (1,)})}, SettingError, "more"),
        ({"rule": replace(HALVE, outputs=lambda *_: {"half": (47,)})}, DataError, "shape"),
        ({"rule": replace(HALVE, apply=lambda inputs, _: inputs[0].rows())}, SettingError, "ndarray"),
        ({"rule": replace(HALVE, apply=lambda *_: {"half": None, "total": None})}, DataError, "NoneType"),
        ({"rule": replace(HALVE, apply=lambda *_: {"half": [], "total": []})}, DataError, "got 0"),
        ({"name": "a/b"}, SettingError, "letters"),
        ({"dtype": "float"}, SettingError, "dtype"),
        ({"inputs": ()}, SettingError, "none"),
    ],
)
def test_refusals(cache: Path, changes: dict[str, Any], error: type[Exception], word: str) -> None:
    shutil.copytree(cache / "image/open_toy", cache / "image/other")
    with pytest.raises(error, match=word):
        derive(cache, replace(halved(), **changes))
    assert not (cache / "image/halved").exists()


def test_several_items_of_the_other_modality_raise(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 8)
    (source / "00005.txt").write_text("one\ntwo\n")
    run(source, tmp_path / "c")
    with pytest.raises(DataError, match="expected one text per sample, got 2 in the sample '00005'"):
        derive(tmp_path / "c", halved(CLS, MEAN))
    derive(tmp_path / "c", halved(MEAN, CLS))  # every caption has one image
    totals = values(tmp_path / "c", "text", "halved/total")
    images, texts = values(tmp_path / "c", *CLS).astype(np.float64), values(tmp_path / "c", *MEAN).astype(np.float64)
    samples = Cache(tmp_path / "c").items("text")["sample"].to_numpy()
    np.testing.assert_allclose(totals[:, 0], images[samples].sum(axis=1) + texts.sum(axis=1), rtol=1e-5)


def test_unfinished_input_raises(cache: Path) -> None:
    (cache / "image/open_toy/chunks/00001.json").unlink()
    with pytest.raises(UnfinishedError, match="open_toy/cls is not finished: chunk 1.*embedcache extract again"):
        derive(cache, halved())
    assert not (cache / "image/halved").exists()


@pytest.mark.slow
def test_extended_cache_gets_only_new_rows(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", NUM_IMAGES)
    late = [path for number in (18, 19) for path in source.glob(f"000{number}.*")]
    for path in late:
        path.rename(tmp_path / path.name)
    run(source, tmp_path / "c")
    derive(tmp_path / "c", halved(CLS, MEAN))
    derive_pca(tmp_path / "c")
    before = tree(tmp_path / "c")
    for path in late:
        (tmp_path / path.name).rename(path)
    run(source, tmp_path / "c", extend=True)
    with pytest.raises(UnfinishedError, match="halved/half is not finished.*run the same embedcache derive again"):
        Cache(tmp_path / "c").feature("image", "halved/half").require_complete()
    assert derive(tmp_path / "c", halved(CLS, MEAN)).computed == 4  # the last chunk
    derive_pca(tmp_path / "c")
    after = tree(tmp_path / "c")
    changed = {name for name in before if "halved" in name and after[name] != before[name]}
    assert changed == {f"image/halved/{name}" for name in (
        "chunks/00002.json", "half/c/2/0", "half/zarr.json", "total/c/2/0", "total/zarr.json",
    )}  # fmt: skip
    assert after["image/pca/fit.safetensors"] == before["image/pca/fit.safetensors"]
    run(source, tmp_path / "whole")
    derive(tmp_path / "whole", halved(CLS, MEAN))
    for name in ("halved/half", "halved/total"):
        np.testing.assert_array_equal(values(tmp_path / "c", "image", name), values(tmp_path / "whole", "image", name))
    assert not verify(Cache(tmp_path / "c"))


def recover(cache: Path, extracted: Path, source: Path) -> None:
    """Replace the broken image in a copy of the source, and retry it."""
    shutil.copytree(extracted.parent / "source", source)
    info = (cache / "cache.json").read_text().replace(str(extracted.parent / "source"), str(source))
    (cache / "cache.json").write_text(info)
    shutil.copy(extracted.parent / "good/00003.png", source / "00003.png")
    settings = ExtractSettings(features=("cls", "patches", "mean", "tokens"))
    retry_failed(open_source(source), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)


@pytest.mark.parametrize("least", [10.0, 0.0])
def test_item_whose_input_was_repaired_gets_the_reason_of_the_rule(
    cache: Path, extracted: Path, tmp_path: Path, least: float
) -> None:
    """Also if no item of the chunk has a value, then or now."""
    derive(cache, labels(least))
    recover(cache, extracted, tmp_path / "source")
    assert derive(cache, labels(least)).computed == 8
    failures = Cache(cache).feature("image", "labels").failures
    assert failures.get(3) == (None if least == 0 else "too dark (from labels)")
    before = tree(cache)
    assert derive(cache, labels(least)).computed == 0
    assert tree(cache) == before


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_verify_repairs_inputs_before_derived_features(cache: Path) -> None:
    derive_pca(cache)
    derive(cache, Derivation(name="again", inputs=[("image", "pca/pca")], rule="mean"))
    whole = tree(cache)
    damage(cache / "image/again/mean/c/2/0")
    damage(cache / "image/pca/pca/c/2/0/0")
    damage(cache / "image/open_toy/patches/c/2/0/0")
    report = verify_cache(cache, VerifySettings(repair=True))
    assert [finding.location for finding in report.detected] == ["again/mean", "open_toy/patches", "pca/pca"]
    assert [line.partition(",")[0] for line in report.repaired] == [
        "open_toy (patches): encoded 4 images",
        "pca (pca): derived 4 images",
        "again (mean): derived 4 images",
    ]
    assert report.is_sound
    assert tree(cache) == whole


@pytest.mark.slow
@pytest.mark.usefixtures("as_stranger")
def test_rule_of_the_users_own_needs_trust(cache: Path) -> None:
    derive(cache, halved())
    whole = tree(cache)
    damage(cache / "image/halved/half/c/1/0")
    (finding,) = verify(Cache(cache))
    with pytest.raises(SettingError, match="'tests.derive.cases:HALVE', which is custom code; .* use --trust"):
        repair(Cache(cache), [finding])
    trust_code(IMAGE)
    (note,) = [drift for drift in measure_drift(Cache(cache), 0.1) if drift.feature == "halved/half"]
    assert "halved/half: not compared: halved: the cache names the rule" in note.line()
    assert not note.is_bad
    with trust_files():
        repair(Cache(cache), [finding])
    assert tree(cache) == whole


def test_changed_fit_is_damage_that_cannot_be_repaired(cache: Path) -> None:
    derive_pca(cache)
    damage(cache / "image/pca/fit.safetensors")
    (finding,) = verify(Cache(cache))
    assert finding.line().startswith("pca/fit.safetensors: ")
    assert not finding.can_repair


@pytest.mark.slow
def test_drift_of_derived_features(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derive_pca(cache)
    derive(cache, labels())

    def drifts() -> dict[str, bool]:
        return {drift.feature: drift.is_bad for drift in measure_drift(Cache(cache), 0.5)}

    assert not any(drifts().values())
    assert {"pca/pca", "labels/label"} <= set(drifts())

    def flipped(inputs: list[Block], _: object) -> dict[str, Block]:
        return {"pca": inputs[0].with_rows(-inputs[0].rows()[:, :2])}

    rule = replace(open_rule("pca"), apply=flipped)
    monkeypatch.setattr("embedcache.derive.rules.PCA", rule)
    assert [name for name, is_bad in drifts().items() if is_bad] == ["pca/pca"]


def test_inspect_names_the_inputs(cache: Path) -> None:
    derive(cache, halved(CLS, MEAN))
    summary = summarize(cache)
    line = "derived:tests.derive.cases:HALVE, from image open_toy/cls, text open_toy/mean"
    assert f"halved/half: {line}" in summary.notes
    (entry,) = [entry for entry in summary.record()["features"] if entry["feature"] == "halved/half"]
    assert entry["inputs"] == ["image/open_toy/cls", "text/open_toy/mean"]
