"""Evaluations of recordings and of point clouds, which each have a label and a caption."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.errors import DataError, SettingError, UnknownNameError
from embedcache.evaluate.encoder_pairs import evaluate_pairs
from embedcache.evaluate.probe import evaluate_probe
from embedcache.evaluate.zero_shot import evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.inference import load
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import train_settings
from embedcache.train.train import train
from tests.cli.run import succeed
from tests.media_files import cloud, npz, tone, wav
from tests.media_toy import MEDIA
from tests.toy import TEXT

PITCHES = {"low": 200, "middle": 700, "high": 1900, "shrill": 4000}
STRETCHES = {"low": (8, 1, 1), "middle": (1, 8, 1), "high": (1, 1, 8), "shrill": (1, 1, 1)}
FEATURES = {"audio": "open_media/mean", "points": "open_media/extent"}


class Things:
    """A source of 120 recordings and point clouds, made from their number and label when they are read."""

    def __init__(self, *_: object) -> None:
        """Take no notice of a path and settings."""

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.evaluate.test_modalities:Things", "path": "things", "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for number in range(120):
            label = list(PITCHES)[number * 7 % 11 % 4]
            yield Sample(
                key=f"{number:03d}",
                texts=(TextItem(text=f"a {label} thing"),),
                columns={"label": label},
                files={
                    "audio": (FileItem(path=f"{number} {label}.wav"),),
                    "points": (FileItem(path=f"{number} {label}.npz"),),
                },
            )

    def read(self, item: FileItem) -> bytes:
        number, label = item.path.rpartition(".")[0].split()
        rng = np.random.default_rng(int(number))
        if item.path.endswith(".wav"):
            return wav(0.2 * rng.uniform(0.8, 1) * tone(0.1, PITCHES[label] * rng.uniform(0.9, 1.1)))
        points = cloud(30, seed=int(number))
        return npz({**points, "xyz": points["xyz"] * np.array(STRETCHES[label], np.float32)})


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 120 recordings and point clouds with captions. Not to be changed."""
    path = tmp_path_factory.mktemp("things") / "cache"
    settings = ExtractSettings(features=("mean", "frames", "extent"))
    extract(Things(), path, text_encoder=[TEXT], encoder={"audio": [MEDIA], "points": [MEDIA]}, settings=settings)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one prompt per label. Not to be changed."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.json").write_text(json.dumps({label: [f"a {label} thing"] for label in PITCHES}))
    extract(open_source(f"prompts:{folder / 'prompts.json'}"), folder / "cache", text_encoder=[TEXT])
    return folder / "cache"


@pytest.fixture(scope="module")
def runs(things: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A run of each modality with texts. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    settings = train_settings({"shared_width": 8, "epochs": 10, "batch_size": 32, "split": "key", "lr": 0.01})
    for modality, feature in FEATURES.items():
        train(things, folder / modality, feature={modality: feature, "text": "open_toy/mean"}, settings=settings)
    return {modality: folder / modality for modality in FEATURES}


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "noun"), [("audio", "recordings"), ("points", "point clouds")])
def test_items_are_classified_by_prompts(
    things: Path, prompts: Path, runs: Mapping[str, Path], tmp_path: Path, modality: str, noun: str
) -> None:
    words = ["evaluate", "zero-shot", things, runs[modality], "--prompts", prompts]
    stdout = succeed(*words, cwd=tmp_path)
    assert f"30 {noun}, 4 classes of 1 prompt" in " ".join(stdout.split())
    report = evaluate_zero_shot(things, runs[modality], prompts, part="all")
    assert report.warning is not None
    assert report.warning.startswith("seen in training: ")
    assert report.accuracies["acc1"].value > 2 * report.chance["acc1"].value
    model, items = load(runs[modality]), [Things().read(s.files[modality][0]) for s in Things().samples()]  # type: ignore[index]
    names = [name for name, _ in sorted(PITCHES.items())]
    scores = model.classify(items, names, template="a {} thing")
    right = np.array(scores.best) == Cache(things).column("label").to_numpy()
    assert right.mean() == pytest.approx(report.accuracies["acc1"].value)
    np.testing.assert_allclose(
        model.similarity(items[0], "a low thing"), model.encode(items[0], modality) @ model.encode_text("a low thing").T
    )


def test_features_are_probed(things: Path, tmp_path: Path) -> None:
    options = ["--modality", "audio", "--feature", FEATURES["audio"], "--classifier", "knn", "--split", "key"]
    shown = succeed("evaluate", "probe", things, *options, cwd=tmp_path)
    assert "test recordings; parts by split (key)" in " ".join(shown.split())
    report = evaluate_probe(things, modality="points", feature=FEATURES["points"], classifier="knn", split="key")
    assert report.scores[0].accuracy.value > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "first", "second"),
    [
        (["text=open_toy/mean", "audio=open_media/mean", "audio=open_media/frames"], "audio", "text"),
        (["points=open_media/extent", "audio=open_media/mean"], "audio", "points"),
    ],
)
def test_pairs_are_named_by_modality(
    things: Path, tmp_path: Path, features: list[str], first: str, second: str
) -> None:
    named = [word for name in features for word in ("--feature", name)]
    succeed("evaluate", "pairs", things, *named, "--split", "key", "--output", "p.json", cwd=tmp_path)
    directions = [f"{first[0]}2{second[0]}", f"{second[0]}2{first[0]}"]
    report = json.loads((tmp_path / "p.json").read_text())["pairs"]
    assert list(report["chance"]) == directions
    found = {f"{modality}={pair[modality]}" for pair in report["pairs"] for modality in (first, second)}
    assert found == set(features)
    assert len(report["pairs"]) == len(features) - 1
    for pair in report["pairs"]:
        assert all(pair[name]["value"] > report["chance"][name]["value"] for name in directions)


@pytest.mark.slow
def test_pairs_of_the_only_two_modalities_need_no_names(things: Path, tmp_path: Path) -> None:
    extract(Things(), tmp_path / "c", text_encoder=[TEXT], encoder={"audio": [MEDIA]})
    (pair,) = evaluate_pairs(tmp_path / "c", split="key").pairs
    assert pair.features == {"audio": "open_media/mean", "text": "open_toy/mean"}
    (named,) = evaluate_pairs(things, feature={"text": None, "audio": "open_media/mean"}, split="key").pairs
    assert named == pair
    with pytest.raises(UnknownNameError, match="no image features"):
        evaluate_pairs(things)
    for wrong in ({"image": None, "audio": None, "text": None}, {"audio": None, "sound": None}):
        with pytest.raises(SettingError, match="two modalities"):
            evaluate_pairs(things, feature=wrong)  # type: ignore[arg-type]


def test_run_without_texts_cannot_classify(things: Path, prompts: Path, tmp_path: Path) -> None:
    settings = train_settings({"shared_width": 2, "epochs": 0, "split": "key"})
    train(things, tmp_path / "run", feature=FEATURES, settings=settings)
    with pytest.raises(DataError, match="audio and points"):
        evaluate_zero_shot(things, tmp_path / "run", prompts)
    with pytest.raises(DataError, match="audio and points"):
        load(tmp_path / "run").classify(tone(0.1), ["a", "b"])
