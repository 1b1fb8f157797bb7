"""Example caches for the contract tests, of tiny images and captions and an encoder of both that needs no weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedcache.arrays import Array
from embedcache.dataset import keytable
from embedcache.encoders.base import NO_WEIGHTS, Encoder, EncoderSettings, Fingerprint, ItemShape, Modality
from embedcache.encoders.open import EncoderSpec, check_options
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import train_settings
from embedcache.train.train import train

ENCODER = "embedcache.testing.examples:open_example"
NUM_SAMPLES = 120
_COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "black": (20, 20, 20)}
_PLACES = {"left": (0, 0, 4, 8), "right": (4, 0, 8, 8), "top": (0, 0, 8, 4), "bottom": (0, 4, 8, 8)}
_CONCEPTS = {"red": ["red", "a red bar"], "left": ["left"], "black": ["on black"], "zebra": ["a zebra"]}
_SMALL_CHUNK = 17


class ExampleEncoder:
    """The 4 x 4 mean colors of an image, or the mean of a random vector per word of a text."""

    batch_size = 64

    def __init__(self, modality: Modality) -> None:
        self.modality: Modality = modality
        self.features: Mapping[str, ItemShape] = {"vector": (48,) if modality == "image" else (32,)}
        self.fingerprint = Fingerprint(
            family=ENCODER, model=modality, weights=NO_WEIGHTS, preprocessing={}, pooling={"vector": "mean"}
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Return 4 x 4 pixels per image, or a number per word of each text."""
        if self.modality == "image":
            return list(map(_prepare_image, items))
        return [np.array(list(map(_number, text.split())), np.int64) for text in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        """Return the vectors."""
        vectors = []
        for array in prepared:
            if self.modality == "image":
                vectors.append(array.ravel())
            else:
                # The seed of a word's vector is the word's number, so the vector is the same in every process.
                word_vectors = [np.random.default_rng(number).standard_normal(32) for number in array]
                vectors.append(np.mean(word_vectors, axis=0).astype(np.float32))
        return dict.fromkeys(names, vectors)


def open_example(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder of images or texts."""
    del settings
    check_options(spec, ())
    return ExampleEncoder(modality)


@cache
def write_examples(folder: Path) -> Mapping[str, Path]:
    """Write caches and other inputs of methods of selection, once per process, and return the paths.

    `cache` has `NUM_SAMPLES` images with a caption each. `other` has the same in chunks of another size, `target` has a
    few other images, and `concepts` has prompts. `run` is a run on `cache`, and `scores` is a table with a score for
    each of its samples.
    """
    for name, count, seed in (("images", NUM_SAMPLES, 0), ("few", 12, 1)):
        _write_images(folder / name, count, seed=seed)
    (folder / "concepts.json").write_text(json.dumps(_CONCEPTS), encoding="utf-8")

    for name, source, chunk_size in (
        ("cache", "images", 2048),
        ("other", "images", _SMALL_CHUNK),
        ("target", "few", 64),
    ):
        extract(
            open_source(folder / source),
            folder / name,
            image_encoder=[ENCODER],
            text_encoder=[ENCODER],
            settings=ExtractSettings(chunk_size=chunk_size),
        )
    extract(open_source(f"prompts:{folder / 'concepts.json'}"), folder / "concepts", text_encoder=[ENCODER])

    # With 0 epochs, the run keeps its initialization.
    settings = train_settings({"projector": "linear", "epochs": 0, "split": "key", "device": "cpu"})
    train(folder / "cache", folder / "run", settings=settings)

    # Many samples have equal scores, so that methods must break ties.
    numbers = np.arange(NUM_SAMPLES, dtype=np.float32) % 7
    keytable.write(folder / "scores.parquet", [Cache(folder / "cache")], {"score": numbers}, "scores", {})

    paths = {name: folder / name for name in ("cache", "other", "target", "concepts", "run")}
    paths["scores"] = folder / "scores.parquet"
    return paths


def _write_images(folder: Path, count: int, *, seed: int) -> None:
    """Write PNG files, a noisy background with a bar, each with a caption in a `.txt` file of the same name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        back, front = rng.choice(list(_COLORS), 2, replace=False)
        place = rng.choice(list(_PLACES))
        image = Image.new("RGB", (8, 8), _COLORS[back])
        image.paste(_COLORS[front], _PLACES[place])

        # Without noise, many images would be equal.
        noise = rng.integers(0, 12, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(np.asarray(image) + noise).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(f"a {front} bar {place} on {back}\n", encoding="utf-8")


def _prepare_image(image: Image.Image) -> Array:
    pixels: Array = np.asarray(image.resize((4, 4), Image.Resampling.BOX), np.float32)
    return pixels.transpose(2, 0, 1) / 255


def _number(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:4], "big")
