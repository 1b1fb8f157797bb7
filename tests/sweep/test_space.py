from collections import Counter
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from embedcache.errors import EmbedcacheError, PathError, SettingError, UnknownNameError
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Range, read_space
from embedcache.sweep.trials import distributions, grid_points

WHOLE = """
[fixed]
epochs = 7
split = "key"

[space]
lr = {low = 1e-4, high = 1e-2, log = true}
batch_size = {low = 128, high = 1024, step = 128}
dropout = {low = 0, high = 0.5}
projector = ["linear", "mlp"]
mixup = [0, 0.5]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "space.toml"
    path.write_text(text)
    return path


def test_a_space_is_what_its_toml_says(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, WHOLE))
    assert space.fixed == {"epochs": 7, "split": "key", "split_seed": 0}
    assert distributions(space) == {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "batch_size": IntDistribution(128, 1024, step=128),
        "dropout": FloatDistribution(0.0, 0.5),
        "projector": CategoricalDistribution(("linear", "mlp")),
        "mixup": CategoricalDistribution((0, 0.5)),
    }
    settings = space.settings({"projector": "linear", "batch_size": 256})
    assert (settings.model.projector, settings.optimizer.batch_size, settings.optimizer.epochs) == ("linear", 256, 7)


def test_the_split_does_not_follow_the_seed(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "[fixed]\nseed = 5\n[space]\ndropout = [0.1, 0.2]"))
    settings = space.settings({})
    assert (settings.seed, settings.split.seed) == (5, 0)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("[space]\nlearning_rat = [1.0]", UnknownNameError, "'learning_rat'; did you mean 'learning_rate'"),
        ("[fixed]\nlearning_rat = 1\n[space]\ndropout = [0.1]", UnknownNameError, "did you mean 'learning_rate'"),
        ("[fixed]\nepochs = 2.5\n[space]\ndropout = [0.1]", SettingError, r"epochs is 2\.5; it must be a whole number"),
        ("[fixed]\nepochs = 3", SettingError, r"has nothing in a table \[space\]; name there what to try"),
        ("[space]", SettingError, "has nothing in a table"),
        ("", SettingError, "has nothing in a table"),
        ("[fixd]\nepochs = 3\n[space]\ndropout = [0.1]", SettingError, r"holds 'fixd' at its top; .* \[fixed\] and"),
        ("dropout = [0.1]", SettingError, "holds 'dropout' at its top"),
        ("[space]\ndropout = 0.1.2", SettingError, r"space\.toml is no TOML: .*line 2"),
        (
            "[space]\ndropout = {low = 0.5, high = 0.1}",
            SettingError,
            r"dropout .*low is 0\.5 and high is 0\.1; low must",
        ),
        (
            "[space]\ndropout = {low = 0.0, high = 0.1, log = true}",
            SettingError,
            r"low is 0\.0 with log; it must be ab",
        ),
        ("[space]\ndropout = {low = 0.1, high = 0.2, log = true, step = 0.1}", SettingError, "one of both"),
        ("[space]\nbatch_size = {low = 8, high = 20, step = 8}", SettingError, "above low 8, such as 16"),
        ("[space]\nbatch_size = {low = 8, high = 16, step = 0}", SettingError, "step is 0; it must be above 0"),
        ("[space]\ndropout = {low = 0.1}", SettingError, "dropout in .space. lacks 'high'; a range has low, high"),
        ("[space]\ndropout = {low = 0.1, high = 0.2, hihg = 1}", SettingError, "has 'hihg'; a range has low, high"),
        ("[space]\ndropout = {low = 'a', high = 0.2}", SettingError, "low of dropout .* is 'a'; it must be a number"),
        ("[space]\ndropout = {low = nan, high = 0.2}", SettingError, "low of dropout .* is nan; it must be a number"),
        ("[space]\ndropout = {low = 0.1, high = 0.2, log = 1}", SettingError, "log of dropout .* true or false"),
        ("[space]\ndropout = []", SettingError, r"dropout in \[space\] is \[\]; give a range or choices"),
        ("[space]\ndropout = 0.1", SettingError, r"dropout in \[space\] is 0\.1; give a range or choices"),
        (
            "[space]\ndropout = [0.1, 1.5]",
            SettingError,
            r"dropout = 1\.5: dropout is 1\.5; it must be at least 0 and b",
        ),
        ("[space]\ndropout = {low = 0.1, high = 1.5}", SettingError, r"dropout = 1\.5: .*below 1"),
        ("[space]\ndropout = [0.1, 'high']", SettingError, "dropout is 'high'; it must be a number"),
        (
            "[space]\nbatch_size = {low = 8.0, high = 16.0}",
            SettingError,
            r"batch_size is 8\.0; it must be a whole numb",
        ),
        ("[space]\nbatch_size = [true, 16]", SettingError, "batch_size is True; it must be a whole number"),
        ("[space]\ncaptions = ['draw', 'some']", SettingError, "captions is 'some'; it must be 'draw', 'all'"),
        ("[space]\nprojector = ['mlp', 'lineal']", UnknownNameError, "projector = 'lineal': .*did you mean 'linear'"),
        ("[space]\nloss = ['siglib']", UnknownNameError, "did you mean 'siglip'"),
        ("[fixed]\ndevice = 'cuda:77'\n[space]\ndropout = [0.1]", SettingError, "no device 'cuda:77' here"),
        (
            "[fixed]\ncaptions = 'all'\n[space]\nmixup = [0.0, 1.0]",
            SettingError,
            r"mixup = 1\.0: captions is 'all', but",
        ),
        ("[fixed]\nepochs = 2\n[space]\nepochs = [2, 3]", SettingError, r"has epochs in \[fixed\] and in \[space\]"),
        ("[space]\nsplit_seed = [1, 2]", SettingError, "split_seed in .space.; trials are compared on one validation"),
        (
            "[space]\nlanguage = ['en', 'de']",
            SettingError,
            "language in .space.; trials are compared on one validation",
        ),
        ("[space]\nseed = [1, 2]", SettingError, "has seed in .space.; the best seed says nothing"),
        ("[space]\nthreads = [1, 2]", SettingError, "threads in .space.; it makes no trial better"),
    ],
    ids=lambda value: value[:40].replace("\n", " ") if isinstance(value, str) else None,
)
def test_what_cannot_be_tried_is_named(tmp_path: Path, text: str, error: type[EmbedcacheError], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        read_space(written(tmp_path, text))
    assert "space.toml" in str(raised.value)


def test_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(PathError, match=r"is no file; give a TOML file with a table \[space\]"):
            read_space(path)


def test_the_most_epochs_are_known(tmp_path: Path) -> None:
    for line, most in (("dropout = [0.1]", 30), ("epochs = [2, 4]", 4), ("epochs = {low = 1, high = 9}", 9)):
        assert read_space(written(tmp_path, f"[space]\n{line}")).most_epochs() == most


def test_a_grid_has_every_point_once_and_its_order_is_the_seeds(tmp_path: Path) -> None:
    text = "[space]\ndropout = {low = 0.1, high = 0.3, step = 0.1}\nshared_width = {low = 4, high = 6}\nloss = ['sail']"
    space = read_space(written(tmp_path, text))
    a, b, c = (grid_points(space, SweepSettings(sampler="grid", seed=seed)) for seed in (0, 0, 1))
    assert a is not None
    assert a == b != c
    assert Counter((round(float(p["dropout"]), 9), p["shared_width"], p["loss"]) for p in a) == Counter(
        (dropout, width, "sail") for dropout in (0.1, 0.2, 0.3) for width in (4, 5, 6)
    )
    assert grid_points(space, SweepSettings(sampler="random")) is None


def test_a_grid_needs_an_end_of_values(tmp_path: Path) -> None:
    text = "[space]\nlr = {low = 0.1, high = 0.2}"
    with pytest.raises(SettingError, match=r"learning_rate is a range without steps; give it a step, or choices such"):
        grid_points(read_space(written(tmp_path, text)), SweepSettings(sampler="grid"))
    text = "[space]\nshared_width = {low = 1, high = 1000}\nbatch_size = {low = 2, high = 1001}"
    with pytest.raises(SettingError, match=r"1,000,000 points, of at most 100,000"):
        grid_points(read_space(written(tmp_path, text)), SweepSettings(sampler="grid"))


def test_a_range_of_one_value_is_a_range() -> None:
    assert Range(low=3, high=3).is_whole
