"""Caches of images whose labels are their colors, and runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from tests.conftest import FEATURES
from tests.evaluate.test_retrieval import train_run
from tests.images import COLORS
from tests.toy import IMAGE, TEXT

FEATURE = "open_toy/cls"
ColumnsOf = Callable[[int, str], dict[str, object]]


def color(number: int, caption: str) -> dict[str, object]:
    """Label an image with its color, and put every fourth into the test part."""
    return {"label": caption.split()[0], "split": "test" if number % 4 == 0 else "train"}


def write_colors(folder: Path, count: int) -> Path:
    """Write images of one color each, in random shades, with the color in the caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        name = str(rng.choice(list(COLORS)))
        pixels = np.array(COLORS[name]) + rng.normal(0, 40, 3) + rng.normal(0, 40, (16, 16, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(f"{name} thing {number}\n")
    return folder


def make_cache(folder: Path, columns_of: ColumnsOf, *, count: int = 120, copies: int = 0) -> Path:
    """Create a cache of images with the given columns; copies repeat the first images under other keys."""
    source = write_colors(folder / "source", count)
    for number in range(copies):
        for suffix in (".png", ".txt"):
            shutil.copy(source / f"{number:05d}{suffix}", source / f"copy-{number:05d}{suffix}")
    for number, path in enumerate(sorted(source.glob("*.txt"))):
        path.with_suffix(".json").write_text(json.dumps(columns_of(number, path.read_text().strip())))
    settings = ExtractSettings(features=FEATURES, chunk_size=32)
    extract(open_source(source), folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    return folder / "cache"


@pytest.fixture(scope="session")
def labeled_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 240 images labeled with their color, 60 of them for test. Not to be changed."""
    return make_cache(tmp_path_factory.mktemp("labeled"), color, count=240)


@pytest.fixture(scope="session")
def runs(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one recipe, which differ in their seed. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    return [train_run(cache_path, folder / f"seed-{seed}", seed=seed) for seed in range(2)]
