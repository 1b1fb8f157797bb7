"""Pools for methods of selection: a cache, the same in chunks of another size, concepts, a target and a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.curate.select.pool import Pool
from embedcache.curate.select.select import SELECTORS, Selector
from embedcache.curate.select.settings import SelectSettings
from embedcache.dataset import keytable
from embedcache.dataset.selections import Selection
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import train_settings
from embedcache.train.train import train
from tests.images import write_images
from tests.toy import IMAGE, TEXT

CONCEPTS = {"red bar": ["red bar", "a red bar"], "left": ["left"], "white": ["on white"], "zebra": ["a zebra"]}
FEATURES = {"image": "open_toy/cls", "text": "open_toy/mean"}


@pytest.fixture(scope="session")
def around(cache_path: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths: `cache`, `other`, `concepts`, `target`, `run`, `scores`."""
    folder = tmp_path_factory.mktemp("around")
    (folder / "concepts.json").write_text(json.dumps(CONCEPTS))
    write_images(folder / "images", 12, seed=5)
    plain, small = ExtractSettings(features=("cls", "mean")), ExtractSettings(features=("cls", "mean"), chunk_size=17)
    extract(open_source(image_folder), folder / "other", image_encoder=[IMAGE], text_encoder=[TEXT], settings=small)
    extract(open_source(f"prompts:{folder}/concepts.json"), folder / "concepts", text_encoder=[TEXT])
    extract(
        open_source(folder / "images"),
        folder / "target",
        image_encoder=[IMAGE],
        text_encoder=[TEXT],
        settings=plain,
    )
    settings = train_settings({"projector": "linear", "epochs": 0, "split": "key"})
    train(cache_path, folder / "run", feature={"image": FEATURES["image"], "text": FEATURES["text"]}, settings=settings)
    cache = Cache(cache_path)
    scores = {"score": np.arange(300, dtype=np.float32) % 7}
    keytable.write(folder / "scores.parquet", [cache], scores, "scores", {})
    paths = {name: folder / name for name in ("other", "concepts", "target", "run")}
    return {"cache": cache_path, "scores": folder / "scores.parquet", **paths}


@pytest.fixture
def pools(around: dict[str, Path]) -> Callable[..., Pool]:
    """Return a function that opens a pool with all that a method needs."""

    def make(which: str, selector: Selector, *, selection: Path | None = None) -> Pool:
        modality = selector.modality or "image"
        inputs: dict[str, Any] = {name: around[name] for name in selector.required_inputs}
        feature = None if {"run", "scores"} & set(selector.required_inputs) else FEATURES[modality]
        return Pool(around[which], modality, SelectSettings(feature=feature, selection=selection, **inputs))

    return make


def apply(pools: Any, name: str, **options: Any) -> Selection:
    """Select from the session's cache by a method."""
    selector = SELECTORS.load(name)()
    return selector.select(pools("cache", selector), SelectSettings(**options))
