"""What a batch of a task contains: its candidates, pairs, masks and next words; and tasks that are refused."""

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
    assert len(batch.inputs["image"].values) == 13
    assert len(batch.targets.candidates.numbers_BL) == len(np.unique(examples.target_N))
    first, second = (positions.numpy() for positions in batch.targets.positives)
    texts = examples.targets.take(np.unique(examples.target_N)[second]).to_pylist()
    keys = squares.train["captions"].media.cache.samples["key"].take(batch.samples[first]).to_pylist()  # type: ignore[union-attr,index]
    assert texts == [f"a {left} square left of a {right} square" for left, right in map(colors_of, map(int, keys))]


def test_masks_hide_known_words_and_at_least_one(squares: Squares) -> None:
    task = squares.task("masked", "masked", "captions", masked=0.01)
    batch = task.load(squares.train["captions"], np.random.default_rng(0), device="cpu")
    assert batch.targets.words is not None
    assert (batch.targets.words.numbers_BL == BLANK).sum(dim=1).tolist() == [1] * len(squares.train["captions"])
    hidden = batch.targets.candidates.numbers_BL[batch.targets.positives[1], 0]
    assert hidden.min() >= NUM_SPECIAL
    found = batch.targets.words.numbers_BL.clone()
    found[found == BLANK] = hidden
    expected, _ = squares.train["captions"].target_words.take(squares.train["captions"].target_N).padded()
    assert found.numpy().tolist() == expected.tolist()


def test_candidates_of_captions_are_their_words_and_the_end(squares: Squares) -> None:
    examples, vocabulary = squares.train["captions"], squares.words.vocabulary
    batch = squares.task("caption", "caption", "captions").load(examples, None, device="cpu")
    found = batch.targets.candidates.numbers_BL[:, 0]
    assert found[0] == END
    assert {vocabulary.decode(np.array([number])) for number in found[1:].tolist()} == {
        word for text in examples.targets.to_pylist() for word in text.split()
    }
    assert len(found) < len(vocabulary)
    assert (batch.targets.positives[1] == 0).sum() == len(examples)


def test_words_that_are_no_candidates_are_not_trained_and_never_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    task = squares.task("caption", "caption", "captions", candidates=["a", "square", "left", "of", "red", "green"])
    trained = task.load(examples, np.random.default_rng(0), device="cpu")
    measured = task.load(examples, None, device="cpu")
    num_blue = sum(text.split().count("blue") for text in examples.targets.take(examples.target_N).to_pylist())
    assert num_blue
    assert (
        len(measured.targets.positives[1]) - len(trained.targets.positives[1])
        == num_blue
        == (measured.targets.positives[1] == -1).sum()
    )
    found = predict(task, load_shared(squares_run)[0], examples, device="cpu")
    assert not found.is_correct_M[found.target_M < 0].any()
