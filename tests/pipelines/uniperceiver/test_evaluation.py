"""Evaluation of tasks of one likelihood: metrics, controls, chance, captions and blind answers."""

from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError, FingerprintError
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.store.cache import Cache
from pipelines.uniperceiver.evaluation import BLIND, SHUFFLED, answer_blindly, evaluate_task
from pipelines.uniperceiver.examples import open_examples, open_media
from pipelines.uniperceiver.words import Vocabulary
from pipelines.worlds.examples import make_examples
from tests.pipelines.uniperceiver.cases import Squares, SquaresSource
from tests.toy import IMAGE

pytestmark = pytest.mark.slow


def test_captions_are_written_and_compared_with_those_of_the_item(squares: Squares, squares_run: Path) -> None:
    task, examples = squares.task("caption", "caption", "captions"), squares.valid["captions"]
    report = evaluate_task(squares_run, task, examples, seed=0, controls=[SHUFFLED])
    right = report.measures["caption accuracy"]
    assert examples.media is not None
    keys = examples.media.cache.samples["key"].to_pylist()
    references = dict(zip(keys, examples.targets.take(examples.target_N).to_pylist(), strict=True))
    assert [report.captions[key] == text for key, text in references.items()] == right.values_M.tolist()
    assert right.estimate().value > 0.7
    assert report.controls[SHUFFLED]["caption accuracy"].estimate().value < 0.4
    assert report.measures["word accuracy"].estimate().value > 0.9
    assert len(report.measures["word accuracy"].values_M) == 9 * len(examples)


def test_retrieval_counts_equal_captions_as_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    task = squares.task("retrieve", "retrieve", "captions")
    report = evaluate_task(squares_run, task, examples, seed=0, controls=[SHUFFLED])
    assert report.measures["text to item r@1"].estimate().value > 0.8
    assert len(report.measures["text to item r@1"].values_M) == len(np.unique(examples.target_N))
    assert report.chance["item to text r@1"] == pytest.approx(1 / len(np.unique(examples.target_N)))
    assert 0.05 < report.chance["text to item r@1"] < 0.2
    assert report.controls[SHUFFLED]["text to item r@1"].estimate().value < 0.5


def test_a_task_is_measured_that_was_never_trained(squares: Squares, squares_run: Path) -> None:
    task, examples = squares.task("answer", "answer"), squares.valid["answer"]
    is_left = np.arange(len(examples)) % 2 == 0
    report = evaluate_task(squares_run, task, examples, seed=0, controls=[SHUFFLED, BLIND], groups={"left": is_left})
    assert set(report.measures) == {"accuracy", "accuracy: left"}
    assert len(report.measures["accuracy: left"].values_M) == is_left.sum()
    assert set(report.controls) == {SHUFFLED, BLIND}
    assert report.chance == {"accuracy": 1 / 3}


def test_other_words_and_features_are_refused(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    others = open_examples(make_examples(texts=["a"], targets=["a"]), Vocabulary(["a"]))
    task = squares.task("answer", "answer")
    with pytest.raises(DataError, match="words of the run, got 1 words"):
        evaluate_task(squares_run, task, others, seed=0)
    settings = ExtractSettings(features=("patches",))
    extract(SquaresSource(3), tmp_path / "other", image_encoder=[f"{IMAGE},scale=2"], settings=settings)
    media = open_media(Cache(tmp_path / "other"), "image", "open_toy/patches")
    table = make_examples(keys=["0"], targets=["red red"])
    other = open_examples(table, squares.words.vocabulary, media=media)
    with pytest.raises(FingerprintError, match="weights"):
        evaluate_task(squares_run, squares.task("classify", "classify"), other, seed=0)


def test_blind_answers_are_the_most_frequent_of_each_text() -> None:
    words = Vocabulary(["color", "shape", "is", "red", "blue", "yes"])
    train = make_examples(
        texts=["color", "color", "color", "shape", "is red", "is red"],
        targets=["red", "blue", "blue", "red", "red", "blue"],
    )
    asked = make_examples(
        texts=["color", "color", "is red", "is", "is", "shape"],
        targets=["blue", "red", "red", "blue", "red", "yes"],
    )
    # "is red" has both once: the first in the table; "is" is new: the most frequent of all, red before blue.
    found = answer_blindly(open_examples(train, words), open_examples(asked, words))
    assert found.tolist() == [True, False, True, False, True, False]
