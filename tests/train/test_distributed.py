"""Several processes compute the gradients of one with the same batch: real processes, on gloo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedcache.train.distributed import own_slice

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(num_processes: int, *words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    outcome = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_gradients_match_one_process(tmp_path: Path) -> None:
    for processes in (1, 2, 3):
        torchrun(processes, str(WORKER), str(tmp_path / str(processes)))
    expected = torch.load(tmp_path / "1", weights_only=True)
    assert len(expected) == 4 * 4 + 3
    for processes in (2, 3):
        found = torch.load(tmp_path / str(processes), weights_only=True)
        for name, gradients in expected.items():
            for parameter, gradient in gradients.items():
                error = (found[name][parameter] - gradient).abs().max() / gradient.abs().max()
                assert error < 1e-6, (processes, name, parameter)


def test_two_processes_train_the_same(cache_path: Path, tmp_path: Path) -> None:
    options = (
        "--image-feature open_toy/cls --text-feature open_toy/mean --split key --epochs 3 --batch-size 64 --dropout 0 "
        "--projector linear --initialization random --shared-width 16 --threads 1"
    )
    for processes in (1, 2):
        run_path = str(tmp_path / str(processes))
        torchrun(processes, "-m", "--", "embedcache", "train", str(cache_path), run_path, *options.split())
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (tmp_path / name / "losses.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for name in "12"
    ]
    assert len(losses[0]) == 12
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in "12")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_own_slice_of_one_process() -> None:
    assert own_slice(7) == slice(0, 7)
