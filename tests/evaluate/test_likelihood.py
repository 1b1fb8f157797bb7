"""Evaluation of tasks of one likelihood: metrics, controls, chance, captions and blind answers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedcache.errors import DataError, FingerprintError, SettingError
from embedcache.evaluate.likelihood import (
    BLIND,
    SHUFFLED,
    CaptionSettings,
    answer_blindly,
    estimate_runs,
    evaluate_task,
    represent,
)
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.networks.words import Vocabulary
from embedcache.store.cache import Cache
from embedcache.train.examples import open_examples, open_media
from tests.toy import IMAGE
from tests.train.likelihood_cases import Squares, SquaresSource, open_tones

pytestmark = pytest.mark.slow


def test_captions_are_written_and_compared_with_those_of_the_item(squares: Squares, squares_run: Path) -> None:
    task, examples = squares.task("caption", "caption", "captions"), squares.valid["captions"]
    report = evaluate_task(squares_run, task, examples, controls=[SHUFFLED])
    right = report.measures["caption accuracy"]
    assert examples.media is not None
    keys = examples.media.cache.samples["key"].to_pylist()
    references = dict(zip(keys, examples.targets.take(examples.target_N).to_pylist(), strict=True))
    assert [report.captions[key] == text for key, text in references.items()] == right.values_M.tolist()
    assert right.estimate().value > 0.7
    assert report.controls[SHUFFLED]["caption accuracy"].estimate().value < 0.4
    assert report.measures["word accuracy"].estimate().value > 0.9
    assert len(report.measures["word accuracy"].values_M) == 9 * len(examples)
    judged = evaluate_task(
        squares_run,
        task,
        examples,
        writing=CaptionSettings(beam=1, judge=lambda key, caption: key == "1003" and bool(caption)),
    )
    assert judged.measures["caption accuracy"].values_M.sum() == 1


def test_retrieval_counts_equal_captions_as_right(squares: Squares, squares_run: Path) -> None:
    examples = squares.valid["captions"]
    report = evaluate_task(squares_run, squares.task("retrieve", "retrieve", "captions"), examples)
    assert report.measures["text to item r@1"].estimate().value > 0.8
    assert len(report.measures["text to item r@1"].values_M) == len(np.unique(examples.target_N))
    assert report.chance["item to text r@1"] == pytest.approx(1 / len(np.unique(examples.target_N)))
    assert 0.05 < report.chance["text to item r@1"] < 0.2
    assert "r@1" in report.line()
    with pytest.raises(SettingError, match="expected none for the kind retrieve"):
        evaluate_task(squares_run, squares.task("retrieve", "retrieve", "captions"), examples, controls=[SHUFFLED])


def test_a_task_is_measured_that_was_never_trained(squares: Squares, squares_run: Path) -> None:
    task, examples = squares.task("answer", "answer", has_head=True), squares.valid["answer"]
    is_left = np.arange(len(examples)) % 2 == 0
    report = evaluate_task(squares_run, task, examples, controls=[SHUFFLED, BLIND], groups={"left": is_left})
    assert set(report.measures) == {"accuracy", "accuracy: left"}
    assert len(report.measures["accuracy: left"].values_M) == is_left.sum()
    assert set(report.controls) == {SHUFFLED, BLIND}
    assert report.chance == {"accuracy": 1 / 3}
    assert not report.was_seen
    assert evaluate_task(
        squares_run, squares.task("caption", "caption", "captions"), squares.train["captions"]
    ).was_seen
    assert represent(squares_run, task, examples).shape == (len(examples), 32)
    both = estimate_runs([report, report], "accuracy", control=BLIND)
    assert both.value == pytest.approx(report.controls[BLIND]["accuracy"].estimate().value)


def test_other_words_features_and_modalities_are_refused(squares: Squares, squares_run: Path, tmp_path: Path) -> None:
    others = open_examples(pa.table({"text": ["a"], "target": ["a"]}), Vocabulary(["a"]))
    task = squares.task("answer", "answer")
    with pytest.raises(DataError, match="words of the run, got 1 words"):
        evaluate_task(squares_run, task, others)
    tones = open_tones(tmp_path / "tones", squares.words.vocabulary)
    with pytest.raises(DataError, match="items of image, got audio"):
        evaluate_task(squares_run, squares.task("tones", "classify", "classify", train=tones), tones)
    settings = ExtractSettings(features=("patches",))
    extract(SquaresSource(3), tmp_path / "other", image_encoder=[f"{IMAGE},scale=2"], settings=settings)
    media = open_media(Cache(tmp_path / "other"), "image", "open_toy/patches")
    table = pa.table({"key": ["0"], "target": ["red red"]})
    other = open_examples(table, squares.words.vocabulary, media=media)
    with pytest.raises(FingerprintError, match="weights"):
        evaluate_task(squares_run, squares.task("classify", "classify"), other)
    with pytest.raises(DataError, match="same examples"):
        estimate_runs([], "accuracy")


def test_blind_answers_are_those_of_equal_texts_whatever_the_longest_text_is() -> None:
    words = Vocabulary(["what", "color", "is", "it", "red", "blue"])
    train = pa.table({"text": ["color", "what color is it", "what color is it"], "target": ["red", "blue", "blue"]})
    asked = pa.table({"text": ["color"], "target": ["red"]})
    assert answer_blindly(open_examples(train, words), open_examples(asked, words)).tolist() == [True]


def test_blind_answers_are_the_most_frequent_of_each_text() -> None:
    words = Vocabulary(["color", "shape", "is", "red", "blue", "yes"])
    train = open_examples(
        pa.table(
            {
                "text": ["color", "color", "color", "shape", "is red", "is red"],
                "target": ["red", "blue", "blue", "red", "red", "blue"],
            }
        ),
        words,
    )
    table = pa.table(
        {
            "text": ["color", "color", "is red", "is", "is", "shape"],
            "target": ["blue", "red", "red", "blue", "red", "yes"],
        }
    )
    # "is red" has both once: the first in the table; "is" is new: the most frequent of all, red before blue.
    assert answer_blindly(train, open_examples(table, words)).tolist() == [True, False, True, False, True, False]
