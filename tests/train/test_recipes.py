"""Settings of training, also those that a recipe chooses by the number of pairs."""

from pathlib import Path
from typing import Any

import pytest

from embedcache.dataset.selections import Selection, write_selection
from embedcache.errors import SettingError
from embedcache.progress import NullProgress
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.train import recipes
from embedcache.train.data import TrainData, open_data
from embedcache.train.recipes import (
    Recipe,
    TrainingLength,
    apply_recipe,
    choose_settings,
    count_training_pairs,
)
from embedcache.train.settings import command_line, train_settings
from embedcache.train.train import train
from tests.recorded import RecordedProgress
from tests.train.runs import IMAGE, TEXT

CLOSED_FORM = {"projector": "linear", "initialization": "ridge", "shrinkage": 10.0}

TRAINED = {"projector": "linear", "initialization": "procrustes", "dropout": 0.5}

FEATURES = {"feature": {"image": IMAGE, "text": TEXT}}

SPLIT = {"split": "key", "shared_width": 16}


@pytest.fixture
def data(cache_path: Path) -> TrainData:
    return open_data(cache_path, {"image": IMAGE, "text": TEXT}, memory_bytes=2**30)


@pytest.fixture
def _recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a closed form below 100 pairs, of which half of the samples of the cache are more."""
    made = (
        Recipe(min_pairs=0, options=CLOSED_FORM),
        Recipe(min_pairs=100, options=TRAINED, length=TrainingLength(400, 1, 9)),
        Recipe(min_pairs=1_000, options={"projector": "mlp"}, length=TrainingLength(9_000, 1, 9)),
    )
    monkeypatch.setattr(recipes, "RECIPES", made)


GLU = {"projector": "glu", "initialization": "random", "dropout": 0.3, "lr": 5e-4}


@pytest.mark.parametrize(
    ("num_pairs", "chosen"),
    [
        (0, {"projector": "linear", "shrinkage": 10.0, "epochs": 0}),
        (549, {"projector": "linear", "shrinkage": 10.0, "epochs": 0}),
        (550, {"projector": "linear", "shrinkage": 1.0, "epochs": 0}),
        (5_499, {"projector": "linear", "shrinkage": 1.0, "epochs": 0}),
        (5_500, {**GLU, "epochs": 100, "patience": 25}),
        (70_000, {**GLU, "epochs": 29, "patience": 7}),
        (160_000, {**GLU, "epochs": 12, "patience": 3}),
        (10**6, {**GLU, "epochs": 10, "patience": 3}),
    ],
)
def test_recipes_by_the_number_of_pairs(num_pairs: int, chosen: dict[str, Any]) -> None:
    progress = RecordedProgress()
    assert choose_settings(num_pairs, {}, progress) == chosen
    words = ", ".join(f"{name} {value}" for name, value in chosen.items())
    assert progress.notes == [f"recipe for {num_pairs:,} training pairs: {words}"]


@pytest.mark.slow
@pytest.mark.usefixtures("_recipes")
def test_run_is_that_of_the_chosen_settings(cache_path: Path, tmp_path: Path) -> None:
    chosen = {**TRAINED, "epochs": 2, "patience": 3}  # 400 / 195 pairs
    progress = RecordedProgress()
    train(cache_path, tmp_path / "auto", **FEATURES, recipe="auto", **SPLIT, progress=progress)
    assert "projector linear, initialization procrustes, dropout 0.5, epochs 2, patience 3" in progress.notes[0]
    assert progress.notes[0].startswith("recipe for 195 training pairs: ")
    assert train(cache_path, tmp_path / "auto", **FEATURES, **chosen, **SPLIT).reused
    train(cache_path, tmp_path / "named", **FEATURES, **chosen, **SPLIT)
    assert train(cache_path, tmp_path / "named", **FEATURES, recipe="auto", **SPLIT).reused
    auto, named = (Run.open(tmp_path / name).info for name in ("auto", "named"))
    assert (auto.settings, auto.weights, auto.settings["recipe"]) == (named.settings, named.weights, None)


@pytest.mark.usefixtures("_recipes")
def test_given_options_win_where_they_are_the_default(data: TrainData) -> None:
    for options in ({"dropout": 0.1, "projector": "mlp"}, {"dropout": 0.2, "projector": "mlp"}):
        settings = train_settings({**SPLIT, "recipe": "auto", "epochs": 30, **options})
        resolved = apply_recipe(settings, data, NullProgress())
        assert resolved == train_settings({**SPLIT, "epochs": 30, "patience": 3, **options})  # its own initialization
    assert command_line(train_settings({"recipe": "auto", "dropout": 0.1})) == [
        *("--recipe", "auto", "--dropout", "0.1", "--seed", "0")
    ]


@pytest.mark.usefixtures("_recipes")
@pytest.mark.parametrize(
    ("name", "value"),
    [("projector", "mlp"), ("initialization", "cca"), ("init_from", ["image=run"]), ("trainable", "text")],
)
def test_closed_form_refuses_what_needs_training(data: TrainData, name: str, value: object) -> None:
    asked = {**SPLIT, "recipe": "auto", "val_fraction": 0.7, "test_fraction": 0.05, name: value}
    with pytest.raises(SettingError, match=name):
        apply_recipe(train_settings(asked), data, NullProgress())
    assert apply_recipe(train_settings({**asked, "epochs": 1}), data, NullProgress()).optimizer.epochs == 1


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
