"""Settings of training, also those that a recipe chooses by the number of pairs."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import FingerprintError, SettingError
from embedcache.runs import Run
from embedcache.settings import to_flat
from embedcache.store.cache import Cache
from embedcache.train.data import TrainData, open_data
from embedcache.train.recipes import RecipeScore, count_training_pairs, list_recipes, recipe_options, with_recipe
from embedcache.train.settings import command_line, train_settings
from embedcache.train.train import train
from tests.recorded import RecordedProgress
from tests.train.runs import IMAGE, TEXT

FEATURES = {"feature": {"image": IMAGE, "text": TEXT}}

SPLIT = {"split": "key", "shared_width": 16}


@pytest.fixture
def data(cache_path: Path) -> TrainData:
    return open_data(cache_path, {"image": IMAGE, "text": TEXT}, memory_bytes=2**30)


CLOSED_FORMS = ["closed-form-3", "closed-form-1"]


@pytest.mark.parametrize(
    ("num_pairs", "given", "names"),
    [
        (100, {}, [*CLOSED_FORMS, "mlp-1e-4"]),
        (100, {"prototypes": "classes"}, [*CLOSED_FORMS, "prototypes", "mlp-1e-4"]),
        (2_000, {}, [*CLOSED_FORMS, "closed-form-0.3", "mlp-1e-4"]),
        (6_000, {}, ["closed-form-0.3", "closed-form-0.1", "mlp-1e-3", "glu"]),
        (100, {"epochs": 0, "projector": "mlp"}, CLOSED_FORMS),
        (100, {"epochs": 2}, ["mlp-1e-4"]),
        (100, {"init_from": ["image=run"]}, ["mlp-1e-4"]),
        (6_000, {"projector": "mlp"}, ["mlp-1e-3", "glu"]),
    ],
)
def test_recipes_by_pairs_and_given_settings(num_pairs: int, given: dict[str, Any], names: list[str]) -> None:
    found = list_recipes(num_pairs, train_settings({"recipe": "auto", **given}))
    assert [recipe.name for recipe in found] == names


def test_given_options_apply_to_all_recipes() -> None:
    settings = train_settings({"recipe": "auto", "dropout": 0.1, "projector": "mlp", "prototypes": "classes"})
    best = RecipeScore(name="prototypes", options={"shrinkage": 2.0, "prototypes": "classes"}, score=0.5)
    mlp, glu = list_recipes(160_000, settings)
    expected = train_settings(
        {**to_flat(settings), "recipe": None, "lr": 1e-3, "shrinkage": 2.0, "epochs": 12, "patience": 3}
    )
    assert with_recipe(settings, recipe_options(mlp, 160_000, settings, best)) == expected
    without = with_recipe(settings, recipe_options(glu, 160_000, settings, best))
    assert (without.prototypes, without.model.initialization, without.optimizer.epochs) == (None, None, 12)


@pytest.mark.slow
def test_best_validation_score_is_kept(cache_path: Path, tmp_path: Path) -> None:
    progress = RecordedProgress()
    report = train(cache_path, tmp_path / "auto", **FEATURES, recipe="auto", **SPLIT, progress=progress)
    assert [score.name for score in report.recipes] == [*CLOSED_FORMS, "mlp-1e-4"]
    (chosen,) = [score for score in report.recipes if score.is_chosen]
    assert chosen.score == report.score == max(score.score for score in report.recipes)
    assert chosen.name in report.line(tmp_path / "auto")
    assert not (tmp_path / "auto/recipes").exists()
    assert train(cache_path, tmp_path / "auto", **FEATURES, recipe="auto", **SPLIT).recipes == report.recipes

    options = {name: value for name, value in chosen.options.items() if value is not None}
    assert train(cache_path, tmp_path / "auto", **FEATURES, **options, **SPLIT).reused
    train(cache_path, tmp_path / "named", **FEATURES, **options, **SPLIT)
    auto, named = (Run.open(tmp_path / name).load().info for name in ("auto", "named"))
    assert (auto.settings, auto.weights, auto.caches) == (named.settings, named.weights, named.caches)
    with pytest.raises(FingerprintError):
        train(cache_path, tmp_path / "auto", **FEATURES, recipe="auto", **SPLIT, dropout=0.3)
    with pytest.raises(FingerprintError, match="recipe"):  # other options chose that run
        train(cache_path, tmp_path / "named", **FEATURES, recipe="auto", **SPLIT)


class _Killed(Exception):
    pass


class _KillsAfter(RecordedProgress):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def note(self, text: str) -> None:
        super().note(text)
        if self._name in text:
            raise _Killed


@pytest.mark.slow
def test_killed_comparison_goes_on(cache_path: Path, tmp_path: Path) -> None:
    asked = {**FEATURES, **SPLIT, "recipe": "auto"}
    for name in ("closed-form-3", "mlp-1e-4"):
        with pytest.raises(_Killed):
            train(cache_path, tmp_path / "killed", **asked, progress=_KillsAfter(f"recipe {name}"))
    with pytest.raises(FingerprintError, match="recipe"):
        train(cache_path, tmp_path / "killed", **FEATURES, **SPLIT)
    found = train(cache_path, tmp_path / "killed", **asked)
    expected = train(cache_path, tmp_path / "whole", **asked)
    assert found.recipes == expected.recipes
    for name in ("model.safetensors", "split.parquet", "losses.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_training_pairs_are_counted(data: TrainData, cache_path: Path, tmp_path: Path) -> None:
    def count(**options: object) -> int:
        return count_training_pairs(data, train_settings(options))

    assert count() == count(split="key") == 195
    assert count(val_fraction=0.5, test_fraction=0.25, max_val=10, max_test=40) == 250
    train(cache_path, tmp_path / "run", **FEATURES, split="key", split_seed=3, epochs=0)
    rows = data.split(data.pairs(None), train_settings({"split": "key", "split_seed": 3}).split).rows("train")
    split = str(tmp_path / "run/split.parquet")
    assert count(split=split) == len(rows)
    selected = Selection(rows=rows[:60])
    write_selection(tmp_path / "s7.parquet", Cache(cache_path), selected, {})
    selection = str(tmp_path / "s{seed}.parquet")
    assert count(selection=selection, split=split, seed=7) == 60
    assert count(selection=selection, seed=7) == round(60 * 0.65)


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
