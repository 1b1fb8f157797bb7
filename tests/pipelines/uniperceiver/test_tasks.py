"""What a batch of a task contains: its candidates, pairs, masks and next words; and tasks that are refused."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError
from pipelines.uniperceiver import tasks
from pipelines.uniperceiver.evaluation import load_shared
from pipelines.uniperceiver.tasks import predict
from pipelines.uniperceiver.words import BLANK, END, NUM_SPECIAL, WordLists
from tests.pipelines.uniperceiver.cases import Squares, colors_of


def test_masks_of_validation_are_always_the_same(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.5)
    batches = [task.load(task.train, rng, device="cpu") for rng in (None, None, np.random.default_rng(0))]
    numbers = [batch.words.numbers_BL.tolist() for batch in batches if batch.words is not None]
    assert numbers[0] == numbers[1] == numbers[2]
    other = task.load(task.train, np.random.default_rng(1), device="cpu").words
    assert other is not None
    assert other.numbers_BL.tolist() != numbers[0]


def test_what_decides_the_batches_is_described(squares: Squares) -> None:
    task = squares.task("classify", "classify")
    described = dict(task.describe())
    assert described["candidates"] == sorted(task.train.targets.to_pylist())
    for name, value in {
        "weight": 2.0,
        "batch_size": 3,
        "max_candidates": 4,
        "masked": 0.5,
        "max_validation": 9,
    }.items():
        assert squares.task("classify", "classify", **{name: value}).describe() == {**described, name: value}
    assert squares.task("classify", "classify", candidates=["b", "a"]).describe()["candidates"] == ["b", "a"]
    others = squares.task("classify", "classify", train=squares.valid["classify"], candidates=described["candidates"])
    assert others.describe()["train"] != described["train"]


def test_targets_are_candidates_and_texts_have_one_blank(squares: Squares) -> None:
    task = squares.task("classify", "classify")
    one = squares.task("classify", "classify", candidates=task.train.targets.to_pylist()[1:])
    with pytest.raises(DataError, match="expected targets that are candidates"):
        one.load(one.train, None, device="cpu")
    examples = squares.train["texts"]
    assert examples.text_words is not None
    blanks = np.where(np.arange(len(examples.text_words.numbers_M)) < 2, BLANK, examples.text_words.numbers_M)
    two = replace(examples, text_words=WordLists(blanks, examples.text_words.offsets_N))
    with pytest.raises(DataError, match="at most one blank"):
        squares.task("texts", "answer").load(two, None, device="cpu")
    squares.task("masked", "masked", "texts").load(two, None, device="cpu")  # its texts are not read


def test_next_words_follow_each_prefix(squares: Squares) -> None:
    task = squares.task("caption", "caption", "captions")
    texts = task.train.target_words.take(np.array([0, 1]))
    for is_training in (True, False):
        places, is_read = task._next_words(texts, is_training=is_training)
        numbers = task.candidate_words.numbers_M[places].tolist()
        ends = texts.offsets_N.tolist()
        words = [texts.numbers_M[start:stop].tolist() for start, stop in itertools.pairwise(ends)]
        assert numbers == [number for text in words for number in [*text, END]]
        assert is_read.sum(axis=1).tolist() == [len(text) + 1 for text in words]


def test_masks_of_about_a_fraction_of_the_words(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.5)
    texts = task.train.target_words.take(np.repeat(task.train.target_N, 4))
    masked, places = task._mask(texts, np.random.default_rng(0))
    is_blank = masked.numbers_M == BLANK
    assert 0.4 < is_blank.mean() < 0.6
    assert task.candidate_words.numbers_M[places].tolist() == texts.numbers_M[is_blank].tolist()
    assert (masked.numbers_M[~is_blank] == texts.numbers_M[~is_blank]).all()
    assert masked.offsets_N.tolist() == texts.offsets_N.tolist()
    some = squares.task("masked", "masked", "captions", candidates=["red"])
    hidden, places = some._mask(texts, np.random.default_rng(0))
    red = squares.words.vocabulary.encode(["red"]).numbers_M[0]
    assert set(texts.numbers_M[hidden.numbers_M == BLANK].tolist()) == {red}  # never what is no candidate
    assert red >= NUM_SPECIAL


@pytest.mark.slow
def test_blocks_do_not_change_predictions(squares: Squares, squares_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = load_shared(squares_run)
    task = squares.task("masked", "masked", "captions")
    whole = predict(task, network, squares.valid["captions"], device="cpu")
    assert whole.example_M.max() == len(squares.valid["captions"]) - 1
    assert (np.diff(whole.example_M) >= 0).all()
    monkeypatch.setattr(tasks, "_BLOCK_ROWS", 30)
    few = predict(task, network, squares.valid["captions"], device="cpu")
    assert len(few.predicted_M) == len(few.target_M) == len(few.example_M)
    assert few.is_correct_M.tolist() == (few.predicted_M == few.target_M).tolist()


def test_pairs_of_a_batch_count_equal_texts_and_items_once(squares: Squares) -> None:
    examples = squares.train["captions"].take(np.array([0, 1, 2, 0, *range(10, 20)]))
    batch = squares.task("retrieve", "retrieve", "captions").load(examples, None, device="cpu")
    assert len(batch.tokens["image"].values_BTD) == 13
    assert len(batch.candidates.numbers_BL) == len(np.unique(examples.target_N))
    first, second = (positions.numpy() for positions in batch.positives)
    texts = examples.targets.take(np.unique(examples.target_N)[second]).to_pylist()
    keys = squares.train["captions"].media.cache.samples["key"].take(batch.rows[first]).to_pylist()  # type: ignore[union-attr,index]
    assert texts == [f"a {left} square left of a {right} square" for left, right in map(colors_of, map(int, keys))]


def test_masks_hide_known_words_and_at_least_one(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.01)
    batch = task.load(squares.train["captions"], np.random.default_rng(0), device="cpu")
    assert batch.words is not None
    assert (batch.words.numbers_BL == BLANK).sum(dim=1).tolist() == [1] * len(squares.train["captions"])
    hidden = batch.candidates.numbers_BL[batch.positives[1], 0]
    assert hidden.min() >= NUM_SPECIAL
    found = batch.words.numbers_BL.clone()
    found[found == BLANK] = hidden
    expected, _ = squares.train["captions"].target_words.take(squares.train["captions"].target_N).padded()
    assert found.numpy().tolist() == expected.tolist()


def test_candidates_of_captions_are_their_words_and_the_end(squares: Squares) -> None:
    examples, vocabulary = squares.train["captions"], squares.words.vocabulary
    batch = squares.task("caption", "caption", "captions").load(examples, None, device="cpu")
    found = batch.candidates.numbers_BL[:, 0]
    assert found[0] == END
    assert {vocabulary.decode(np.array([number])) for number in found[1:].tolist()} == {
        word for text in examples.targets.to_pylist() for word in text.split()
    }
    assert len(found) < len(vocabulary)
    assert (batch.positives[1] == 0).sum() == len(examples)


def test_words_that_are_no_candidates_are_not_trained_and_never_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    task = squares.task("caption", "caption", "captions", candidates=["a", "square", "left", "of", "red", "green"])
    trained = task.load(examples, np.random.default_rng(0), device="cpu")
    measured = task.load(examples, None, device="cpu")
    num_blue = sum(text.split().count("blue") for text in examples.targets.take(examples.target_N).to_pylist())
    assert num_blue
    assert len(measured.positives[1]) - len(trained.positives[1]) == num_blue == (measured.positives[1] == -1).sum()
    found = predict(task, load_shared(squares_run)[0], examples, device="cpu")
    assert not found.is_correct_M[found.target_M < 0].any()
