"""Numbers that the settings of training declare, and settings that exclude each other."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import SettingError
from embedcache.train.settings import command_line, train_settings


@pytest.mark.parametrize(
    ("allowed", "refused", "word"),
    [
        ({"widths": (64, 256)}, {"widths": (64, 257)}, "widths"),
        ({"negatives": ("n",)}, {"negatives": ("n",), "mixup": 0.5}, "hard negatives"),
        ({"captions": "all"}, {"captions": "all", "mixup": 0.5}, "captions"),
    ],
)
def test_settings_that_exclude_each_other(allowed: dict[str, Any], refused: dict[str, Any], word: str) -> None:
    train_settings(allowed)
    with pytest.raises(SettingError, match=word):
        train_settings(refused)


def test_options_that_ask_for_settings() -> None:
    """Check that only values that differ from their defaults are asked for, one option per value."""
    options = {"seed": 3, "epochs": 2, "widths": (8, 16), "shuffle_pairs": True}
    asked = ["--widths", "8", "--widths", "16", "--epochs", "2", "--shuffle-pairs", "--seed", "3"]
    assert command_line(train_settings(options)) == asked
    assert command_line(train_settings({})) == ["--seed", "0"]


def test_paths_have_the_seed_of_the_run() -> None:
    settings = train_settings(
        {"seed": 7, "selection": "s-{seed}.txt", "negatives": ("a", "b{seed}"), "device": "cuda:1"}
    )
    assert settings.selection_path == Path("s-7.txt")
    assert settings.negatives_paths == [Path("a"), Path("b7")]
    assert settings.to_json()["machine"]["device"] == "cuda"
    assert settings.split.seed == 7
    assert train_settings({"seed": 7, "split_seed": 1}).split.seed == 1
    assert train_settings({}).selection_path is None
