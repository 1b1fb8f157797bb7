"""Worlds of images and texts: shapes, questions about them, emoji, fashion and letters."""

import gzip
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from embedcache.errors import SettingError, SourceError
from embedcache.sources import Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.uniperceiver.evaluation import answer_blindly
from pipelines.uniperceiver.examples import open_examples
from pipelines.uniperceiver.words import Vocabulary, list_words
from pipelines.worlds import easy_vqa, label_sets, shapes
from pipelines.worlds.examples import draw_examples, in_split, label_examples, make_examples
from pipelines.worlds.idx import read_idx
from pipelines.worlds.shapes import UNSEEN, ShapesSource, check_caption, write_statements
from pipelines.worlds.talking_recordings import RECORDINGS
from pipelines.worlds.texts import CLASSES, collect_words, frequent_words, load_descriptions

LOCATION = "seed=3,train=300,valid=30,test=40,unseen=60"


class TestShapes(SourceContract):
    @pytest.fixture
    def source(self) -> Source:
        return open_source("seed=3,train=5,valid=2,test=2,unseen=2", kind=shapes.KIND)


@pytest.fixture(scope="module")
def world() -> ShapesSource:
    source = open_source(LOCATION, kind=shapes.KIND)
    assert isinstance(source, ShapesSource)
    return source


@pytest.mark.slow
def test_unseen_pairs_are_absent_from_all_other_splits(world: ShapesSource) -> None:
    names = {f"{color} {shape}" for color, shape in UNSEEN}
    for sample in world.samples():
        objects = set(str(sample.columns["objects"]).split(","))
        mentioned = {name for name in names for text in sample.texts if name in text.text}
        assert mentioned == objects & names
        assert bool(mentioned) == (sample.columns["split"] == "unseen")
    labels = {sample.columns["label"] for sample in world.samples() if sample.columns["split"] == "unseen"} - {None}
    assert labels == set(shapes.unseen_class_names())
    assert len(set(shapes.class_names())) == 40
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


pytest.importorskip("easy_vqa")


class TestEasyVqa(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("3", kind=easy_vqa.KIND)


@pytest.fixture(scope="module")
def questions() -> pa.Table:
    return easy_vqa.load_questions()


def accuracy(answered: pa.Table, asked: pa.Table) -> float:
    texts = [text for table in (answered, asked) for name in ("text", "target") for text in table[name].to_pylist()]
    vocabulary = Vocabulary(list_words(texts))
    is_right_N = answer_blindly(open_examples(answered, vocabulary), open_examples(asked, vocabulary))
    return 100 * float(is_right_N.mean())


def test_numbers_are_those_published(questions: pa.Table) -> None:
    splits = Counter(sample.columns["split"] for sample in open_source("all", kind=easy_vqa.KIND).samples())
    assert splits == {
        "train": easy_vqa.NUM_IMAGES["train"] - easy_vqa.NUM_VALID,
        "valid": easy_vqa.NUM_VALID,
        "test": easy_vqa.NUM_IMAGES["test"],
    }
    assert len(in_split(questions, "train", "valid")) == 38_575
    assert len(in_split(questions, "test")) == 9_673
    answers = (easy_vqa._data_folder() / "answers.txt").read_text().split()
    assert len(answers) == 13
    assert set(questions["target"].to_pylist()) == set(answers)
    is_yes_no = pc.is_in(questions["kind"], pa.array(["yes-no", "negated"]))
    assert len(in_split(questions.filter(is_yes_no), "train", "valid")) == 28_407
    assert set(questions["kind"].to_pylist()) == set(easy_vqa.KINDS)


def test_no_image_is_in_two_splits() -> None:
    source = open_source("all", kind=easy_vqa.KIND)
    splits: dict[bytes, set[object]] = {}
    for sample in source.samples():
        splits.setdefault(source.read(sample.images[0]), set()).add(sample.columns["split"])
    assert len(splits) == sum(easy_vqa.NUM_IMAGES.values())
    assert all(len(names) == 1 for names in splits.values())


@pytest.mark.slow
def test_blind_baseline_is_that_published(questions: pa.Table) -> None:
    train, test = in_split(questions, "train", "valid"), in_split(questions, "test")
    assert accuracy(train, test) == pytest.approx(67.0, abs=0.01)
    opened = test.filter(pc.is_in(test["kind"], pa.array(easy_vqa.OPEN_KINDS)))
    assert accuracy(train, opened) == pytest.approx(23.3, abs=0.01)


@pytest.mark.slow
def test_draws_are_stratified_nested_and_seeded(questions: pa.Table) -> None:
    total = in_split(questions, "train", "valid").num_rows
    train = in_split(questions, "train")
    strata = Counter(zip(train["kind"].to_pylist(), train["target"].to_pylist(), strict=True))
    smaller: Counter[tuple[str, ...]] = Counter()
    for fraction in (0.01, 0.05, 0.2, 1.0):
        drawn = easy_vqa.draw_answers(questions, fraction, seed=0)
        assert drawn.num_rows == min(int(fraction * total), len(train))
        assert set(drawn["split"].to_pylist()) == {"train"}
        counts = Counter(zip(drawn["kind"].to_pylist(), drawn["target"].to_pylist(), strict=True))
        assert all(abs(counts[name] - strata[name] * len(drawn) / len(train)) < 2 for name in strata)
        rows = Counter(zip(*(drawn[name].to_pylist() for name in ("key", "text", "target")), strict=True))
        assert smaller <= rows
        smaller = rows
    one, again, other = (easy_vqa.draw_answers(questions, 0.01, seed=seed) for seed in (1, 1, 2))
    assert one.equals(again)
    assert not one.equals(other)


HAS_LETTERS = Path(RECORDINGS["klettres-us"].folders["LETTERS"]).parent.is_dir()

needs_fashion = pytest.mark.skipif(
    not label_sets.FASHION_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist"
)

needs_letters = pytest.mark.skipif(not HAS_LETTERS, reason="needs Debian's klettres-data")


class TestEmoji(SourceContract):
    @pytest.fixture
    def source(self) -> Source:
        return open_source("3", kind=label_sets.EMOJI_KIND)


@pytest.mark.slow
@needs_fashion
class TestFashion(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("3+2", kind=label_sets.FASHION_KIND)


@pytest.mark.slow
@needs_letters
class TestLetters(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("klettres-us", kind=label_sets.LETTERS_KIND)

    def test_each_letter_is_there_once(self, source: Source) -> None:
        samples = list(source.samples())
        assert [sample.columns["label"] for sample in samples] == list("abcdefghijklmnopqrstuvwxyz")
        assert source.read(samples[0].files["audio"][0])[:4] == b"RIFF"


@pytest.mark.slow
@needs_fashion
def test_fashion_has_words_as_labels_and_a_validation_part() -> None:
    examples = label_examples(open_source("100+50", kind=label_sets.FASHION_KIND))
    assert Counter(examples["split"].to_pylist()) == {"train": 90, "valid": 10, "test": 50}
    assert set(examples["target"].to_pylist()) == set(label_sets.FASHION_LABELS)
    drawn = label_sets.draw_labels(examples, 0.001, seed=0)  # of 60,000
    assert len(drawn) == 60
    assert set(drawn["split"].to_pylist()) == {"train"}
    assert len(label_sets.draw_labels(examples, 0.01, seed=0)) == 90  # all that are there


@pytest.mark.slow
def test_descriptions_do_not_name_what_is_to_be_found() -> None:
    descriptions = load_descriptions()
    texts = descriptions["text"].to_pylist()
    assert len(set(texts)) == len(texts) > 2500
    assert all(target not in text for text, target in zip(texts, descriptions["target"].to_pylist(), strict=True))
    counts = Counter(zip(descriptions["target"].to_pylist(), descriptions["split"].to_pylist(), strict=True))
    assert {name for name, _ in counts} == set(CLASSES)
    for name in CLASSES:
        total = sum(counts[name, part] for part in ("train", "valid", "test"))
        assert all(abs(counts[name, part] - total / 10) <= 1 for part in ("valid", "test"))
    assert descriptions.equals(load_descriptions())
    assert Counter(load_descriptions(max_per_class=10)["split"].to_pylist()) == {"train": 384, "valid": 48, "test": 48}


@pytest.mark.slow
def test_word_list_begins_with_the_words_of_the_texts() -> None:
    assert collect_words(["a red circle", "Red, or blue?"]) == ["red", "a", "blue", "circle", "or"]
    words = collect_words(["zzyzx red"], num_words=50)
    assert words[:2] == ["red", "zzyzx"]
    assert len(set(words)) == len(words) == 50
    assert words[2:] == [word for word in frequent_words() if word != "red"][:48]


def test_draw_keeps_fractions_of_strata() -> None:
    examples = make_examples(targets=["a"] * 60 + ["b"] * 30 + ["c"] * 10, columns={"kind": ["x", None] * 50})
    for count in (1, 10, 35, 100):
        drawn = draw_examples(examples, count, seed=0, by=("target", "kind"))
        found = Counter(drawn["target"].to_pylist())
        assert sum(found.values()) == count
        assert all(abs(found[name] - count * whole / 100) <= 2 for name, whole in (("a", 60), ("b", 30), ("c", 10)))
    assert draw_examples(examples, 100, seed=0).equals(examples)
    for count, message in ((101, "1 to 100 examples to draw, got 101"), (0, "got 0")):
        with pytest.raises(SettingError, match=message):
            draw_examples(examples, count, seed=0)


def test_idx_file_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">4B2I", 0, 0, 8, 2, 3, 2) + bytes(2**24)))
    tracemalloc.start()
    with pytest.raises(SourceError, match="expected a whole IDX file"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
