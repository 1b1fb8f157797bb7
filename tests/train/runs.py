"""Runs on the toy features, shared by the tests of training."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedcache.evaluate.retrieval import RetrievalReport
from embedcache.progress import AnyProgress
from embedcache.train import trainer
from embedcache.train.settings import train_settings
from embedcache.train.train import TrainReport, train

IMAGE, TEXT = "open_toy/cls", "open_toy/mean"


def run(
    caches: Path | list[Path],
    run_path: Path,
    *,
    image: str = IMAGE,
    text: str = TEXT,
    progress: AnyProgress = None,
    **options: Any,
) -> TrainReport:
    """Train a small run, by default two epochs of the default recipe."""
    defaults = {"shared_width": 16, "epochs": 2, "batch_size": 64, "split": "key"}
    settings = train_settings({**defaults, **options})
    return train(caches, run_path, feature={"image": image, "text": text}, settings=settings, progress=progress)  # type: ignore[arg-type]


@contextmanager
def interrupted_after(num_checkpoints: int, error: type[BaseException] = InterruptedError) -> Iterator[None]:
    """Raise an error right after training has written that many checkpoints."""
    save_checkpoint, num_left = trainer.save_checkpoint, num_checkpoints

    def save(*args: Any) -> None:
        nonlocal num_left
        save_checkpoint(*args)
        num_left -= 1
        if not num_left:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save)
        yield


def log_lines(run_path: Path) -> list[dict[str, Any]]:
    """Read `losses.jsonl`."""
    return [json.loads(line) for line in (run_path / "losses.jsonl").read_text().splitlines()]


def beats_chance(report: RetrievalReport) -> bool:
    """Return whether R@5 is well above what a random order gives."""
    return report.recalls["i2t"]["r@5"].value > 2 * report.chance["i2t"]["r@5"].high
