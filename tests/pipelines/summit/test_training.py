"""Segmentation runs: a source learns, adaptation starts from it, resumes exactly and keeps what is frozen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.errors import DataError
from embedcache.runs import Run, RunInput
from embedcache.settings import from_flat
from embedcache.train.settings import FitSettings
from pipelines.summit.networks import RUN_KIND, PointNetworks
from pipelines.summit.training import (
    PointData,
    SegmentationInputs,
    mean_iou_of,
    save_adapted_norms,
    train_adaptation,
    train_source,
)
from tests.train.runs import interrupted_after

C, WIDTHS = 3, {"image": 6, "points": 4}


def make_data(seed: int, *, shift: float = 0.0, num_frames: int = 8) -> PointData:
    """Frames of points of three classes around their means in both modalities; the image's features are moved."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(40, 60, num_frames)
    labels = rng.integers(0, C, lengths.sum())
    features = {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        means = np.random.default_rng(90 + number).normal(size=(C, width)) * 2
        moved = shift * (means[1] - means[0]) if name == "image" else 0.0
        features[name] = (means[labels] + rng.normal(size=(len(labels), width)) + moved).astype(np.float16)
    return PointData(features=features, labels_N=labels, lengths_G=lengths)


def inputs(*names: str) -> SegmentationInputs:
    features = {
        name: RunInput(modality="points", feature=f"{name}/f", spec=f"toy:{name}", fingerprint={}, width=WIDTHS[name])
        for name in names
    }
    return SegmentationInputs(features=features, data_digest="made up")


def settings(**options: Any) -> FitSettings:
    return from_flat(FitSettings, {"epochs": 8, "lr": 0.01, "batch_size": 64, **options})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source run per modality. Not to be changed."""
    folder = tmp_path_factory.mktemp("segmentation")
    for number, name in enumerate(WIDTHS):
        data = make_data(10 + number)
        train_source(data.frames(0, 6), data.frames(6, 8), folder / name, inputs(name), settings(), num_classes=C)
    return {name: folder / name for name in WIDTHS}


def adapt(runs: dict[str, Path], path: Path, **options: Any) -> Path:
    """Adapt the image to moved features, with the labels that are right for 90% of the points."""
    data = make_data(20, shift=1.5)
    labels = np.where(np.random.default_rng(0).random(len(data.labels_N)) < 0.1, -1, data.labels_N)
    words = tuple(f"{name}={run}" for name, run in runs.items())
    train_adaptation(
        data,
        {"image": labels},
        path,
        inputs(*WIDTHS),
        settings(**{"init_from": words, "trainable": "image", **options}),
        num_classes=C,
    )
    return path


def load(path: Path) -> PointNetworks:
    module = Run.open(path).module
    assert isinstance(module, PointNetworks)
    return module


def test_source_run_learns_and_records_its_input(runs: dict[str, Path]) -> None:
    for name, run in runs.items():
        assert mean_iou_of(load(run), name, make_data(30)) > 0.7
        assert Run.open(run, kind=RUN_KIND).modalities == (name,)


@pytest.mark.slow
def test_adaptation_changes_one_modality_only(runs: dict[str, Path], tmp_path: Path) -> None:
    module, target = load(adapt(runs, tmp_path / "run")), make_data(31, shift=1.5)
    assert mean_iou_of(module, "image", target) > mean_iou_of(load(runs["image"]), "image", target) + 0.2
    before, after = load(runs["points"])["points"].state_dict(), module["points"].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert set(Run.open(tmp_path / "run").info.digests) == {"init_from image", "init_from points"}


@pytest.mark.slow
def test_adaptation_keeps_the_last_epoch_and_resumes_to_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    with interrupted_after(9), pytest.raises(InterruptedError):
        adapt(runs, tmp_path / "run", checkpoint_s=0, epochs=3)
    for name in ("run", "whole"):
        adapt(runs, tmp_path / name, checkpoint_s=0, epochs=3)
    for name in ("model.safetensors", "last.safetensors", "losses.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    best, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("model", "last"))
    assert all(torch.equal(value, last[name]) for name, value in best.items())


def test_norm_statistics_are_a_run_that_training_starts_from(runs: dict[str, Path], tmp_path: Path) -> None:
    target = make_data(20, shift=1.5)
    module = save_adapted_norms(runs, target.features, ["image"], tmp_path / "norms")
    stored = load(tmp_path / "norms")
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in module.state_dict().items())
    test = make_data(31, shift=1.5)
    assert mean_iou_of(stored, "image", test) > mean_iou_of(load(runs["image"]), "image", test) + 0.1
    assert mean_iou_of(stored, "points", test) == mean_iou_of(load(runs["points"]), "points", test)
    adapt({"image": tmp_path / "norms", "points": tmp_path / "norms"}, tmp_path / "run", epochs=0)
    start = load(tmp_path / "run")["image"]
    assert torch.equal(start.hidden_norm.running_mean, stored["image"].hidden_norm.running_mean)  # type: ignore[arg-type]


def test_nan_feature_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    data = make_data(10)
    data.features["image"][7, 0] = np.nan
    with pytest.raises(DataError, match="the image feature holds NaN or infinity"):
        train_source(data, data, tmp_path / "run", inputs("image"), settings(), num_classes=C)
