"""The world of colored shapes."""

import subprocess
import sys
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from embedcache.sources import FileItem, Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.worlds.shapes import (
    KIND,
    UNSEEN,
    ShapesSource,
    check_caption,
    class_names,
    unseen_class_names,
    write_statements,
)

LOCATION = "seed=3,train=300,valid=30,test=40,unseen=60"


class TestShapes(SourceContract):
    @pytest.fixture
    def source(self) -> Source:
        return open_source("seed=3,train=5,valid=2,test=2,unseen=2", kind=KIND)


@pytest.fixture(scope="module")
def world() -> ShapesSource:
    source = open_source(LOCATION, kind=KIND)
    assert isinstance(source, ShapesSource)
    return source


@pytest.mark.slow
def test_same_bytes_in_another_process() -> None:
    code = (
        "from hashlib import sha256; from embedcache.sources import open_source, FileItem\n"
        f"source = open_source('seed=3', kind={KIND!r})\n"
        "keys = ('train/00004', 'unseen/00007')\n"
        "print(*(sha256(source.read(FileItem(path=f'{key}.png'))).hexdigest() for key in keys))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    source = open_source("seed=3", kind=KIND)
    keys = ("train/00004", "unseen/00007")
    assert [sha256(source.read(FileItem(path=f"{key}.png"))).hexdigest() for key in keys] == other
    another = open_source("seed=4", kind=KIND).read(FileItem(path="train/00004.png"))
    assert sha256(another).hexdigest() != other[0]


@pytest.mark.slow
def test_unseen_pairs_are_absent_from_all_other_splits(world: ShapesSource) -> None:
    names = {f"{color} {shape}" for color, shape in UNSEEN}
    for sample in world.samples():
        objects = set(str(sample.columns["objects"]).split(","))
        mentioned = {name for name in names for text in sample.texts if name in text.text}
        assert mentioned == objects & names
        assert bool(mentioned) == (sample.columns["split"] == "unseen")
    labels = {sample.columns["label"] for sample in world.samples() if sample.columns["split"] == "unseen"} - {None}
    assert labels == set(unseen_class_names())
    assert len(set(class_names())) == 40
    # Each color and each shape is seen in training, so that an unseen pair can be composed.
    seen = {str(sample.columns["objects"]) for sample in world.samples() if sample.columns["split"] == "train"}
    assert all(any(word in objects for objects in seen) for color, shape in UNSEEN for word in (color, shape))


def test_captions_are_true_and_complete_and_of_no_other_image(world: ShapesSource) -> None:
    samples = list(world.samples())
    wrong = 0
    for sample, other in zip(samples, samples[7:] + samples[:7], strict=True):
        objects, elsewhere = (str(found.columns["objects"]).split(",") for found in (sample, other))
        texts = [text.text for text in sample.texts]
        assert len(texts) == len(set(texts)) >= 2
        assert all(check_caption(text, objects) == (True, True) for text in texts)
        wrong += all(check_caption(text, elsewhere) == (True, True) for text in texts)
    assert wrong <= len(samples) / 20


@pytest.mark.parametrize(("caption", "objects", "verdict"), [
    ("a red circle", "red circle", (True, True)),
    ("there is one red circle", "red circle", (True, True)),
    ("a red circle", "red circle,blue star", (True, False)),
    ("a blue circle", "red circle,blue star", (False, False)),
    ("a circle and a blue shape", "red circle,blue star", (True, True)),
    ("a red circle left of a blue star", "red circle,blue star", (True, True)),
    ("a red circle right of a blue star", "red circle,blue star", (False, False)),
    ("a red circle right of a blue star", "red circle,blue star,red circle", (True, False)),
    ("a blue star and a red circle", "red circle,blue star", (True, True)),
    ("two red circles", "red circle,blue star,red circle", (True, False)),
    ("two red circles left of a blue star", "red circle,blue star,red circle", (False, False)),
    ("two red circles", "red circle,red circle,red circle", (False, False)),
    ("one red circle", "red circle,red circle", (False, False)),
    ("a red circle and a red circle", "red circle", (False, False)),
    ("a red circle and a red circle", "red circle,red circle", (True, True)),
    ("three circles", "red circle,blue circle,red circle", (True, True)),
    ("two red circle", "red circle,red circle", (False, False)),
    ("a red circles", "red circle", (False, False)),
    ("circle red a", "red circle", (False, False)),
    ("", "red circle", (False, False)),
])  # fmt: skip
def test_checked_captions(caption: str, objects: str, verdict: tuple[bool, bool]) -> None:
    assert check_caption(caption, objects.split(",")) == verdict


def test_statements_are_true_of_what_is_present_and_absent() -> None:
    objects, negations = ["red circle", "blue star"], {"no", "not", "lacks", "absent", "false"}
    rng, found = np.random.default_rng(0), Counter[str]()
    for _ in range(200):
        statements = write_statements(objects, rng)
        words = [text.replace("_", word).split() for text, word in statements]
        are_present = [bool({"red", "circle", "blue", "star"} & set(statement)) for statement in words]
        assert are_present == [True] * 4 + [False] * 4
        assert [len(negations & set(statement)) % 2 == 0 for statement in words] == are_present
        found.update(word for _, word in statements)
    assert set(found) == {"a", "no", "contains", "lacks", "present", "absent", "true", "false"}
    assert abs(found["true"] - found["false"]) < 0.1 * found["true"]
