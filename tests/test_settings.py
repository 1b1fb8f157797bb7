"""Settings that are declared once: validation, flat names, JSON records, command-line options, TOML files; units."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import NonNegativeInt

from embedcache.cli.commands import command, read_config
from embedcache.dataset.settings import SplitSettings, with_split_seed
from embedcache.errors import CorruptError, PathError, SettingError, UnknownNameError
from embedcache.modalities import MODALITIES
from embedcache.provenance import write_record
from embedcache.search.settings import SearchSettings
from embedcache.settings import (
    Settings,
    flat_settings,
    from_flat,
    group,
    parse_count_or_fraction,
    parse_fraction,
    parse_size,
    replace_flat,
    setting,
    to_flat,
)
from embedcache.sweep.space import read_space
from embedcache.train.settings import LossSettings, OptimizerSettings, TrainSettings, command_line, train_settings


class Inner(Settings):
    fraction: float = setting(0.5, "A fraction.", ge=0, lt=1)
    seed: int = setting(0, "A seed.", flat_name="inner_seed")


class SmallInner(Inner):
    fraction: float = setting(0.25, "A fraction.", ge=0, lt=1)


class Outer(Settings):
    count: int = setting(3, "A count.", gt=0, le=9)
    size: int | None = setting(None, "A size.", ge=1)
    rate: float = setting(1.0, "A rate.")
    mode: Literal["a", "b"] = setting("a", "A mode.")
    is_on: bool = setting(False, "A flag.", affects_result=False)
    names: tuple[str, ...] = setting((), "Some names.")
    shots: tuple[NonNegativeInt, ...] = setting((), "Some counts.", affects_result=False)
    check: bool = setting(True, "Check something.", affects_result=False)
    inner: Inner = group(SmallInner)


@pytest.mark.parametrize(
    "values",
    [
        {"count": 0},
        {"count": 10},
        {"count": True},
        {"count": 1.0},
        {"count": "1"},
        {"size": 2**31},
        {"shots": (1, -1)},
        {"shots": (1, 10**20)},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"fraction": -0.1},
        {"fraction": False},
        {"mode": "c"},
        {"is_on": 1},
        {"names": ("a", 1)},
    ],
)
def test_invalid_value_raises(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(SettingError, match=f"^{name}: expected"):
        from_flat(Outer, values)


@pytest.mark.parametrize("values", [{"count": 9}, {"size": 2**31 - 1}, {"fraction": 0}, {"inner_seed": -(2**31)}])
def test_values_at_the_bounds_are_accepted(values: dict[str, Any]) -> None:
    assert to_flat(from_flat(Outer, values)) == values


class Located:
    """An object that is stored on disk."""

    def __fspath__(self) -> str:
        return "folder"


class Stored(Settings):
    names: tuple[str, ...] = setting((), "Some names.")
    paths: tuple[Path, ...] = setting((), "Some paths.")
    run: Path | str | None = setting(None, "A run.")
    file: Path | None = setting(None, "A file.")


def test_one_value_stands_for_several_and_an_object_for_its_path() -> None:
    made = Stored(names="a", paths=["b.png", Located()], run=Located(), file=Located())  # type: ignore[arg-type]
    assert made == Stored(names=("a",), paths=(Path("b.png"), Path("folder")), run="folder", file=Path("folder"))
    assert Stored(names=(Path("a"), Located())).names == ("a", "folder")  # type: ignore[arg-type]
    assert made.to_json() == {"names": ["a"], "paths": ["b.png", "folder"], "run": "folder", "file": "folder"}
    assert Outer(shots=3).shots == (3,)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="shots: expected a valid integer, got"):
        Outer(shots="3")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    settings = SearchSettings(k=np.int64(3))
    assert (settings.k, type(settings.k)) == (3, int)
    loss = LossSettings(widths=np.array([8, 4]), mixup=np.float32(0.5))
    assert (loss.widths, [type(width) for width in loss.widths]) == ((8, 4), [int, int])
    assert (loss.mixup, type(loss.mixup)) == (0.5, float)
    for wrong in (np.float32(3), np.bool_(1)):
        with pytest.raises(SettingError, match="k: expected a valid integer, got"):
            SearchSettings(k=wrong)


def test_replaced_values_keep_the_others() -> None:
    settings = replace_flat(Outer(count=5, size=2, inner=Inner(seed=4)), {"inner_seed": 6, "size": None})
    assert to_flat(settings) == {"count": 5, "fraction": 0.5, "inner_seed": 6}
    assert replace_flat(settings, {}) is settings


def test_group_overrides_defaults() -> None:
    assert Outer().inner.fraction == from_flat(Outer, {"inner_seed": 1}).inner.fraction == 0.25
    assert next(item.default for item in flat_settings(Outer) if item.name == "fraction") == 0.25
    assert to_flat(from_flat(Outer, {"fraction": 0.5})) == {"fraction": 0.5}


@pytest.mark.parametrize(
    ("values", "word"),
    [({"captions": "all", "mixup": 1.0}, "mixup"), ({"val_fraction": 0.5, "test_fraction": 0.5}, "test_fraction")],
)
def test_contradictory_train_settings_raise(values: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingError, match=word):
        train_settings(values)


def test_split_seed_defaults_to_seed() -> None:
    assert train_settings({"seed": 4}).split.seed == 4
    assert train_settings({"seed": 4, "split_seed": 1}).split.seed == 1
    for wrong in ({"seed": -1}, {"seed": 2**32, "split_seed": 1}):
        with pytest.raises(SettingError, match="^seed: expected a number"):
            train_settings(wrong)
    assert train_settings({"epochs": 3, "patience": None}).optimizer == OptimizerSettings(epochs=3)
    own = TrainSettings(split=SplitSettings(seed=7))
    assert with_split_seed({"seed": 3}, own) == {"seed": 3}
    assert with_split_seed({"seed": 3}, TrainSettings()) == {"seed": 3, "split_seed": 3}


def parse(words: list[str], kind: type[Any] = TrainSettings) -> Any:
    """Return the settings that a command with the options of a class gets from a command line."""
    app, found = typer.Typer(), []
    build = {"settings": train_settings} if kind is TrainSettings else None

    @command(app, "name", has_report=False, settings=kind, build=build)
    def receive(*, settings: Any) -> None:
        found.append(settings)

    app(words, standalone_mode=False)
    return found[0]


@pytest.mark.slow
@given(
    st.floats(1e-5, 1), st.sampled_from(["mlp", "glu"]), st.integers(0, 9), st.booleans(), st.sampled_from([0.0, 2.5])
)
def test_command_line_restores_settings(
    rate: float, projector: str, seed: int, is_shuffled: bool, mixup: float
) -> None:
    settings = train_settings(
        {"lr": rate, "projector": projector, "seed": seed, "shuffle_pairs": is_shuffled, "mixup": mixup}
    )
    assert parse(command_line(settings)) == settings


def test_config_file_gives_values_and_options_win(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('lr = 0.5\nmax-grad-norm = 2\nshuffle_pairs = true\nloss = "siglip"\n')
    settings = parse(["--config", str(path), "--lr", "0.25"])
    assert settings == train_settings({"lr": 0.25, "max_grad_norm": 2, "shuffle_pairs": True, "loss": "siglip"})


def test_config_and_sweep_read_the_same_table(tmp_path: Path) -> None:
    fixed = '[fixed]\nlr = 0.5\nmax-grad-norm = 2\nreport_to = "tensorboard"\nmemory = "2GB"\n'
    (tmp_path / "train.toml").write_text(fixed)
    (tmp_path / "space.toml").write_text(fixed + "[space]\ndropout = [0.1, 0.2]\n")
    settings = parse(["--config", str(tmp_path / "train.toml"), "--dropout", "0.2"])
    assert settings.machine.report_to == ("tensorboard",)
    assert settings == read_space(tmp_path / "space.toml").settings({"dropout": 0.2})


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("lrr = 1", UnknownNameError, "'lr'"),
        ("[fixed]\nlrr = 1", UnknownNameError, "'lr'"),
        ("[space]\nlr = [1, 2]", SettingError, "space"),
        ("seed = 1\n[fixed]\nlr = 1", SettingError, "fixed"),
        ("fixed = 1", SettingError, "fixed"),
        ("lr = ", SettingError, "TOML"),
        ("epochs = -1", SettingError, "epochs"),
        (None, PathError, "train.toml"),
    ],
)
def test_bad_config_file_raises(tmp_path: Path, text: str | None, error: type[Exception], word: str) -> None:
    path = tmp_path / "train.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=word):
        parse(["--config", str(path)])


DEFAULT_COSINES = SplitSettings().cosines


@pytest.mark.parametrize(
    ("given", "toml", "expected"),
    [
        (0.8, "0.8", dict.fromkeys(MODALITIES, 0.8)),
        ("0.8", '["0.8"]', dict.fromkeys(MODALITIES, 0.8)),
        (np.float64(0.8), "0.8", dict.fromkeys(MODALITIES, 0.8)),
        ({"image": 0.995}, "{image = 0.995}", {**DEFAULT_COSINES, "image": 0.995}),
        ("image=0.995", '"image=0.995"', {**DEFAULT_COSINES, "image": 0.995}),
        (["audio=1", 0.5], '["audio=1", 0.5]', {**dict.fromkeys(MODALITIES, 0.5), "audio": 1.0}),
        (["text=0.9", "image=0.9"], '["text=0.9,image=0.9"]', {**DEFAULT_COSINES, "image": 0.9, "text": 0.9}),
        ((), "[]", DEFAULT_COSINES),
    ],
)
def test_numbers_by_modality(given: Any, toml: str, expected: dict[str, float], tmp_path: Path) -> None:
    settings = train_settings({"cosine": given})
    assert settings.split.cosines == expected
    assert settings.to_json()["split"]["cosines"] == expected
    assert parse(command_line(settings)) == settings
    (tmp_path / "train.toml").write_text(f"cosine = {toml}")
    assert parse(["--config", str(tmp_path / "train.toml")]) == settings


@pytest.mark.parametrize(
    "wrong",
    [
        *("img=0.9", "image=high", "high", "image=", {"img": 0.9}, {"text": None}),
        *(1.5, "image=-2", {"text": float("nan")}, True),
    ],
)
def test_numbers_of_no_modality_or_beyond_the_bounds_raise(wrong: Any) -> None:
    with pytest.raises(SettingError, match="^cosine: expected .*, got "):
        SplitSettings(cosines=wrong)


@pytest.mark.parametrize(("name", "largest"), [("shared_width", 2**16), ("seed", 2**32 - 1)])
def test_limits_are_accepted_and_nothing_beyond(name: str, largest: int) -> None:
    train_settings({name: largest})
    with pytest.raises(SettingError, match=name):
        train_settings({name: largest + 1})


class Commas(Settings):
    names: tuple[str, ...] = setting((), "Some names.", metavar="TEXT")
    specs: tuple[str, ...] = setting((), "Some specs.", commas="split specs")
    texts: tuple[str, ...] = setting((), "Some texts.", commas="keep")
    paths: tuple[Path, ...] = setting((), "Some paths.")


@pytest.mark.parametrize(
    ("name", "texts", "values"),
    [
        ("names", ["a=1, b=2", "c"], ("a=1", "b=2", "c")),
        ("specs", ["noise:5,tape=a.wav,flip", "crop:1, size=2"], ("noise:5,tape=a.wav", "flip", "crop:1, size=2")),
        ("texts", ["red, or blue", "c"], ("red, or blue", "c")),
        ("paths", ["a,b", "c"], (Path("a,b"), Path("c"))),
    ],
)
def test_commas_mean_what_the_setting_declares(
    tmp_path: Path, name: str, texts: list[str], values: tuple[Any, ...]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"{name} = {json.dumps(texts)}")
    assert getattr(parse(["--config", str(path)], Commas), name) == values
    assert getattr(parse([word for text in texts for word in (f"--{name}", text)], Commas), name) == values


def test_config_of_a_run_restores_its_settings(run_path: Path) -> None:
    config = run_path / "run.json"
    values = {name: value for name, value in read_config(config).items() if name != "feature"}
    assert train_settings(values).to_json() == json.loads(config.read_text())["settings"]
    assert read_config(config)["feature"] == {"image": "open_toy/cls", "text": "open_toy/mean"}


def test_other_file_as_the_config_of_a_run_is_one_error(run_path: Path, tmp_path: Path) -> None:
    write_record(tmp_path / "run.json", {"format": 1, "kind": "mine:Net"})
    for path, error in ((tmp_path / "run.json", CorruptError), (run_path / "losses.json", SettingError)):
        path.touch()
        with pytest.raises(error, match=path.name):
            read_config(path)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_size, "4096", 4096),
        (parse_size, "2K", 2000),
        (parse_size, "1.5MiB", 3 * 2**19),
        (parse_size, "4GB", 4 * 10**9),
        (parse_fraction, "0.1%", 0.001),
        (parse_fraction, "1", 1.0),
        (parse_count_or_fraction, "20,000", 20_000),
        (parse_count_or_fraction, "10%", 0.1),
    ],
)
def test_parse(parse: Callable[[str], Any], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_size, ("", "G", "-1M", "4X", "nan", "inf", "0")),
        (parse_fraction, ("2", "-1%", "x", "nan")),
        (parse_count_or_fraction, ("0", "1.5", "x")),
    ],
)
def test_invalid_text_raises(parse: Callable[[str], Any], texts: tuple[str, ...]) -> None:
    for text in texts:
        with pytest.raises(SettingError, match="invalid"):
            parse(text)
