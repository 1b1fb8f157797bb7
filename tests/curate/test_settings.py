"""Numbers that the settings of curation declare, and settings that exclude each other."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.curate.settings import (
    CoverageSettings,
    DedupSettings,
    LeakSettings,
    NegativesSettings,
    ScoreSettings,
    SelectSettings,
)
from embedcache.dataset.settings import SplitSettings
from embedcache.errors import SettingError


def test_limits_of_leaks_are_by_modality() -> None:
    assert LeakSettings().cosines == SplitSettings().cosines
    assert LeakSettings(cosines={"audio": 0.7}).cosines == {**SplitSettings().cosines, "audio": 0.7}


RUN, HEAD = Path("run"), Path("head.npy")


@pytest.mark.parametrize(
    ("kind", "allowed", "refused", "word"),
    [
        (CoverageSettings, {"modality": "text", "answers": "a"}, {"modality": "both", "answers": "a"}, "modality"),
        (CoverageSettings, {"modality": "both"}, {"modality": "both", "feature": "f"}, "modality"),
        (CoverageSettings, {"modality": "text", "language": "en"}, {"language": "en"}, "images"),
        (DedupSettings, {"copies_only": True}, {"copies_only": True, "cosine": 0.9}, "both"),
        (DedupSettings, {"cosine": 0.9}, {"copies_only": True, "cosine": 1.0}, "both"),
        (NegativesSettings, {"range_min": 10, "range_max": 13}, {"range_min": 10, "range_max": 12}, "13"),
        (NegativesSettings, {"run": RUN, "relative_margin": 0}, {"relative_margin": 0}, "relative_margin"),
        (ScoreSettings, {"weights": HEAD}, {}, "neither"),
        (ScoreSettings, {"prompts": ("a",)}, {"weights": HEAD, "prompts": ("a",)}, "both"),
        (ScoreSettings, {"prompts": (" a ",)}, {"prompts": ("a", " ")}, "empty"),
        (ScoreSettings, {"prompts": ("a",)}, {"prompts": ("a",), "negative": (" ",)}, "empty"),
        (ScoreSettings, {"weights": HEAD}, {"weights": HEAD, "negative": ("a",)}, "negative"),
        (
            ScoreSettings,
            {"weights": HEAD, "fold_layers": True},
            {"prompts": ("a",), "fold_layers": True},
            "fold_layers",
        ),
        (ScoreSettings, {"weights": HEAD, "normalize": False}, {"prompts": ("a",), "normalize": False}, "normalize"),
        (ScoreSettings, {"weights": HEAD}, {"weights": HEAD, "run": RUN, "normalize": False}, "normalize"),
        (ScoreSettings, {"prompts": ("a",), "column": "rows"}, {"prompts": ("a",), "column": "row"}, "'row'"),
        (ScoreSettings, {"prompts": ("a",)}, {"prompts": ("a",), "column": "key"}, "'key'"),
        (ScoreSettings, {"prompts": ("a",)}, {"prompts": ("a",), "column": ""}, "''"),
        (SelectSettings, {"budget": 1.0}, {"budget": 1.5}, "fraction"),
        (SelectSettings, {"budget": 2}, {"budget": 1.01}, "fraction"),
    ],
)
def test_settings_that_exclude_each_other(
    kind: type, allowed: dict[str, Any], refused: dict[str, Any], word: str
) -> None:
    kind(**allowed)
    with pytest.raises(SettingError, match=word):
        kind(**refused)


def test_ranks_to_consider() -> None:
    assert NegativesSettings(num_negatives=2, range_min=5).last_rank == 25
    assert NegativesSettings(num_negatives=2, range_min=5, range_max=9).last_rank == 9
