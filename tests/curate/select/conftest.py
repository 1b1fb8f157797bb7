"""Pools for methods of selection: a cache, the same in chunks of another size, concepts, a target and a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.curate.select.select import Pool, apply_method, load_method, named_inputs
from embedcache.curate.settings import SelectSettings
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

    def make(method: str, which: str = "cache", **options: Any) -> Pool:
        return open_pool(around, load_method(method), which, make_settings(around, load_method(method), **options))

    return make


@pytest.fixture
def chosen(around: dict[str, Path]) -> Callable[..., Selection]:
    """Return a function that selects by a method, with its parameters, from the session's cache or the `other` one."""

    def choose(method: str, which: str = "cache", **options: Any) -> Selection:
        bound = load_method(method)
        settings = make_settings(around, bound, **options)
        return apply_method(bound, open_pool(around, bound, which, settings), settings)

    return choose


def make_settings(around: dict[str, Path], bound: Any, **options: Any) -> SelectSettings:
    inputs = [name for name in named_inputs(bound) if name in around]
    feature = None if {"run", "scores"} & set(inputs) else FEATURES[default_modality(inputs)]
    return SelectSettings(**{"feature": feature, **{name: around[name] for name in inputs}, **options})


def open_pool(around: dict[str, Path], bound: Any, which: str, settings: SelectSettings) -> Pool:
    return Pool(around[which], default_modality(named_inputs(bound)), settings)


def default_modality(inputs: list[str]) -> str:
    return "text" if "concepts" in inputs else "image"
