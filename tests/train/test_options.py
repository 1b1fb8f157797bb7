import inspect
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from embedcache.cli.train import train
from embedcache.errors import SettingError, UnknownNameError
from embedcache.train.settings import (
    LossSettings,
    OptimizerSettings,
    TrainSettings,
    command_line,
    option_names,
    train_settings,
)


def test_the_command_line_has_every_setting() -> None:
    parameters = set(inspect.signature(train).parameters)
    assert parameters - {"paths", "image", "text"} == set(option_names())


def test_the_command_line_has_the_defaults_of_the_settings(tmp_path: Path) -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    assert train_settings({name: defaults[name] for name in option_names()}) == TrainSettings()


@given(
    st.floats(1e-5, 1), st.sampled_from(["mlp", "glu"]), st.integers(0, 9), st.booleans(), st.sampled_from([0.0, 2.5])
)
def test_words_of_the_command_line_ask_for_the_same_settings(
    rate: float, projector: str, seed: int, is_shuffled: bool, mixup: float
) -> None:
    settings = train_settings(
        {"lr": rate, "projector": projector, "seed": seed, "shuffle_pairs": is_shuffled, "mixup": mixup}
    )
    app = typer.Typer()
    found = []

    def catch(**options: object) -> None:
        found.append(train_settings({name: value for name, value in options.items() if name in option_names()}))

    catch.__signature__ = inspect.signature(train)  # type: ignore[attr-defined]
    catch.__annotations__ = train.__annotations__
    app.command()(catch)
    app(["cache", "run", *command_line(settings)], standalone_mode=False)
    assert found == [settings]


def test_flat_names_reach_their_groups() -> None:
    settings = train_settings({"loss": "siglip", "epochs": 3, "split": "key", "seed": 4, "patience": None})
    assert settings.loss == LossSettings(name="siglip")
    assert settings.optimizer == OptimizerSettings(epochs=3)
    assert (settings.split.kind, settings.split.seed, settings.seed) == ("key", 4, 4)
    assert train_settings({"seed": 4, "split_seed": 1}).split.seed == 1


def test_which_gpu_it_was_decides_nothing() -> None:
    for device in ("cuda", "cuda:1"):
        assert train_settings({"device": device}).to_json()["machine"]["device"] == "cuda"


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown training setting 'learnin_rate'; did you mean 'learning_rate'"):
        train_settings({"learnin_rate": 1})
    with pytest.raises(SettingError, match="captions is 'all', but info_nce has one positive an image; use --captions"):
        train_settings({"captions": "all", "loss": "info_nce"})
    with pytest.raises(SettingError, match="start is 'pca'; it must be one of None, cca, csa"):
        train_settings({"start": "pca"})
    with pytest.raises(SettingError, match="precision is 'float16'; it must be one of float32, bfloat16"):
        train_settings({"precision": "float16"})
    with pytest.raises(SettingError, match="captions is 'all', but mixup mixes single captions"):
        train_settings({"captions": "all", "mixup": 1.0})
    for name, value in (
        ("patience", 0),
        ("mixup", -1.0),
        ("structure", float("nan")),
        ("block_rows", 0),
        ("checkpoint_s", -1),
    ):
        with pytest.raises(SettingError, match=f"{name.split('_')[0]}.* is {value}"):
            train_settings({name: value})
