"""The pipeline of one likelihood for every task: its results over seeds, and all of it from the data to its page."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from embedcache.errors import DataError
from embedcache.evaluate.likelihood import SHUFFLED, Measured
from pipelines.perceiver.results import (
    PRETRAINED,
    ZERO_SHOT,
    Result,
    Results,
    answer_table,
    answers_name,
    pretraining_table,
)
from pipelines.perceiver.runs import BLIND_ANSWERS, MEASURED, PROBES, TUNINGS, Runs, pool
from pipelines.perceiver.steps import Data
from pipelines.perceiver.tasks import TINY
from pipelines.worlds.label_sets import FASHION_FOLDER
from tests.pipelines.one_core import run_tiny
from tests.pipelines.test_texts import HAS_LETTERS


def make_result(model: str, question: str, num_right: int, *, seed: int = 0, first_item: int = 0) -> Result:
    """A result on ten examples, of which some are right, and none with items of others."""
    items = np.arange(first_item, first_item + 10)
    measures = {name: Measured(np.arange(10) < num_right, items) for name in ("accuracy", "accuracy: open")}
    wrong = {name: Measured(np.zeros(10, bool), items) for name in measures}
    return Result(
        model=model,
        question=question,
        seed=seed,
        num_examples=10,
        measures=measures,
        controls={SHUFFLED: wrong},
        chance={"accuracy": 0.25},
        captions={"test/00000": "a red circle"},
    )


def test_result_is_read_as_written(tmp_path: Path) -> None:
    result = make_result("prompts", answers_name(0.01), 4)
    result.write(tmp_path / "result.json")
    found = Result.read(tmp_path / "result.json")
    for measures, expected in [
        (found.measures, result.measures),
        (found.controls[SHUFFLED], result.controls[SHUFFLED]),
    ]:
        assert measures.keys() == expected.keys()
        for name, (values, clusters) in measures.items():
            np.testing.assert_array_equal(values, expected[name].values_M)
            np.testing.assert_array_equal(clusters, expected[name].clusters_M)
    plain = ("model", "question", "seed", "num_examples", "chance", "captions")
    assert all(getattr(found, name) == getattr(result, name) for name in plain)


def test_tables_hold_means_over_seeds_beside_controls() -> None:
    question = answers_name(0.01)
    assert question == "easy-VQA 1 %"
    results = Results(make_result("prompts", question, 4 + seed, seed=seed) for seed in (0, 2))
    columns, (row,) = answer_table(results, 0.01, ["prompts", "missing"])
    assert columns[:3] == ["accuracy in %", "all", "open"]
    assert row[0] == "prompts"
    assert row[2].startswith("50.0 [")
    assert row[3:5] == ["", ""]  # not measured
    assert row[5] == "0.0 [0.0, 0.0]"
    results = Results([make_result(PRETRAINED, "classes", 9)])
    (first, _) = pretraining_table(results, ["classes"])[1]
    assert first[0] == "classes: accuracy"
    assert first[1].startswith("90.0 [")
    assert first[2:] == ["items of others: 0.0", "25.0", "10"]


def test_seeds_are_compared_on_the_same_items() -> None:
    results = Results(make_result("prompts", "q", 4, seed=seed, first_item=seed) for seed in (0, 1))
    with pytest.raises(DataError, match="expected the same items for all seeds"):
        results.estimate("prompts", "q", "accuracy")
    with pytest.raises(DataError, match="expected a result of prompts on q, got 'blind'"):
        results.seeds("blind", "q")


@pytest.mark.slow
@pytest.mark.skipif(
    not (HAS_LETTERS and FASHION_FOLDER.is_dir() and importlib.util.find_spec("easy_vqa")),
    reason="needs easy-vqa and the packages of .ci/run",
)
def test_tiny_pipeline_writes_its_page_and_resumes(tmp_path: Path) -> None:
    run_tiny("uniperceiver", tmp_path)
    assert "What cannot be concluded" in (tmp_path / "uniperceiver.html").read_text()
    page = (tmp_path / "uniperceiver.md").read_text()
    results, (fraction,) = Results.read(tmp_path), TINY.fractions
    for question in MEASURED:
        (result,) = results.seeds(PRETRAINED, question)
        assert result.controls
        assert f"| {question}: " in page
    assert results.seeds(PRETRAINED, "captions")[0].captions
    assert results.models(answers_name(0)) == [ZERO_SHOT]
    assert set(results.models(answers_name(fraction))) == {*TUNINGS, *PROBES, *BLIND_ANSWERS}

    runs = Runs(folder=tmp_path / "seed0", data=Data(tmp_path), seed=0, size=TINY)
    questions, groups = runs.tables.questions()
    assert groups.keys() == {"open", "yes-no", "negated"}
    assert (np.stack(list(groups.values())).sum(axis=0) == 1).all()  # each question is of one kind
    task = runs.tables.answers(fraction, seed=0)
    rows = [np.unique(item.rows_N) for item in (task.train, task.validation, questions) if item.rows_N is not None]
    assert len(rows) == 3
    assert len(np.unique(np.concatenate(rows))) == sum(map(len, rows))  # no image is in two of them
    check_pooled(runs)

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in {".json", ".safetensors"}}
    run_tiny("uniperceiver", tmp_path)
    kept = {path for path in made if path.stat().st_mtime_ns == made[path] and "seed0" in path.parts}
    assert kept == {path for path in made if "seed0" in path.parts}


def check_pooled(runs: Runs) -> None:
    """What the linear probe reads are means of tokens and of words, each of length 1."""
    questions, _ = runs.tables.questions()
    number = len(questions) - 1
    assert questions.media is not None
    assert questions.rows_N is not None
    assert questions.text_words is not None
    tokens = questions.media.read(questions.rows_N[[number]]).values[0].astype(np.float32)
    table = runs.tables.words
    text = table.vocabulary.decode(questions.text_words.take(np.array([number])).numbers_M)
    words = [table.vocabulary.words.index(word) for word in text.split()]
    vectors = np.asarray(table.vectors_VD, np.float32)
    parts = [tokens.mean(axis=0), vectors[words].mean(axis=0)]
    expected = np.concatenate([part / np.linalg.norm(part) for part in parts])
    np.testing.assert_allclose(pool(questions, vectors)[number], expected, atol=1e-5)
