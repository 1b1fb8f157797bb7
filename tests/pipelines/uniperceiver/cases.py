"""Colored squares: caches of tiny images with true captions and questions, and of the words of all texts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.modalities import FileItem, Sample, TextItem
from embedcache.settings import from_flat
from embedcache.sources.open import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from pipelines.uniperceiver.examples import TaskExamples, WordTable, open_examples, open_media, open_word_table
from pipelines.uniperceiver.tasks import ExampleTask, Kind
from pipelines.uniperceiver.training import Recipe, train_multitask
from pipelines.uniperceiver.words import Vocabulary, list_words
from pipelines.worlds.examples import make_examples
from tests.media_files import tone, wav
from tests.media_toy import MEDIA
from tests.toy import IMAGE, TEXT

COLORS: Mapping[str, tuple[int, int, int]] = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PLACES = ("left", "right")
IMAGE_TOKENS, TONE_TOKENS, WORD_VECTORS = "open_toy/patches", "open_media/frames", "open_toy/mean"
MODEL: Mapping[str, Any] = {"width": 32, "num_layers": 2, "num_heads": 2, "feed_forward": 64}


class SquaresSource:
    """Images whose halves have colors; the caption names both, from the left or from the right."""

    def __init__(self, count: int, *, first: int = 0) -> None:
        self._numbers = range(first, first + count)

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.pipelines.uniperceiver.cases:SquaresSource", "path": "", "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for number in self._numbers:
            left, right = colors_of(number)
            caption = TextItem(text=f"a {left} square left of a {right} square")
            size = len(self.read(FileItem(path=f"{number}.png", length=0)))
            yield Sample(
                key=str(number),
                texts=(caption,),
                images=(FileItem(path=f"{number}.png", length=size),),
                columns={"split": "train"},
            )

    def read(self, item: FileItem) -> bytes:
        pixels = np.zeros((8, 8, 3), np.uint8)
        left, right = colors_of(int(item.path.partition(".")[0]))
        pixels[:, :4], pixels[:, 4:] = COLORS[left], COLORS[right]
        encoded = BytesIO()
        Image.fromarray(pixels).save(encoded, "png")
        return encoded.getvalue()


class TonesSource:
    """Recordings of tones, whose pitch has a color."""

    def __init__(self, count: int) -> None:
        self._count = count

    def describe(self) -> Mapping[str, Any]:
        return {"type": "tests.pipelines.uniperceiver.cases:TonesSource", "path": "", "settings": {}}

    def samples(self) -> Iterator[Sample]:
        for number in range(self._count):
            item = FileItem(path=f"{number}.wav", length=0)
            yield Sample(key=str(number), files={"audio": (replace(item, length=len(self.read(item))),)})

    def read(self, item: FileItem) -> bytes:
        number = int(item.path.partition(".")[0])
        return wav(tone(0.1 + 0.02 * (number // 3 % 4), 300.0 * 3 ** (number % 3)))


def open_tones(path: Path, vocabulary: Vocabulary) -> TaskExamples:
    """Extract tones, and return examples whose target is the color of each."""
    if not path.exists():
        settings = ExtractSettings(features=("frames",))
        extract(TonesSource(36), path, encoder={"audio": [MEDIA]}, settings=settings)
    colors = [list(COLORS)[number % 3] for number in range(36)]
    table = make_examples(keys=[str(number) for number in range(36)], targets=colors)
    return open_examples(table, vocabulary, media=open_media(Cache(path), "audio", TONE_TOKENS))


def colors_of(number: int) -> tuple[str, str]:
    """Return the colors of the left and of the right half of an image."""
    left, right = np.random.default_rng(number).integers(len(COLORS), size=2)
    names = list(COLORS)
    return names[left], names[right]


def tables(cache: Cache) -> dict[str, pa.Table]:
    """Return the examples of each kind of task."""
    keys = cache.samples["key"].to_pylist()
    sides = [colors_of(int(key)) for key in keys]
    asked = np.array([int(key) % 2 for key in keys])
    captions = [f"a {left} square left of a {right} square" for left, right in sides]
    return {
        "classify": make_examples(keys=keys, targets=[f"{left} {right}" for left, right in sides]),
        "answer": make_examples(
            keys=keys,
            texts=[f"what color is the {PLACES[side]} square?" for side in asked],
            targets=[pair[side] for pair, side in zip(sides, asked, strict=True)],
        ),
        "captions": make_examples(keys=keys, targets=captions),
        "texts": make_examples(texts=[f"a {left} square _" for left, _ in sides], targets=[left for left, _ in sides]),
    }


def make_caches(folder: Path) -> tuple[Path, Path, Path]:
    """Extract training images, validation images and the words of all texts."""
    paths = folder / "train", folder / "valid", folder / "words"
    for path, (count, first) in zip(paths[:2], ((60, 0), (30, 1000)), strict=True):
        settings = ExtractSettings(features=("patches",))
        extract(SquaresSource(count, first=first), path, image_encoder=[IMAGE], settings=settings)
    columns = [table[name] for table in tables(Cache(paths[0])).values() for name in ("text", "target")]
    texts = [text for column in columns for text in column.to_pylist() if text is not None]
    (folder / "words.txt").write_text("\n".join(list_words(texts)) + "\n")
    source = open_source(str(folder / "words.txt"), kind="texts")
    extract(source, paths[2], text_encoder=[TEXT], settings=ExtractSettings(features=("mean",)))
    return paths


@dataclass(frozen=True)
class Squares:
    """The opened caches, and the examples of each table for training and for validation."""

    words: WordTable
    train: Mapping[str, TaskExamples]
    valid: Mapping[str, TaskExamples]

    def task(self, name: str, kind: Kind, table: str | None = None, **options: Any) -> ExampleTask:
        """Return a task on one of the tables; its own name is that of the kind unless given."""
        examples = {"train": self.train[table or name], "validation": self.valid[table or name]}
        return ExampleTask(**{"name": name, "kind": kind, "batch_size": 32, **examples, **options})


def open_caches(paths: tuple[Path, Path, Path]) -> Squares:
    """Open the caches of `make_caches`."""
    words = open_word_table(Cache(paths[2]), WORD_VECTORS)
    opened = []
    for path in paths[:2]:
        media = open_media(Cache(path), "image", IMAGE_TOKENS)
        opened.append(
            {
                name: open_examples(table, words.vocabulary, media=None if name == "texts" else media)
                for name, table in tables(Cache(path)).items()
            }
        )
    return Squares(words, *opened)


def recipe(**options: Any) -> Recipe:
    """Return a recipe for a small network and short epochs."""
    return Recipe(**{"model": MODEL, "steps_per_epoch": 20, **options})


def fit_settings(**options: Any) -> FitSettings:
    """Return settings of a short training on one thread."""
    return from_flat(FitSettings, {"epochs": 2, "lr": 3e-3, "threads": 1, **options})


def train_together(squares: Squares, path: Path) -> Path:
    """Train classes, retrieval, captions and masked words together."""
    tasks = [
        squares.task("classify", "classify", weight=0.5),
        squares.task("retrieve", "retrieve", "captions"),
        squares.task("caption", "caption", "captions"),
        squares.task("masked", "masked", "captions"),
    ]
    train_multitask(tasks, squares.words, path, recipe(steps_per_epoch=100), fit_settings(lr=7e-3))
    return path
