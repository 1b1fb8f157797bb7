"""A run that is stopped anywhere goes on to the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from embedcache.errors import CorruptError, FingerprintError, PathError
from embedcache.train import trainer as loop
from embedcache.train.checkpoint import checkpoint_path
from embedcache.train.settings import (
    LossSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    SplitSettings,
    TrainSettings,
)
from embedcache.train.train import train

SAME = ("model.safetensors", "last.safetensors", "losses.jsonl", "split.parquet", "config.json")


def settings(*, seed: int = 0) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(shared_width=16, initialization="random"),
        loss=LossSettings(name="siglip", mixup=0.5),
        optimizer=OptimizerSettings(epochs=3, batch_size=64),
        split=SplitSettings(kind="key"),
        captions="draw",
        seed=seed,
        machine=MachineSettings(checkpoint_s=0),
    )


def run(cache_path: Path, run_path: Path, *, seed: int = 0) -> None:
    train(cache_path, run_path, image="open_toy/cls", text="open_toy/mean", settings=settings(seed=seed))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a process fail right after so many checkpoints."""
    left = [steps]

    def save(*args: object) -> None:
        kept_save(*args)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            raise InterruptedError

    kept_save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", save)


@pytest.mark.parametrize("steps", [1, 4, 5, 12])
def test_a_run_stopped_after_any_step_ends_with_the_same_bytes(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    run(cache_path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(InterruptedError):
            run(cache_path, tmp_path / "stopped")
    assert checkpoint_path(tmp_path / "stopped").is_file()
    assert not (tmp_path / "stopped/config.json").exists()
    torch.manual_seed(99)  # what the next process's generator holds does not matter
    run(cache_path, tmp_path / "stopped")
    for name in SAME:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not checkpoint_path(tmp_path / "stopped").exists()


def test_going_on_with_other_settings_is_refused(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedError):
            run(cache_path, tmp_path / "run")
    before = checkpoint_path(tmp_path / "run").read_bytes()
    with pytest.raises(
        FingerprintError, match=r"the unfinished run .* training\.seed: 0 there, 1 asked; ask for the same"
    ):
        run(cache_path, tmp_path / "run", seed=1)
    assert checkpoint_path(tmp_path / "run").read_bytes() == before


def test_a_run_goes_on_with_its_own_split(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedError):
            run(cache_path, tmp_path / "run")
    monkeypatch.setattr("embedcache.train.train.make_split", None)  # other samples may have features by now
    run(cache_path, tmp_path / "run")


def test_two_processes_do_not_train_into_one_folder(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    script = (
        "import sys; from pathlib import Path; from embedcache.files import Leases; "
        "claims = Leases(Path(sys.argv[1])); "
        "print(claims.take(0), flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        (tmp_path / "run/started.json").write_text("{}")
        with pytest.raises(PathError, match="another process trains into .*run; wait for it"):
            run(cache_path, tmp_path / "run")
        other.communicate("\n")
    run(cache_path, tmp_path / "run")


def test_a_log_that_is_shorter_than_the_checkpoint_says_is_not_filled(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedError):
            run(cache_path, tmp_path / "run")
    (tmp_path / "run/losses.jsonl").unlink()
    run(cache_path, tmp_path / "run")
    assert b"\0" not in (tmp_path / "run/losses.jsonl").read_bytes()


def test_a_checkpoint_that_is_broken_or_of_more_processes_is_named(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(InterruptedError):
            run(cache_path, tmp_path / "run")
    path = checkpoint_path(tmp_path / "run")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "generators": state["generators"] * 2}, path)
    with pytest.raises(FingerprintError, match="was written by 2 processes, and 1 go on; start as many"):
        run(cache_path, tmp_path / "run")
    torch.save({"step": 3}, path)
    with pytest.raises(CorruptError, match=r"checkpoint.pt cannot be read: 'objective'; delete it"):
        run(cache_path, tmp_path / "run")
    path.write_bytes(bytes(1000))
    with pytest.raises(CorruptError, match=r"checkpoint.pt cannot be read: .*; delete it to train from the start"):
        run(cache_path, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_bytes(cache_path: Path, tmp_path: Path) -> None:
    def command(run_path: Path) -> list[str]:
        options = (
            "--image-feature open_toy/cls --text-feature open_toy/mean --split key --epochs 40 --batch-size 32 "
            "--checkpoint-s 0 --lr 1e-3"
        )
        return [sys.executable, "-m", "embedcache", "train", str(cache_path), str(run_path), *options.split()]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    with subprocess.Popen(command(tmp_path / "killed"), stderr=subprocess.DEVNULL) as process:
        while not checkpoint_path(tmp_path / "killed").exists():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "killed/config.json").exists()
    outcome = subprocess.run(command(tmp_path / "killed"), check=True, capture_output=True, text=True)
    assert "going on from the checkpoint after step" in outcome.stderr
    for name in SAME:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
