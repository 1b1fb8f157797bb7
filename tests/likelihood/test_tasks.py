"""Files of tasks: what they say, which examples are of which part, and hard negatives by FAISS."""

from pathlib import Path

import pyarrow as pa
import pytest

from embedcache.dataset.splits import Split
from embedcache.errors import DataError, PathError, SettingError, UnknownNameError
from embedcache.likelihood.tasks import TASK_OPTIONS, TaskFile, open_task, parts_of, read_task_file
from embedcache.store.cache import Cache
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
