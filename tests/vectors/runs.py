"""Runs on the toy encoder's features, made in a second."""

from pathlib import Path

import numpy as np

from embedcache.dataset.inputs import open_input
from embedcache.dataset.settings import SplitSettings
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train

SIDES = {
    "vectors": ("open_toy/cls", "open_toy/mean", "linear"),
    "tokens": ("open_toy/patches+open_toy/patches", "open_toy/tokens", "token"),
}
"""Image feature, text feature and projector of a run."""


def train_run(cache_path: Path, run_path: Path, image: str, text: str, projector: str) -> Path:
    """Train for no time: the closed form, or one epoch on tokens."""
    settings = TrainSettings(
        model=ModelSettings(shared_width=16, projector=projector, shrinkage=0.01),
        optimizer=OptimizerSettings(epochs=1 if projector == "token" else 0, batch_size=24),
        split=SplitSettings(kind="key"),
    )
    train(cache_path, run_path, feature={"image": image, "text": text}, settings=settings)
    return run_path


def cached_vectors(cache_path: Path, run_path: Path, modality: str) -> np.ndarray:
    """Project the features of a cache, in row order."""
    run = Run.open(run_path)
    side = open_input(Cache(cache_path), modality, run.input(modality).feature)
    return project(run.pair.tower(modality), side.read(np.arange(side.num_items)))
