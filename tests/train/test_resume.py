"""Runs that go on: an interrupted one ends with the same bytes, and another request or input is refused."""

import errno
import io
import os
import shutil
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.errors import CorruptError, FingerprintError, SettingError
from embedcache.extract.extract import extract, retry_failed
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import CHECKPOINT, Run, is_finished
from embedcache.sources import open_source
from embedcache.store.layout import read_info
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import read_space
from embedcache.sweep.study import open_study
from embedcache.train import trainer
from embedcache.train.data import open_data
from embedcache.train.settings import MachineSettings
from embedcache.train.train import name_device
from embedcache.train.trainer import RunLog, load_checkpoint
from tests.cli.run import embedcache
from tests.crash import start
from tests.edits import edit_record
from tests.images import write_images
from tests.sweep.conftest import FEATURES, SPACE
from tests.toy import IMAGE, TEXT
from tests.train import runs

SAME = ("model.safetensors", "last.safetensors", "losses.jsonl", "split.parquet")
OPTIONS = {"initialization": "random", "loss": "siglip", "mixup": 0.5, "epochs": 2, "checkpoint_s": 0}


def run(cache_path: Path, run_path: Path, **options: Any) -> None:
    runs.run(cache_path, run_path, **{**OPTIONS, **options})


def run_interrupted(cache_path: Path, run_path: Path, num_steps: int, **options: Any) -> None:
    """Train until an exception right after the checkpoint of a step."""
    with runs.interrupted_after(num_steps), pytest.raises(InterruptedError):
        run(cache_path, run_path, **options)
    assert (run_path / CHECKPOINT).is_file()
    assert not is_finished(run_path)


def assert_same_run(found: Path, expected: Path) -> None:
    for name in SAME:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    first, second = (Run.open(path).info for path in (found, expected))
    assert (first.settings, first.inputs, first.digests) == (second.settings, second.inputs, second.digests)
    assert first.report["measures"] == second.report["measures"]
    assert not (found / CHECKPOINT).exists()


@pytest.fixture(scope="module")
def whole(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run. Not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(cache_path, path)
    return path


@pytest.fixture(scope="module")
def interrupted(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted after its fifth step, the first of the second epoch. Not to be changed."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    run_interrupted(cache_path, path, 5)
    return path


@pytest.fixture
def unfinished(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of the interrupted run."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 4, 8])
def test_resume_is_identical(cache_path: Path, whole: Path, tmp_path: Path, num_steps: int) -> None:
    run_interrupted(cache_path, tmp_path / "run", num_steps)
    torch.manual_seed(99)  # the generator of the resuming process must not matter
    run(cache_path, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_threads_train_the_same_runs(cache_path: Path, whole: Path, tmp_path: Path) -> None:
    """All threads of a process draw from torch's generators."""
    paths = [tmp_path / "first", tmp_path / "second"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: run(cache_path, path), paths))
    for path in paths:
        assert_same_run(path, whole)


@pytest.mark.slow
def test_resume_uses_the_split_of_the_run(
    cache_path: Path, whole: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.train.data.make_split", None)  # other samples may have features by now
    run(cache_path, unfinished)
    assert_same_run(unfinished, whole)


def test_resume_with_other_settings_is_refused(cache_path: Path, unfinished: Path) -> None:
    before = (unfinished / CHECKPOINT).read_bytes()
    with pytest.raises(FingerprintError, match="seed"):
        run(cache_path, unfinished, seed=1)
    assert (unfinished / CHECKPOINT).read_bytes() == before


def saved(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


@pytest.mark.slow
def test_damaged_checkpoint_is_noticed(unfinished: Path) -> None:
    path, rng = unfinished / CHECKPOINT, np.random.default_rng(0)
    data, num_refused = path.read_bytes(), 0
    expected = load_checkpoint(unfinished, "cpu")
    assert expected is not None
    for place in rng.integers(len(data), size=60).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            found = load_checkpoint(unfinished, "cpu")
        except CorruptError as error:
            num_refused += 1 if "delete it to restart" in str(error) else -9999
        else:
            assert found is not None
            assert saved(found) == saved(expected), place
    assert num_refused > 30


def test_wrong_checkpoint_is_refused(cache_path: Path, unfinished: Path) -> None:
    path = unfinished / CHECKPOINT
    state = torch.load(path, weights_only=True)
    for content, error, word in (
        (saved({**state, "generators": state["generators"] * 2}), FingerprintError, "2 processes"),
        (saved({"step": 3}), CorruptError, "checkpoint.pt"),
        (bytes(1000), CorruptError, "checkpoint.pt"),
    ):
        path.write_bytes(content)
        with pytest.raises(error, match=word):
            run(cache_path, unfinished)


def test_only_the_first_process_writes_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size in ((0, 12), (1, 0)):
        monkeypatch.setattr(trainer, "process_rank", lambda rank=rank: rank)
        with RunLog(tmp_path, num_bytes=0, step=0) as log:
            log.write({"loss": rank}, 0, {})
            assert log.flush() == size
    assert (tmp_path / "losses.jsonl").read_bytes() == b'{"loss": 0}\n'


@pytest.mark.slow
def test_log_that_was_cut_is_refused_and_a_missing_one_is_not_padded(cache_path: Path, unfinished: Path) -> None:
    path = unfinished / "losses.jsonl"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CorruptError, match="losses.jsonl"):
        run(cache_path, unfinished)
    assert path.stat().st_size == 50
    path.unlink()
    run(cache_path, unfinished)
    assert b"\0" not in path.read_bytes()


def test_finished_run_on_a_read_only_disk_is_reused(
    cache_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    run(cache_path, whole)


@pytest.mark.slow
@pytest.mark.no_mutants
def test_resume_after_kill_is_identical(cache_path: Path, tmp_path: Path) -> None:
    options = (
        "--feature image=open_toy/cls --feature text=open_toy/mean --split key --epochs 15 --batch-size 64 "
        "--shared-width 16 --checkpoint-s 0"
    )
    command = ["train", str(cache_path), str(tmp_path / "killed"), *options.split()]
    process = start(command)
    while not (tmp_path / "killed" / CHECKPOINT).exists():
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not is_finished(tmp_path / "killed")
    outcome = embedcache(*command, cwd=tmp_path)
    assert "resumed from the checkpoint after step" in outcome.stderr
    runs.run(cache_path, tmp_path / "whole", epochs=15)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_auto_device_is_that_of_the_run(cache_path: Path, whole: Path, unfinished: Path, tmp_path: Path) -> None:
    """A machine without a GPU reuses a run that was trained on one, and does not resume it elsewhere."""
    finished = Path(shutil.copytree(whole, tmp_path / "finished"))
    for path in (finished, unfinished):
        edit_record(path / "run.json", {'"device": "cpu"': '"device": "cuda"'})
    run(cache_path, finished)
    with pytest.raises(FingerprintError, match="device: stored 'cuda', requested 'cpu'"):
        runs.run(cache_path, finished, device="cpu", **OPTIONS)
    with pytest.raises(SettingError, match="device 'cuda' is not available"):
        run(cache_path, unfinished)
    assert name_device(MachineSettings(device="cpu"), unfinished).device == "cpu"
    (unfinished / CHECKPOINT).unlink()
    assert name_device(MachineSettings(), unfinished).device == "cpu"  # nothing to resume


@pytest.mark.slow
def test_float16_resumes(cache_path: Path, tmp_path: Path) -> None:
    run_interrupted(cache_path, tmp_path / "stopped", 2, precision="float16")
    for name in ("whole", "stopped"):
        run(cache_path, tmp_path / name, precision="float16")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


SETTINGS = ExtractSettings(chunk_size=16, views=("flip",))
ONCE: dict[str, Any] = {"epochs": 0, "batch_size": 8}
RETRIED = "digests.failed image .*retried"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images with captions. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("retried") / "source", 40)


@pytest.fixture(scope="module")
def before(source: Path) -> Path:
    """A cache of them, made when two were broken: files as long as the good ones. Not to be changed."""
    broken, cache = Path(shutil.copytree(source, source.parent / "broken")), source.parent / "before"
    for number in (3, 20):
        path = broken / f"{number:05d}.png"
        path.write_bytes(b"x" * path.stat().st_size)
    extract(open_source(broken), cache, image_encoder=[IMAGE], text_encoder=[TEXT], settings=SETTINGS)
    return cache


@pytest.fixture(scope="module")
def after(before: Path, source: Path) -> Path:
    """The same cache after one of them was retried: its samples, and their digest, are the same. Not to be changed."""
    cache = Path(shutil.copytree(before, before.with_name("after")))
    retry_failed(open_source(source), cache, image_encoder=[IMAGE], settings=SETTINGS)
    assert read_info(cache).index_digest == read_info(before).index_digest
    return cache


def test_finished_run(before: Path, after: Path, tmp_path: Path) -> None:
    runs.run(before, tmp_path / "run", **ONCE)
    assert set(Run.open(tmp_path / "run").info.digests) == {"failed image"}
    assert runs.run(before, tmp_path / "run", **ONCE).reused
    with pytest.raises(FingerprintError, match=RETRIED):
        runs.run(after, tmp_path / "run", **ONCE)
    with pytest.raises(FingerprintError, match="settings.optimizer.epochs: stored 0, req"):
        runs.run(after, tmp_path / "run", epochs=1, batch_size=8)


def test_study(before: Path, after: Path, tmp_path: Path) -> None:
    (tmp_path / "space.toml").write_text(SPACE)
    space = read_space(tmp_path / "space.toml")
    names = FEATURES["feature"]
    then, now = (open_data(cache, names, memory_bytes=10**9) for cache in (before, after))
    made = open_study(tmp_path / "study", then, space, SweepSettings())
    assert open_study(tmp_path / "study", then, space, SweepSettings()) == made
    with pytest.raises(FingerprintError, match=f"study .*{RETRIED}"):
        open_study(tmp_path / "study", now, space, SweepSettings())
