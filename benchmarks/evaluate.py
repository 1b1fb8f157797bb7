"""Whole evaluations of a cached run, 1,024 wide: the command in a fresh process, and its peak memory.

Zero-shot: 50,000 images, 1,000 classes of 7 prompts. Retrieval: 5,000 images with 5 captions each. Both with
intervals, average precision or confusions, and the search for leaks in 20,000 training pairs. The floor is torch and
NumPy on arrays in memory: projections, one product, a count, and nothing else.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.data import RandomSource, write_random_cache
from benchmarks.measure import median_seconds, run_embedcache
from embedcache.arrays import Inputs, normalize
from embedcache.cli.console import print_line, print_table
from embedcache.dataset.settings import SplitSettings
from embedcache.evaluate.runs import load_runs
from embedcache.projectors.saved import project
from embedcache.store.cache import Cache
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train

WIDTH, NUM_CLASSES, NUM_PROMPTS = 1024, 1000, 7


def main(*, quick: bool) -> None:
    """Print seconds and memory of both evaluations."""
    small = 10 if quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = write_random_cache(folder / "pairs", RandomSource(20_000 // small, num_captions=1), WIDTH, seed=1)
        recipe = TrainSettings(
            model=ModelSettings(projector="mlp", shared_width=WIDTH),
            optimizer=OptimizerSettings(epochs=0),
            split=SplitSettings(kind="key"),
        )
        train(pairs, folder / "run", settings=recipe)
        write_random_cache(folder / "images", RandomSource(50_000 // small, num_classes=NUM_CLASSES), WIDTH, seed=2)
        write_random_cache(
            folder / "prompts", RandomSource(NUM_CLASSES, num_captions=NUM_PROMPTS, has_image=False), WIDTH, seed=3
        )
        write_random_cache(folder / "captioned", RandomSource(5_000 // small, num_captions=5), WIDTH, seed=4)
        floors: Mapping[str, Callable[[Path], object]] = {"zero-shot": _classify, "retrieval": _retrieve}
        commands = {
            "zero-shot": ["zero-shot", "images", "run", "--prompts", "prompts"],
            "retrieval": ["retrieval", "captioned", "run"],
        }
        rows = [_row(folder, task, commands[task], floors[task], 1 if quick else 3) for task in commands]
    print_table(["evaluation", "seconds", "peak, GB", "floor, s", "times the floor"], rows)
    print_line("targets: 10 s and 2 GB; start-up and imports included")


def _row(folder: Path, task: str, command: list[str], floor: Callable[[Path], object], repeats: int) -> list[str]:
    runs = [run_embedcache(["evaluate", *command], folder=folder) for _ in range(repeats)]
    seconds, peak = np.median([run.seconds for run in runs]), max(run.peak_gb for run in runs)
    least = median_seconds(lambda: floor(folder), repeats=repeats)
    return [task, f"{seconds:.1f}", f"{peak:.2f}", f"{least:.2f}", f"{seconds / least:.1f}"]


def _classify(folder: Path) -> object:
    pair = load_runs([folder / "run"])[0].pair
    images = project(pair.tower("image"), Inputs(Cache(folder / "images").feature("image").load()))
    prompts = project(pair.tower("text"), Inputs(Cache(folder / "prompts").feature("text").load()))
    classes = normalize(prompts.reshape(NUM_CLASSES, NUM_PROMPTS, -1).mean(axis=1))
    return np.mean((images @ classes.T).argmax(axis=1) == np.arange(len(images)) % NUM_CLASSES)


def _retrieve(folder: Path) -> object:
    pair, cache = load_runs([folder / "run"])[0].pair, Cache(folder / "captioned")
    images = project(pair.tower("image"), Inputs(cache.feature("image").load()))
    texts = project(pair.tower("text"), Inputs(cache.feature("text").load()))
    scores, owners = images @ texts.T, np.arange(len(texts)) // 5
    own = scores[owners, np.arange(len(texts))]
    return np.mean((scores > own).sum(axis=0) < 10), np.mean(owners[scores.argmax(axis=1)] == np.arange(len(images)))
