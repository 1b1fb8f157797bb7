"""Several processes compute the gradients of one with the same batch: real processes, on gloo."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from safetensors.torch import load_file

from embedcache.settings import from_flat
from embedcache.train.losses import LOSSES
from embedcache.train.settings import FitSettings
from tests.crash import call, call_together
from tests.train.distributed_worker import main, sum_ranks_twice
from tests.train.places import main as train_many
from tests.train.places import train_places
from tests.train.runs import IMAGE, TEXT, log_lines, run

pytestmark = [pytest.mark.slow, pytest.mark.no_mutants]


def torchrun(num_processes: int, *words: str) -> None:
    """Run torchrun in a forked process, which has imported torch already; the processes that it starts have not."""
    call(torch.distributed.run.main, ["--standalone", f"--nproc-per-node={num_processes}", *words])


def test_gradients_match_one_process(tmp_path: Path) -> None:
    call(main, str(tmp_path / "1"))
    call_together(3, main, str(tmp_path / "3"))
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
