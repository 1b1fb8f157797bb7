"""Numbers that the settings of curation declare, and settings that exclude each other."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.curate.select.settings import SelectSettings
from embedcache.curate.settings import (
    CoverageSettings,
    DedupSettings,
    LeakSettings,
    NegativesSettings,
    ScoreSettings,
)
from embedcache.errors import SettingError


def test_limits_of_leaks_are_by_modality() -> None:
    settings = LeakSettings(image_cosine=0.9, text_cosine=0.8, other_cosine=0.7)
    assert [settings.cosine(name) for name in ("image", "text", "audio", "video", "points")] == [0.9, 0.8, *[0.7] * 3]
    assert LeakSettings().cosine("audio") is None


RUN, HEAD = Path("run"), Path("head.npy")


@pytest.mark.parametrize(
    ("kind", "allowed", "refused", "message"),
    [
        (
            CoverageSettings,
            {"modality": "text", "answers": "a.json"},
            {"modality": "both", "answers": "a.json"},
            "modality: expected",
        ),
        (CoverageSettings, {"modality": "both"}, {"modality": "both", "feature": "f"}, "modality: expected"),
        (CoverageSettings, {"modality": "text", "language": "en"}, {"language": "en"}, "got images, which have none"),
        (DedupSettings, {"copies_only": True}, {"copies_only": True, "cosine": 0.9}, "expected --cosine or --copies"),
        (DedupSettings, {"cosine": 0.9}, {"copies_only": True, "cosine": 1.0}, "got both"),
        (
            NegativesSettings,
            {"range_min": 10, "range_max": 13},
            {"range_min": 10, "range_max": 12},
            "range_max: expected at least range_min . num_negatives, 13, got 12",
        ),
        (
            NegativesSettings,
            {"run": RUN, "absolute_margin": 0},
            {"absolute_margin": 0},
            "absolute_margin: expected a run",
        ),
        (
            NegativesSettings,
            {"run": RUN, "relative_margin": 0},
            {"relative_margin": 0},
            "relative_margin: expected a run",
        ),
        (ScoreSettings, {"weights": HEAD}, {}, "expected --weights FILE or --prompt TEXT, got neither"),
        (ScoreSettings, {"prompts": ("a",)}, {"weights": HEAD, "prompts": ("a",)}, "got both"),
        (
            ScoreSettings,
            {"prompts": ("a",), "negative": ("b",)},
            {"prompts": ("a",), "negative": (" ",)},
            "an empty text",
        ),
        (ScoreSettings, {"prompts": (" a ",)}, {"prompts": ("a", " ")}, "got an empty text"),
        (ScoreSettings, {"weights": HEAD}, {"weights": HEAD, "negative": ("a",)}, "negative: expected --prompt TEXT"),
        (
            ScoreSettings,
            {"weights": HEAD, "fold_layers": True},
            {"prompts": ("a",), "fold_layers": True},
            "fold_layers: expected --weights FILE",
        ),
        (
            ScoreSettings,
            {"weights": HEAD, "normalize": False},
            {"prompts": ("a",), "normalize": False},
            "normalize: exp",
        ),
        (
            ScoreSettings,
            {"weights": HEAD, "run": RUN},
            {"weights": HEAD, "run": RUN, "normalize": False},
            "normalize: e",
        ),
        (ScoreSettings, {"prompts": ("a",), "column": "rows"}, {"prompts": ("a",), "column": "row"}, "got 'row'"),
        (ScoreSettings, {"prompts": ("a",)}, {"prompts": ("a",), "column": "key"}, "got 'key'"),
        (ScoreSettings, {"prompts": ("a",)}, {"prompts": ("a",), "column": ""}, "got ''"),
        (SelectSettings, {"budget": 1.0}, {"budget": 1.5}, "a fraction of at most 1 .100%., got 1.5"),
        (SelectSettings, {"budget": 2}, {"budget": 1.01}, "a whole number or a fraction"),
        (SelectSettings, {"clusters": (1,)}, {"clusters": (0,)}, "clusters: expected whole numbers of at least 1"),
        (SelectSettings, {"clusters": (9, 1)}, {"clusters": (9, 0)}, "clusters: expected whole numbers of at least 1"),
        (SelectSettings, {"clusters": None}, {"clusters": ()}, "clusters: expected whole numbers of at least 1"),
    ],
)
def test_settings_that_exclude_each_other(
    kind: type, allowed: dict[str, Any], refused: dict[str, Any], message: str
) -> None:
    kind(**allowed)
    with pytest.raises(SettingError, match=message):
        kind(**refused)


def test_ranks_to_consider() -> None:
    assert NegativesSettings(num_negatives=2, range_min=5).last_rank == 25
    assert NegativesSettings(num_negatives=2, range_min=5, range_max=9).last_rank == 9


def test_settings_of_a_selection_are_recorded() -> None:
    found = SelectSettings(budget=0.5, candidates=7, seed=3)
    assert found.method_settings == ["budget", "candidates"]
    names = [
        "budget",
        "per_concept",
        "threshold",
        "head",
        "clusters",
        "candidates",
        "score",
        "at_least",
        "at_most",
        "seed",
    ]
    assert found.method_json() == {**dict.fromkeys(names), "budget": 0.5, "candidates": 7, "seed": 3}
    assert SelectSettings(run=RUN, concepts="c").inputs() == {"concepts": "c", "run": "run"}


def test_bounds_of_a_score_are_in_order() -> None:
    assert SelectSettings(at_least=0.5, at_most=0.5).at_most == 0.5
    with pytest.raises(SettingError, match="at_most: expected at least at_least, 0.5, got 0.4"):
        SelectSettings(at_least=0.5, at_most=0.4)
