"""The training loop with a task that is not a pair: it learns, resumes, freezes parts and starts from other runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.dataset.inputs import open_input
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError, UnknownNameError
from embedcache.reports.summary import summarize
from embedcache.runs import CHECKPOINT, Run
from embedcache.settings import from_flat
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from embedcache.train.train import TrainReport
from tests.train.places import FEATURE, read_places, train_places
from tests.train.runs import interrupted_after, log_lines

SAME = ("model.safetensors", "last.safetensors", "losses.jsonl")


def fit(cache_path: Path, run_path: Path, **options: Any) -> TrainReport:
    scale = options.pop("scale", 1.0)
    return train_places(cache_path, run_path, from_flat(FitSettings, {"epochs": 3, "lr": 0.01, **options}), scale=scale)


@pytest.fixture(scope="module")
def finished(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    path = tmp_path_factory.mktemp("places") / "run"
    fit(cache_path, path, epochs=25, seed=1)
    return path


def test_second_task_learns(cache_path: Path, finished: Path) -> None:
    run = Run.open(finished)
    feature = open_input(Cache(cache_path), "image", FEATURE)
    rows = np.arange(0, 300, 5)
    with torch.inference_mode():
        scores = run.module(torch.from_numpy(feature.read(rows).values))
    accuracy = float((scores.argmax(dim=1).numpy() == read_places(cache_path)[rows]).mean())
    assert accuracy == pytest.approx(run.info.report["measures"]["accuracy"])
    assert accuracy > 0.45  # chance is 0.25, with a standard error of 0.06
    assert run.input("image").feature == FEATURE
    assert summarize(finished).sections[0].table[1] == [["image", FEATURE, "3", "tests.toy:open_toy"]]
    assert fit(cache_path, finished, epochs=25, seed=1).reused
    with pytest.raises(FingerprintError, match=r"settings\.optimizer\.lr: stored 0.01, requested 0.1"):
        fit(cache_path, finished, epochs=25, seed=1, lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_resume_of_any_task_is_identical(cache_path: Path, tmp_path: Path, num_steps: int) -> None:
    options = {"checkpoint_s": 0, "batch_size": 60, "precision": "bfloat16"}
    with interrupted_after(num_steps), pytest.raises(InterruptedError):
        fit(cache_path, tmp_path / "run", **options)
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    torch.manual_seed(99)
    fit(cache_path, tmp_path / "run", **options)
    fit(cache_path, tmp_path / "whole", **options)
    for name in SAME:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_bad_loss_is_one_error(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at step 0, the image feature holds NaN"):
        fit(cache_path, tmp_path / "bad", scale=float("nan"))


@pytest.mark.parametrize(("trainable", "frozen"), [("head", "body."), ("body", "head.")])
def test_frozen_part_is_equal_to_the_bit(
    cache_path: Path, finished: Path, tmp_path: Path, trainable: str, frozen: str
) -> None:
    report = fit(cache_path, tmp_path / "run", init_from=(str(finished),), trainable=trainable, seed=2)
    after, start = load_file(tmp_path / "run/last.safetensors"), load_file(finished / "model.safetensors")
    assert {"body.0.running_mean", "body.0.num_batches_tracked", "head.bias"} < after.keys()
    for name, value in after.items():
        assert torch.equal(value, start[name]) == name.startswith(frozen), name
    run = Run.open(tmp_path / "run")
    trained = [value.numel() for name, value in run.module.named_parameters() if frozen not in name]
    assert report.num_parameters == sum(trained)
    assert run.info.digests == {"init_from *": Run.open(finished).info.weights}
    assert f"trained parts: {trainable}" in summarize(tmp_path / "run").lines[1]


def test_one_part_starts_from_a_run(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    fit(cache_path, tmp_path / "run", init_from=(f"body={finished}",), epochs=0, seed=3)
    found, start = load_file(tmp_path / "run/model.safetensors"), load_file(finished / "model.safetensors")
    assert {name for name in found if torch.equal(found[name], start[name])} == {
        name for name in start if name.startswith("body.")
    }


def test_start_run_is_whole_or_refused(cache_path: Path, finished: Path, run_path: Path, tmp_path: Path) -> None:
    for words, error, word in (
        ((str(run_path),), DataError, "part body"),  # a pair
        ((f"neck={finished}",), UnknownNameError, "neck"),
        ((str(finished), str(finished)), SettingError, "one run"),
        ((str(tmp_path / "nothing"),), PathError, "nothing does not exist"),
    ):
        with pytest.raises(error, match=word):
            fit(cache_path, tmp_path / "run", init_from=words)
    with pytest.raises(UnknownNameError, match="neck"):
        fit(cache_path, tmp_path / "run", trainable="head+neck")


def test_changed_start_run_is_another_run(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    fit(cache_path, tmp_path / "first", seed=5, epochs=0)
    fit(cache_path, tmp_path / "run", init_from=(str(tmp_path / "first"),), epochs=1)
    weights = tmp_path / "first/model.safetensors"
    weights.write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(CorruptError, match=r"model\.safetensors: expected checksum"):
        fit(cache_path, tmp_path / "other", init_from=(str(tmp_path / "first"),), epochs=1)
    (tmp_path / "first/run.json").write_bytes((finished / "run.json").read_bytes())
    with pytest.raises(FingerprintError, match=r"digests\.init_from \*"):
        fit(cache_path, tmp_path / "run", init_from=(str(tmp_path / "first"),), epochs=1)
    assert log_lines(tmp_path / "run")
