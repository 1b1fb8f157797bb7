"""easy-VQA: questions about images of one shape, from the PyPI package `easy-vqa` (Victor Zhou, MIT license).

    open_source("all", kind="pipelines.worlds.easy_vqa:EasyVqaSource")

The published split is kept: 4,000 images with 38,575 questions for training, 1,000 with 9,673 for testing. 400 of the
training images, always the same, are for validation. No test image equals a training image.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from embedcache.errors import ItemError, SettingError
from embedcache.modalities import FileItem, Sample
from embedcache.registry import require
from embedcache.sources.open import SourceSettings
from pipelines.worlds.examples import draw_examples, in_split, make_examples

KIND = "pipelines.worlds.easy_vqa:EasyVqaSource"
NUM_IMAGES: Mapping[str, int] = {"train": 4000, "test": 1000}
"""As published."""
NUM_VALID = 400
KINDS = ("yes-no", "negated", "color", "shape")
"""Kinds of questions: answered by yes or no, without and with a negation, by a color, or by a shape."""
OPEN_KINDS = ("color", "shape")
_SHAPES = frozenset({"circle", "rectangle", "triangle"})


class EasyVqaSource:
    """The images of easy-VQA, without their questions; column `split`: `train`, `valid` or `test`.

    The location is `all`, or the number of first images to keep of each published part.
    """

    def __init__(self, location: str, settings: SourceSettings) -> None:
        settings.check_supported("easy_vqa")
        if location != "all" and not location.isdecimal():
            raise SettingError(f"easy_vqa: expected all or a number of images per part, got {location!r}")
        self._max_images = None if location == "all" else int(location)
        self._folder = _data_folder()

    def describe(self) -> Mapping[str, Any]:
        """Return the description that reopens the source, with the version of the package."""
        path = "all" if self._max_images is None else str(self._max_images)
        return {"type": KIND, "path": path, "settings": {}, "versions": {"easy-vqa": version("easy-vqa")}}

    def samples(self) -> Iterator[Sample]:
        """Iterate over the images, training before test."""
        for part in NUM_IMAGES:
            numbers = sorted(int(path.stem) for path in (self._folder / part / "images").glob("*.png"))
            for number in numbers[: self._max_images]:
                yield Sample(
                    key=_key(part, number),
                    images=(FileItem(path=f"{part}/images/{number}.png"),),
                    columns={"split": _split(part, number)},
                )

    def read(self, item: FileItem) -> bytes:
        """Read an image: a PNG of 64 x 64 pixels."""
        try:
            return (self._folder / item.path).read_bytes()
        except OSError as error:
            raise ItemError(f"easy-VQA has no image {item.path}: {error.strerror}") from None


def load_questions(*, max_images: int | None = None) -> pa.Table:
    """Load all questions as examples, in the order of the package, with the columns `split` and `kind`.

    Args:
        max_images: keep only questions about the first images of each published part.
    """
    keys: list[str] = []
    texts: list[str] = []
    targets: list[str] = []
    splits: list[str] = []
    kinds: list[str] = []

    for part in NUM_IMAGES:
        for question, answer, number in json.loads((_data_folder() / part / "questions.json").read_text()):
            if max_images is None or number < max_images:
                keys.append(_key(part, number))
                texts.append(question)
                targets.append(answer)
                splits.append(_split(part, number))
                kinds.append(question_kind(question, answer))

    return make_examples(keys=keys, texts=texts, targets=targets, columns={"split": splits, "kind": kinds})


def question_kind(question: str, answer: str) -> str:
    """Return the kind of a question, one of `KINDS`."""
    if answer in {"yes", "no"}:
        return "negated" if {"not", "no"} & set(question.split()) else "yes-no"
    return "shape" if answer in _SHAPES else "color"


def draw_answers(questions: pa.Table, fraction: float, *, seed: int) -> pa.Table:
    """Draw a fraction of the training questions, stratified by kind and answer. 1 % are 385 questions.

    The fraction refers to all published training questions, but validation questions are not drawn. 1.0 returns all
    others. Draws with one seed are nested.

    Raises:
        SettingError: the fraction is not above 0, or is above 1.
    """
    if not 0 < fraction <= 1:
        raise SettingError(f"fraction: expected a number above 0, up to 1, got {fraction}")

    train = in_split(questions, "train")

    # The fraction is published as one of all training questions, validation included.
    total = len(in_split(questions, "train", "valid"))
    return draw_examples(train, min(len(train), max(1, int(fraction * total))), seed=seed, by=("kind", "target"))


def _key(part: str, number: int) -> str:
    return f"{part}/{number:04d}"


def _split(part: str, number: int) -> str:
    return "valid" if part == "train" and number in _validation_numbers() else part


@cache
def _validation_numbers() -> frozenset[int]:
    """Return the numbers of the validation images: the ones with the smallest checksums of keys."""
    numbers = range(NUM_IMAGES["train"])

    # A checksum, so that the choice needs no file and is the same everywhere.
    return frozenset(sorted(numbers, key=lambda number: zlib.crc32(_key("train", number).encode()))[:NUM_VALID])


def _data_folder() -> Path:
    return Path(str(require("easy_vqa", package="easy-vqa").__file__)).parent / "data"
