"""Datasets of a Hugging Face Hub, by name and by URL, and a Hub that is down."""

import os
import re
from typing import Any

import pytest

from tests.crash import call_elsewhere
from tests.sources.hub import ask

FAILURES = {
    "hf:org/name": "Config name is missing.*'en', 'de'",
    "hf:org/name[fr]": "Config name is missing.*'en', 'de'",
    "hf:org/name[en][val]": "Unknown split .val.",
    "hf:org/name[de]@v9": "no such revision",
    "hf:org/none": "no such repository, or a private one",
    "hf:org/name[en][test+test]": "expected each split once",
    "hf:org/name[en": "no name of a dataset",
    "hf://datasets/org/name/nothing.parquet": "does not exist",
}
DOWN = [
    "extract hf://datasets/org/name/de/train.parquet c --text-encoder tests.toy:open_toy",
    "extract hf://datasets/org/name c --text-encoder tests.toy:open_toy",
    "extract hf:org/name[en] c --text-encoder tests.toy:open_toy",
    "extract words.txt words --text-encoder hf:org/model",
    "extract words.txt words --text-encoder st:org/model",
    "inspect hf://datasets/org/cache",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "words.txt").write_text("a\nb\n")
    up = ["hf:org/name[de]@v1", "hf:org/name[en][train[:2]+test]", "huggingface:org/name[en][test]"]
    up += ["hf://datasets/org/name@v1/de/train.parquet", "hf://datasets/org/name/en", *FAILURES]
    return call_elsewhere(ask, folder, up, DOWN, environment={**os.environ, "HF_HOME": str(folder / "home")})


@pytest.mark.slow
def test_config_split_and_revision(found: dict[str, Any]) -> None:
    assert found["hf:org/name[de]@v1"] == [["train/0", "old", {"split": "train"}]]
    assert [(key, text) for key, text, _ in found["hf:org/name[en][train[:2]+test]"]] == [
        ("train/0", "a"), ("train/1", "b"), ("test/0", "d"),
    ]  # fmt: skip
    assert found["huggingface:org/name[en][test]"] == [["test/0", "d", {"split": "test"}]]


@pytest.mark.slow
def test_urls_of_the_hub(found: dict[str, Any]) -> None:
    assert [text for _, text, _ in found["hf://datasets/org/name@v1/de/train.parquet"]] == ["old"]
    assert sorted(text for _, text, _ in found["hf://datasets/org/name/en"]) == ["a", "b", "c", "d"]


@pytest.mark.slow
@pytest.mark.parametrize("location", FAILURES)
def test_what_the_hub_lacks_is_an_error(found: dict[str, Any], location: str) -> None:
    assert re.search(FAILURES[location], found[location]), found[location]


@pytest.mark.slow
@pytest.mark.parametrize("command", DOWN)
def test_a_hub_that_is_down_is_one_line(found: dict[str, Any], command: str) -> None:
    code, printed = found[command]
    last = printed.strip().splitlines()[-1]
    assert (code, "Traceback" in printed) == (1, False), printed
    assert last.startswith("error: ")
    assert "Connection refused" in last
