"""Training with the classes of a classifier as pairs, on OpenMoji's animals and food encoded by EfficientNet-Lite0."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.modalities import Sample
from embedcache.quickstart.openmoji import OpenmojiSource
from embedcache.reports.retrieval import retrieval_table
from embedcache.runs import PROTOTYPES, WEIGHTS
from embedcache.search.index import build_index
from embedcache.search.search import search
from embedcache.search.settings import IndexSettings
from embedcache.sources.open import SourceSettings
from embedcache.store.cache import Cache
from embedcache.train.train import train
from embedcache.vectors.importing import import_vectors
from embedcache.vectors.opening import open_vectors
from tests.toy import IMAGE, TEXT

ENCODER, TEXT_ENCODER = "lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"

pytestmark = pytest.mark.slow


class AnimalsAndFood(OpenmojiSource):
    def samples(self) -> Iterator[Sample]:
        groups = ("Animals & Nature", "Food & Drink")
        return islice((sample for sample in super().samples() if sample.columns["label"] in groups), 120)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emoji") / "cache"
    extract(AnimalsAndFood("en", SourceSettings()), path, image_encoder=ENCODER, text_encoder=TEXT_ENCODER)
    return path


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prototypes") / "cache"
    extract(f"prototypes:{ENCODER}", path, text_encoder=TEXT_ENCODER)
    return path


def evaluated(cache: Path, run: Path, **options: Any) -> RetrievalReport:
    train(cache, run, projector="linear", epochs=0, split="key", test_fraction=0.6, **options)
    return evaluate_retrieval(cache, run)


def test_names_of_a_classifier_align_emoji_without_pairs(emoji: Path, prototypes: Path, tmp_path: Path) -> None:
    only = {"prototypes": prototypes, "prototype_weight": 1e6}
    report = evaluated(emoji, tmp_path / "run", **only)
    control = evaluated(emoji, tmp_path / "control", shuffle_prototypes=True, **only)
    chance = report.chance["t2i"]["r@10"]
    assert report.recalls["t2i"]["r@10"].value > chance.high > control.recalls["t2i"]["r@10"].value
    assert (tmp_path / "run" / PROTOTYPES).read_text().startswith("tench, Tinca tinca\n")


def test_samples_that_name_a_class_are_counted_and_left_out(emoji: Path, prototypes: Path, tmp_path: Path) -> None:
    report = evaluated(emoji, tmp_path / "run", prototypes=prototypes)
    ((num_named, num_samples),) = report.named_samples
    assert 0 < num_named < num_samples == report.num_items["image"][0]
    assert report.unnamed["i2t"]["r@10"].value != report.recalls["i2t"]["r@10"].value
    _, rows = retrieval_table({"run": report})
    assert [row[0] for row in rows] == ["run", "run, no class named", "chance"]
    assert f"{num_named} of {num_samples} samples name a class" in report.line()
    assert not evaluated(emoji, tmp_path / "pairs").named_samples


def test_photos_without_captions(emoji: Path, prototypes: Path, tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    extract(AnimalsAndFood("en", SourceSettings()), photos, image_encoder=ENCODER)
    options: dict[str, Any] = {"projector": "linear", "prototypes": prototypes}
    with pytest.raises(SettingError, match="--epochs 0"):
        train(photos, run, **options)
    assert not train(photos, run, epochs=0, **options).reused
    assert train(photos, run, epochs=0, **options).reused
    report = evaluate_retrieval(emoji, run, part="all")
    assert report.recalls["t2i"]["r@10"].value > report.chance["t2i"]["r@10"].high
    assert report.overlap is None
    assert report.named_samples

    build_index(photos, tmp_path / "index", IndexSettings(run=run))
    assert len(search(tmp_path / "index", "a fish", k=3)[0]) == 3

    names = {
        "Animals & Nature": ["a wild animal", "a goldfish"],
        "Food & Drink": ["something to eat"],
        "goldfish": ["goldfish"],
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    extract(f"prompts:{tmp_path / 'names.json'}", tmp_path / "names", text_encoder=TEXT_ENCODER)
    classified = evaluate_zero_shot(emoji, run, tmp_path / "names")
    assert classified.num_named == 1
    assert classified.unnamed["acc1"] == classified.accuracies["acc1"]


def test_prototypes_change_the_directions_and_no_mean(emoji: Path, prototypes: Path, tmp_path: Path) -> None:
    evaluated(emoji, tmp_path / "run", prototypes=prototypes)
    evaluated(emoji, tmp_path / "pairs")
    weights, plain = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "pairs"))
    for modality in ("image", "text"):
        assert torch.equal(weights[f"{modality}.mean"], plain[f"{modality}.mean"])
    assert not any(
        torch.equal(weights[name], plain[name]) for name in weights if "projector" in name and "bias" not in name
    )


def test_table_of_own_prototypes(emoji: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 1280)).astype(np.float32)
    (tmp_path / "names.csv").write_text("caption\n" + "\n".join(["cat", "dog", "apple", "bread", "tree"]))
    for name, width in (("own", 1280), ("narrow", 7)):
        np.save(tmp_path / f"{name}.npy", rows[:, :width])
        vectors = open_vectors("npy", files={"image": tmp_path / f"{name}.npy"}, table=tmp_path / "names.csv")
        import_vectors(vectors, tmp_path / name)
        extract(tmp_path / name, tmp_path / name, text_encoder=TEXT_ENCODER)
    evaluated(emoji, tmp_path / "run", prototypes=tmp_path / "own")
    with pytest.raises(DataError, match="width"):
        evaluated(emoji, tmp_path / "other", prototypes=tmp_path / "narrow")


def test_prototypes_of_another_encoder_or_projector_are_refused(
    cache_path: Path, emoji: Path, prototypes: Path, tmp_path: Path
) -> None:
    features = {"feature": {"image": "open_toy/cls", "text": "open_toy/mean"}}
    with pytest.raises(FingerprintError, match="family"):
        evaluated(cache_path, tmp_path / "toy", prototypes=prototypes, **features)
    extract("prototypes:lite:efficientnet-lite1", tmp_path / "lite1", text_encoder=TEXT_ENCODER)
    with pytest.raises(FingerprintError, match="efficientnet-lite1"):
        evaluated(emoji, tmp_path / "lite1-run", prototypes=tmp_path / "lite1")
    with pytest.raises(DataError, match="trained on"):
        train(emoji, tmp_path / "itself", prototypes=emoji)
    with pytest.raises(SettingError, match="closed form"):
        train(emoji, tmp_path / "glu", projector="linear", initialization="random", prototypes=prototypes)


def test_encoder_without_classifier_makes_no_prototypes(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="classifier"):
        extract(f"prototypes:{IMAGE}", tmp_path / "cache", text_encoder=TEXT)


def test_images_of_prototypes_are_not_encoded(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="image_encoder"):
        extract(f"prototypes:{ENCODER}", tmp_path / "cache", image_encoder=ENCODER, text_encoder=TEXT_ENCODER)


def test_extraction_resumes(prototypes: Path) -> None:
    reports = extract(f"prototypes:{ENCODER}", prototypes, text_encoder=TEXT_ENCODER)
    assert [(report.computed, report.reused) for report in reports] == [(0, 1000), (0, 1000)]
    assert Cache(prototypes).feature("image").fingerprint["preprocessing"]["classifier"]["feature"] == "patch_mean"
