import json
from pathlib import Path

import pytest

from tests.cli.test_cli import embedcache
from tests.evaluate.test_probe import color, make_cache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of labeled pictures."""
    folder = tmp_path_factory.mktemp("probe")
    make_cache(folder, color)
    return folder


def test_a_probe_prints_its_figures_and_writes_them(folder: Path) -> None:
    words = ["--shots", "1,2", "--control", "--json", "figures.json", "--html", "page.html"]
    done = embedcache("evaluate", "probe", "cache", "--image", "open_toy/cls", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    for expected in ("6 classes; 81 train, 9 val, 30 test images", "logistic", "labels shuffled", "2 a class"):
        assert expected in done.stdout
    assert json.loads((folder / "figures.json").read_text())["dataset"] == "cache"
    assert "<svg" in (folder / "page.html").read_text()


def test_one_method_on_texts(folder: Path) -> None:
    done = embedcache("evaluate", "probe", "cache", "--text", "open_toy/mean", "--method", "ridge", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "ridge" in done.stdout
    assert "knn" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a probe looks at one feature"),
        (["--image", "open_toy/cls", "--method", "rigde"], "did you mean 'ridge'"),
        (["--image", "open_toy/cls", "--label", "lable"], "did you mean 'label'"),
        (["--image", "open_toy/cls", "--shots", "1,x"], "shots are numbers such as 1,2,4,8,16, and not 'x'"),
        (["--image", "open_toy/cls", "--shots", "99"], "99 shots are more than class"),
        (
            ["--image", "open_toy/cls", "--part", "val"],
            "hold out another part: --part test",
        ),
    ],
)
def test_a_mistake_is_one_line(folder: Path, words: list[str], message: str) -> None:
    done = embedcache("evaluate", "probe", "cache", *words, cwd=folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
