"""The same work on a CUDA device."""

from pathlib import Path

import pytest
import torch

from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.train.settings import ModelSettings, OptimizerSettings, SplitSettings, TrainSettings
from embedcache.train.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_on_a_gpu_reaches_what_the_cpu_reaches(cache_path: Path, tmp_path: Path, precision: str) -> None:
    recalls = {}
    for device in ("cpu", "cuda"):
        settings = TrainSettings(
            model=ModelSettings(shared_width=16),
            optimizer=OptimizerSettings(epochs=5, batch_size=64),
            split=SplitSettings(kind="key"),
            device=device,
            precision=precision,  # type: ignore[arg-type]
        )
        train(cache_path, tmp_path / device, image="open_toy/cls", text="open_toy/mean", settings=settings)
        recalls[device] = evaluate_retrieval(cache_path, [tmp_path / device]).recalls["i2t"]["r@10"].value
    assert recalls["cuda"] == pytest.approx(recalls["cpu"], abs=0.1)
