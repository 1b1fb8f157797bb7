"""Several processes compute the gradients of one with the same batch: real processes, on gloo."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from embedcache.arrays import Inputs, Ints
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import HardNegatives
from embedcache.projectors.pair import AlignedPair
from embedcache.settings import from_flat
from embedcache.train import losses
from embedcache.train.batches import Batch, PairBatches, load_pairs
from embedcache.train.distributed import process_group, process_rank, sum_over_processes
from embedcache.train.losses import LOSSES
from embedcache.train.pair import PairObjective
from embedcache.train.settings import FitSettings, LossSettings
from embedcache.train.trainer import _Loss
from tests.crash import call, call_together
from tests.train.places import main as train_many
from tests.train.places import train_places
from tests.train.runs import IMAGE, TEXT, log_lines, run

SAMPLES, WIDTH = 23, 6


def write_gradients(path: str) -> None:
    """Write a file that maps loss and options -> parameter -> gradient, alone or as one of several processes."""
    with process_group("cpu"):
        _write_gradients(path)


def sum_ranks_twice(path: str) -> None:
    """Write the sum of all ranks, computed in a process group, and again in one that is made after it."""
    sums = []
    for _ in range(2):
        with process_group("cpu"):
            sums.append(sum_over_processes(torch.tensor(process_rank())).item())
    Path(f"{path}-{os.environ['RANK']}").write_text(json.dumps(sums))


def _write_gradients(path: str) -> None:
    torch.manual_seed(0)
    losses.TILE_ROWS = 4
    pair = AlignedPair("linear", widths={"image": WIDTH, "text": WIDTH}, shared_width=4)
    gradients = {}
    for name in LOSSES.paths:
        for mixup in (0.0, 1.0):
            for weight in (0.0, 0.5):
                objective = PairObjective(
                    pair, LossSettings(name=name, mixup=mixup, structure=weight), precision="float32"
                )
                gradients[f"{name} {mixup} {weight}"] = _gradients(objective, mixup)
    for name in [name for name in LOSSES.paths if name != "info_nce"]:  # in one order in all processes
        objective = PairObjective(pair, LossSettings(name=name), precision="float32")
        gradients[f"{name} all captions"] = _gradients(objective, 0.0, captions="all")
    objective = PairObjective(pair, LossSettings(name="info_nce", widths=(2,)), precision="float32")
    gradients["info_nce at two widths"] = _gradients(objective, 0.0)
    for name in LOSSES.paths:
        objective = PairObjective(pair, LossSettings(name=name), precision="float32")
        gradients[f"{name} with hard negatives"] = _gradients(objective, 0.0, negatives=_negatives())
    if process_rank() == 0:
        torch.save(gradients, path)


def _gradients(
    objective: PairObjective, mixup: float, captions: str = "draw", negatives: HardNegatives | None = None
) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    loss = _Loss(objective)
    trained = DistributedDataParallel(loss) if torch.distributed.is_initialized() else loss
    trained(_first_batch(mixup, captions, negatives)).backward()
    return {name: value.grad.clone() for name, value in objective.named_parameters()}


def _negatives() -> HardNegatives:
    numbers = np.random.default_rng(1).integers(SAMPLES, size=(SAMPLES, 2)).astype(np.int32)
    return HardNegatives(negatives_SK=numbers, groups_S=np.arange(SAMPLES) // 3)


def _first_batch(mixup: float, captions: str, negatives: HardNegatives | None = None) -> Batch:
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 2 * SAMPLES, WIDTH))
    text_samples = np.sort(np.concatenate([np.arange(SAMPLES), rng.integers(SAMPLES, size=SAMPLES)]))
    pairs = Pairs(
        first=Items(rows=np.arange(SAMPLES), samples=np.arange(SAMPLES), contents=np.arange(SAMPLES) // 2),
        second=Items(
            rows=np.arange(2 * SAMPLES), samples=text_samples, contents=rng.integers(SAMPLES, size=2 * SAMPLES)
        ),
    )
    options = {"captions": captions, "negatives": negatives}
    batches = PairBatches(pairs, batch_size=SAMPLES, seed=0, mixup=mixup, **options)  # type: ignore[arg-type]

    def reader(values: np.ndarray):
        def read(rows: Ints) -> Inputs:
            return Inputs(values[rows])

        return read

    return load_pairs(next(batches.epoch(0)), {"image": reader(images), "text": reader(texts)}, "cpu")


pytestmark = [pytest.mark.slow, pytest.mark.no_mutants]


def torchrun(num_processes: int, *words: str) -> None:
    """Run torchrun in a forked process, which has imported torch already; the processes that it starts have not."""
    call(torch.distributed.run.main, ["--standalone", f"--nproc-per-node={num_processes}", *words])


def test_gradients_match_one_process(tmp_path: Path) -> None:
    call(write_gradients, str(tmp_path / "1"))
    call_together(3, write_gradients, str(tmp_path / "3"))
    expected, found = (torch.load(tmp_path / name, weights_only=True) for name in "13")
    assert len(expected) == 6 * len(LOSSES.paths)
    for name, gradients in expected.items():
        for parameter, gradient in gradients.items():
            error = (found[name][parameter] - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-6, (name, parameter)


def test_processes_train_several_runs_in_turn(tmp_path: Path) -> None:
    call_together(2, sum_ranks_twice, str(tmp_path / "sums"))
    assert [json.loads((tmp_path / f"sums-{rank}").read_text()) for rank in (0, 1)] == [[1, 1], [1, 1]]


def test_two_processes_train_the_same(cache_path: Path, tmp_path: Path) -> None:
    options = {"epochs": 3, "dropout": 0, "projector": "linear", "initialization": "random", "shared_width": 16}
    run(cache_path, tmp_path / "1", **options)
    words = ["--feature", f"image={IMAGE}", "--feature", f"text={TEXT}", "--split", "key", "--batch-size", "64"]
    words += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    torchrun(2, "-m", "--", "embedcache", "train", str(cache_path), str(tmp_path / "2"), *words)
    losses = [[line["loss"] for line in log_lines(tmp_path / name) if "loss" in line] for name in "12"]
    assert len(losses[0]) == 12
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in "12")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_two_processes_train_any_task_the_same(cache_path: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "batch_size": 60, "lr": 0.01, "trainable": "head"}  # dropout and batch norm are frozen
    train_places(cache_path, tmp_path / "1", from_flat(FitSettings, options))
    call_together(2, train_many, str(cache_path), str(tmp_path / "2"), json.dumps(options))
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in "12")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert len(log_lines(tmp_path / "2")) == 2 * 4 + 3
