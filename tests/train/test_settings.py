"""Numbers that the settings of training declare, and settings that exclude each other."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.errors import SettingError
from embedcache.train.settings import command_line, train_settings
from tests.declared import declared_numbers


def test_numbers_are_declared_as_documented() -> None:
    assert declared_numbers("embedcache.train.settings") == {
        "ModelSettings": [
            "shared_width 256 [1, 65536]",
            "shrinkage 1.0 (0, inf)",
            "dropout 0.1 [0, 1)",
        ],
        "OptimizerSettings": [
            "epochs 30 [0, 1000000]",
            "batch_size None [2, inf)",
            "lr 0.001 (0, inf)",
            "weight_decay 0.02 [0, inf)",
            "warmup_fraction 0.1 [0, 1]",
            "max_grad_norm 1.0 (0, inf)",
            "patience None [1, inf)",
        ],
        "LossSettings": [
            "temperature None [0.001, 0.5]",
            "mixup 0.0 [0, inf)",
            "structure 0.0 [0, inf)",
            "widths () [1, inf)",
        ],
        "MachineSettings": [
            "threads None [1, 1024]",
            "memory 4294967296 (0, inf)",
            "checkpoint_s 60.0 [0, inf)",
        ],
        "FitSettings": [
            "seed 0 [0, 4294967296)",
        ],
        "TrainSettings": [
            "num_negatives 1 [1, inf)",
            "block_rows None [1, inf)",
            "seed 0 [0, 4294967296)",
        ],
    }


@pytest.mark.parametrize(
    ("allowed", "refused", "message"),
    [
        (
            {"widths": (64, 256)},
            {"widths": (64, 257)},
            "widths: expected at most the width of the shared space, 256, got 257",
        ),
        ({"negatives": ("n",)}, {"negatives": ("n",), "mixup": 0.5}, "mixup: expected 0 with hard negatives, got 0.5"),
        (
            {"captions": "all"},
            {"captions": "all", "mixup": 0.5},
            "got all: mixup .* captions; use captions=draw or mixup=0",
        ),
    ],
)
def test_settings_that_exclude_each_other(allowed: dict[str, Any], refused: dict[str, Any], message: str) -> None:
    train_settings(allowed)
    with pytest.raises(SettingError, match=message):
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
