"""easy-VQA as published, its validation images, its draws and its blind baseline."""

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from embedcache.sources import Source, open_source
from embedcache.testing.sources import SourceContract
from pipelines.uniperceiver.evaluation import answer_blindly
from pipelines.uniperceiver.examples import open_examples
from pipelines.uniperceiver.words import Vocabulary, list_words
from pipelines.worlds.easy_vqa import (
    KIND,
    KINDS,
    NUM_IMAGES,
    NUM_VALID,
    OPEN_KINDS,
    _data_folder,
    draw_answers,
    load_questions,
)
from pipelines.worlds.examples import in_split

pytest.importorskip("easy_vqa")


class TestEasyVqa(SourceContract):
    has_texts = False

    @pytest.fixture
    def source(self) -> Source:
        return open_source("3", kind=KIND)


@pytest.fixture(scope="module")
def questions() -> pa.Table:
    return load_questions()


def accuracy(answered: pa.Table, asked: pa.Table) -> float:
    texts = [text for table in (answered, asked) for name in ("text", "target") for text in table[name].to_pylist()]
    vocabulary = Vocabulary(list_words(texts))
    is_right_N = answer_blindly(open_examples(answered, vocabulary), open_examples(asked, vocabulary))
    return 100 * float(is_right_N.mean())


def test_numbers_are_those_published(questions: pa.Table) -> None:
    splits = Counter(sample.columns["split"] for sample in open_source("all", kind=KIND).samples())
    assert splits == {
        "train": NUM_IMAGES["train"] - NUM_VALID,
        "valid": NUM_VALID,
        "test": NUM_IMAGES["test"],
    }
    assert len(in_split(questions, "train", "valid")) == 38_575
    assert len(in_split(questions, "test")) == 9_673
    answers = (_data_folder() / "answers.txt").read_text().split()
    assert len(answers) == 13
    assert set(questions["target"].to_pylist()) == set(answers)
    is_yes_no = pc.is_in(questions["kind"], pa.array(["yes-no", "negated"]))
    assert len(in_split(questions.filter(is_yes_no), "train", "valid")) == 28_407
    assert set(questions["kind"].to_pylist()) == set(KINDS)


def test_no_image_is_in_two_splits() -> None:
    source = open_source("all", kind=KIND)
    splits: dict[bytes, set[object]] = {}
    for sample in source.samples():
        splits.setdefault(source.read(sample.images[0]), set()).add(sample.columns["split"])
    assert len(splits) == sum(NUM_IMAGES.values())
    assert all(len(names) == 1 for names in splits.values())


@pytest.mark.slow
def test_blind_baseline_is_that_published(questions: pa.Table) -> None:
    train, test = in_split(questions, "train", "valid"), in_split(questions, "test")
    assert accuracy(train, test) == pytest.approx(67.0, abs=0.01)
    opened = test.filter(pc.is_in(test["kind"], pa.array(OPEN_KINDS)))
    assert accuracy(train, opened) == pytest.approx(23.3, abs=0.01)


@pytest.mark.slow
def test_draws_are_stratified_nested_and_seeded(questions: pa.Table) -> None:
    total = in_split(questions, "train", "valid").num_rows
    train = in_split(questions, "train")
    strata = Counter(zip(train["kind"].to_pylist(), train["target"].to_pylist(), strict=True))
    smaller: Counter[tuple[str, ...]] = Counter()
    for fraction in (0.01, 0.05, 0.2, 1.0):
        drawn = draw_answers(questions, fraction, seed=0)
        assert drawn.num_rows == min(int(fraction * total), len(train))
        assert set(drawn["split"].to_pylist()) == {"train"}
        counts = Counter(zip(drawn["kind"].to_pylist(), drawn["target"].to_pylist(), strict=True))
        assert all(abs(counts[name] - strata[name] * len(drawn) / len(train)) < 2 for name in strata)
        rows = Counter(zip(*(drawn[name].to_pylist() for name in ("key", "text", "target")), strict=True))
        assert smaller <= rows
        smaller = rows
    one, again, other = (draw_answers(questions, 0.01, seed=seed) for seed in (1, 1, 2))
    assert one.equals(again)
    assert not one.equals(other)
