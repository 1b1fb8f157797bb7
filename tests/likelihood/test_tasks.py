"""Files of tasks: what they say, which examples are of which part, and hard negatives by FAISS."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedcache.dataset.splits import Split
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.likelihood.tasks import TASK_OPTIONS, TaskFile, mine_candidates, open_task, parts_of, read_task_file
from embedcache.networks.words import list_words
from embedcache.store.cache import Cache
from embedcache.train.likelihood_tasks import ExampleTask
from tests.train.likelihood_cases import Squares


def write(folder: Path, text: str) -> Path:
    path = folder / "tasks.toml"
    path.write_text(text)
    return path


def test_a_table_has_options_of_both_kinds(tmp_path: Path) -> None:
    first, second = read_task_file(
        write(tmp_path, "[b]\nkind = 'answer'\ncandidates = ['x', 'y']\nweight = 2\n[a]\nkind = 'caption'\nmined = 3\n")
    )
    assert (first.name, first.table.kind, first.table.candidates, first.options) == (
        "b",
        "answer",
        ("x", "y"),
        {"weight": 2},
    )
    assert (second.name, second.table.mined, second.table.examples) == ("a", 3, None)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", SettingError, "one table per task, such as .color., got an empty file"),
        ("kind = 'answer'", SettingError, "got 'kind'"),
        ("[a", SettingError, "expected TOML, got an error"),
        ("[a]\nweight = 1", SettingError, "a: kind: expected one of classify"),
        ("[a]\nkind = 'answr'", SettingError, "a: kind: expected one of classify, .* got 'answr'"),
        ("[a]\nkind = 'answer'\nweigth = 1", UnknownNameError, "did you mean 'weight'"),
        ("[a]\nkind = 'answer'\nexamples = 3", SettingError, "a: examples: expected a text, got 3"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_task_file(write(tmp_path, text))
    with pytest.raises(PathError, match=r"none\.toml"):
        read_task_file(tmp_path / "none.toml")


def test_parts_are_those_of_the_table_or_else_of_the_samples(tmp_path: Path) -> None:
    (task,) = read_task_file(write(tmp_path, "[a]\nkind = 'answer'"))
    split = Split(keys=["0", "1", "2"], parts=["train", "", "test"], groups=[0, 1, 2])
    table = pa.table({"key": ["2", "0", "x", "1"], "target": ["a"] * 4})
    assert parts_of(task, table, split).to_pylist() == ["test", "train", "", ""]
    assert parts_of(task, table, None).to_pylist() == [""] * 4
    own = table.append_column("split", pa.array(["Validation", None, "train", "other"]))
    assert parts_of(task, own, split).to_pylist() == ["val", "", "train", ""]


def test_every_option_is_in_the_how_to() -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "likelihood.md").read_text()
    assert not [name for name in TASK_OPTIONS if f"`{name}`" not in page]


def test_tasks_are_named_in_errors(squares: Squares, squares_paths: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file = TaskFile(write(tmp_path, "[told]\nkind = 'caption'"), Cache(squares_paths[0]))
    with pytest.raises(DataError, match="told: examples: expected some of the part train, got none among 60"):
        open_task(file, file.tasks[0], squares.words, None)


def has_nearest(task: ExampleTask, squares: Squares, number: int, others: set[int]) -> bool:
    """Whether one of the candidates that are nearest to a candidate is among others."""
    vectors = squares.words.average(task.mined_texts)
    cosines = vectors @ vectors[number]
    cosines[number] = -np.inf
    return max(cosines[other] for other in others) > cosines.max() - 1e-5


def test_candidates_near_the_positives_are_in_each_batch(squares: Squares) -> None:
    names = [f"{left} {right}" for left in ("red", "green", "blue") for right in ("green", "red", "blue", "square")]
    task = squares.task("classify", "classify", candidates=names, max_candidates=4, batch_size=2)
    mined = mine_candidates(task, squares.words, 1)
    words = task.candidate_words.padded()[0].tolist()
    for seed in range(20):
        batch = mined.draw(np.random.default_rng(seed), device="cpu")
        assert batch.log_weights_C is not None
        numbers = [words.index(row) for row in batch.candidates.numbers_BL.tolist()]
        positives = {numbers[place] for place in batch.positives[1].tolist()}
        kept = {number for number, weight in zip(numbers, batch.log_weights_C.tolist(), strict=True) if not weight}
        assert positives <= kept
        assert len(positives) <= len(kept) <= 2 * len(positives)
        assert all(has_nearest(mined, squares, number, kept) for number in positives)
    assert mined.describe()["mined"]["k"] == 1  # type: ignore[index]
    assert "mined" not in task.describe()


def test_a_batch_of_retrieval_has_the_nearest_texts(squares: Squares) -> None:
    task = squares.task("retrieve", "retrieve", "captions", batch_size=8)
    mined = mine_candidates(task, squares.words, 3)
    texts = {tuple(row): number for number, row in enumerate(task.train.target_words.padded()[0].tolist())}
    for seed in range(5):
        batch = mined.draw(np.random.default_rng(seed), device="cpu")
        numbers = {texts[tuple(row)] for row in batch.candidates.numbers_BL.tolist()}
        assert sum(has_nearest(mined, squares, number, numbers) for number in numbers) >= 2
        again = mined.draw(np.random.default_rng(seed), device="cpu")
        assert again.rows is not None
        assert batch.rows is not None
        assert again.rows.tolist() == batch.rows.tolist()
        assert len(batch.positives[0]) <= 8


def test_vectors_of_candidates_are_the_means_of_their_words(squares: Squares) -> None:
    vocabulary = squares.words.vocabulary
    found = squares.words.average(vocabulary.encode(["red", "red blue", "nothing known", "blue red"]))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found[1], found[3], atol=1e-6)
    unit = squares.words.average(vocabulary.encode(["red", "blue"]))
    np.testing.assert_allclose(found[1], unit.sum(axis=0) / np.linalg.norm(unit.sum(axis=0)), atol=1e-3)
    assert list_words(["red"]) == ["red"]


def test_vectors_of_other_candidates_are_refused(squares: Squares) -> None:
    mined = mine_candidates(squares.task("answer", "answer"), squares.words, 1).mined
    with pytest.raises(SettingError, match="mined: expected vectors of 9 candidates, got 3"):
        squares.task("classify", "classify", mined=mined)
