from collections import Counter
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from embedcache.errors import PathError, SettingError, UnknownNameError
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Range, read_space
from embedcache.sweep.trials import make_distributions, make_grid_points

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


def test_read_space(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, WHOLE))
    assert space.fixed == {"epochs": 7, "split": "key", "split_seed": 0}
    assert make_distributions(space) == {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "batch_size": IntDistribution(128, 1024, step=128),
        "dropout": FloatDistribution(0.0, 0.5),
        "projector": CategoricalDistribution(("linear", "mlp")),
        "mixup": CategoricalDistribution((0, 0.5)),
    }
    settings = space.settings({"projector": "linear", "batch_size": 256})
    assert (settings.model.projector, settings.optimizer.batch_size, settings.optimizer.epochs) == ("linear", 256, 7)


def test_choices_that_are_lists(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "[space]\nwidths = [[], [4], [4, 8], 16]"))
    assert make_distributions(space) == {"widths": CategoricalDistribution(("", "4", "4,8", 16))}
    assert space.to_json()["space"] == {"widths": ["", "4", "4,8", 16]}
    widths = [space.settings({"widths": value}).loss.widths for value in ("", "4", "4,8", 16)]
    assert widths == [(), (4,), (4, 8), (16,)]


def test_split_seed_is_independent_of_seed(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "[fixed]\nseed = 5\n[space]\ndropout = [0.1, 0.2]"))
    settings = space.settings({})
    assert (settings.seed, settings.split.seed) == (5, 0)


INVALID = {
    "unknown swept setting": ("[space]\nlearning_rat = [1.0]", r"'learning_rat' in \[space\] of .*toml; did you mean"),
    "unknown fixed setting": (
        "[fixed]\nlrr = 1\n[space]\ndropout = [0.1]",
        r"'lrr' in \[fixed\] of .*toml; did you mean 'lr'",
    ),
    "feature": (
        "[fixed]\nfeature = 'a/b'\n[space]\ndropout = [0.1]",
        "got the feature, .* give --feature to sweep",
    ),
    "no space": ("[fixed]\nepochs = 3", r"expected settings to try in a table \[space\], got none; for example"),
    "empty space": ("[space]", "expected settings to try"),
    "empty file": ("", "expected settings to try"),
    "two spellings": (
        "[fixed]\nshared-width = 8\nshared_width = 16\n[space]\ndropout = [0.1]",
        "shared_width: expected one value, got two, as names may have - or _",
    ),
    "unknown table": ("[fixd]\nepochs = 3\n[space]\ndropout = [0.1]", r"tables \[fixed\] and \[space\] .* 'fixd'"),
    "setting at the top": ("dropout = [0.1]", "at the top, got 'dropout'"),
    "no TOML": ("[space]\ndropout = 0.1.2", r"space\.toml: expected TOML, got an error: .*line 2"),
    "low above high": (
        "[space]\ndropout = {low = 0.5, high = 0.1}",
        r"dropout in \[space\]: low: expected at most high, 0\.1, got 0\.5",
    ),
    "log of zero": (
        "[space]\ndropout = {low = 0.0, high = 0.1, log = true}",
        r"low: expected a number above 0 with log, got 0\.0",
    ),
    "log and step": (
        "[space]\ndropout = {low = 0.1, high = 0.2, log = true, step = 0.1}",
        r"step: expected none with log, got 0\.1",
    ),
    "high between steps": ("[space]\nbatch_size = {low = 8, high = 20, step = 8}", "step 8, such as 16, got 20"),
    "step of zero": ("[space]\nbatch_size = {low = 8, high = 16, step = 0}", "step: expected a number above 0, got 0"),
    "no high": ("[space]\ndropout = {low = 0.1}", "expected low and high, and optionally log or step, got no 'high'"),
    "unknown word": ("[space]\ndropout = {low = 0.1, high = 0.2, hihg = 1}", "log or step, got 'hihg'"),
    "low is text": ("[space]\ndropout = {low = 'a', high = 0.2}", "low: expected a number, got 'a'"),
    "low is nan": ("[space]\ndropout = {low = nan, high = 0.2}", "low: expected a number, got nan"),
    "log is a number": ("[space]\ndropout = {low = 0.1, high = 0.2, log = 1}", "log: expected true or false, got 1"),
    "recipe": ('[space]\nrecipe = ["auto"]', r"recipe in \[space\], but it chooses .*; move it to \[fixed\]"),
    "no choices": ("[space]\ndropout = []", r"expected a range or choices, such as .*, got \[\]"),
    "equal choices": ("[space]\nlr = [1e-3, 0.001]", r"lr in \[space\]: expected different choices, got 0\.001 twice"),
    "equal lists": ("[space]\nwidths = [[4, 8], [4, 8]]", "expected different choices, got '4,8' twice"),
    "list of texts": (
        "[space]\nwidths = [['a']]",
        r"widths = 'a': widths: expected a value of at least 1, got \('a',\)",
    ),
    "list for a number": ("[space]\ndropout = [[0.1]]", r"dropout: expected a number .*got \[0\.1\]"),
    "table for a choice": (
        "[space]\ndropout = [0.1, {low = 0.2}]",
        r"dropout: expected a number .*got \{'low': 0\.2\}",
    ),
    "single value": ("[space]\ndropout = 0.1", r"expected a range or choices, such as .*, got 0\.1"),
    "choice out of bounds": (
        "[space]\ndropout = [0.1, 1.5]",
        r"dropout = 1\.5: dropout: expected a number of at least 0 and below 1, got 1\.5",
    ),
    "range out of bounds": ("[space]\ndropout = {low = 0.1, high = 1.5}", r"dropout = 1\.5: .*below 1, got 1\.5"),
    "fixed fraction of epochs": (
        "[fixed]\nepochs = 2.5\n[space]\ndropout = [0.1]",
        r"epochs: expected a whole number from 0 to 1000000, got 2\.5",
    ),
    "text for a number": ("[space]\ndropout = [0.1, 'high']", "dropout: expected a number .*got 'high'"),
    "floats for whole numbers": (
        "[space]\nbatch_size = {low = 8.0, high = 16.0}",
        r"batch_size: expected a whole number .*got 8\.0",
    ),
    "true for a number": ("[space]\nbatch_size = [true, 16]", "batch_size: expected a whole number .*got True"),
    "unknown choice": ("[space]\ncaptions = ['draw', 'some']", "captions: expected one of draw, all, got 'some'"),
    "unknown projector": ("[space]\nprojector = ['mlp', 'lineal']", "'lineal': .*did you mean 'linear'"),
    "unknown loss": ("[space]\nloss = ['siglib']", "did you mean 'siglip'"),
    "unknown device": ("[fixed]\ndevice = 'cuda:77'\n[space]\ndropout = [0.1]", "device 'cuda:77' is not available"),
    "contradiction": (
        "[fixed]\ncaptions = 'all'\n[space]\nmixup = [0.0, 1.0]",
        r"mixup = 1\.0: captions: expected draw, got all",
    ),
    "loss of one text": (
        "[fixed]\ncaptions = 'all'\n[space]\nloss = ['siglip', 'info_nce']",
        "loss = 'info_nce': captions: expected draw, got all",
    ),
    "fixed and swept": ("[fixed]\nepochs = 2\n[space]\nepochs = [2, 3]", r"epochs both in \[fixed\] and in \[space\]"),
    "swept split": ("[space]\nsplit_seed = [1, 2]", "split_seed in .space., but all trials are compared on the same"),
    "swept language": ("[space]\nlanguage = ['en', 'de']", "language in .space., but all trials are compared on the"),
    "swept seed": ("[space]\nseed = [1, 2]", "seed in .space., but the best seed means nothing"),
    "swept threads": ("[space]\nthreads = [1, 2]", "threads in .space., but it cannot improve a trial; move it to"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_space_raises(tmp_path: Path, case: str) -> None:
    text, message = INVALID[case]
    error = UnknownNameError if "did you mean" in message else SettingError
    with pytest.raises(error, match=message) as raised:
        read_space(written(tmp_path, text))
    assert "space.toml" in str(raised.value)


@pytest.mark.parametrize("name", ["none.toml", ""], ids=["missing", "folder"])
def test_missing_file_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(PathError, match=r"expected a TOML file with a table \[space\], got .*not a file"):
        read_space(tmp_path / name)


def test_max_epochs(tmp_path: Path) -> None:
    for line, most in (("dropout = [0.1]", 30), ("epochs = [2, 4]", 4), ("epochs = {low = 1, high = 9}", 9)):
        assert read_space(written(tmp_path, f"[space]\n{line}")).max_epochs() == most


def test_grid_has_every_point_in_the_order_of_the_seed(tmp_path: Path) -> None:
    text = "[space]\ndropout = {low = 0.1, high = 0.3, step = 0.1}\nshared_width = {low = 4, high = 6}\nloss = ['sail']"
    space = read_space(written(tmp_path, text))
    a, b, c = (make_grid_points(space, SweepSettings(sampler="grid", seed=seed)) for seed in (0, 0, 1))
    assert a is not None
    assert a == b != c
    assert Counter((p["dropout"], p["shared_width"], p["loss"]) for p in a) == Counter(
        (dropout, width, "sail") for dropout in (0.1, 0.2, 0.3) for width in (4, 5, 6)
    )  # 0.1 + 2 * 0.1 is above 0.3
    assert make_grid_points(space, SweepSettings(sampler="random")) is None


def test_infinite_grid_raises(tmp_path: Path) -> None:
    text = "[space]\nlr = {low = 0.1, high = 0.2}"
    with pytest.raises(SettingError, match=r"lr: expected a range with a step, or choices such as"):
        make_grid_points(read_space(written(tmp_path, text)), SweepSettings(sampler="grid"))
    text = "[space]\nshared_width = {low = 1, high = 1000}\nbatch_size = {low = 2, high = 1001}"
    with pytest.raises(SettingError, match=r"expected at most 100,000 points, got 1,000,000"):
        make_grid_points(read_space(written(tmp_path, text)), SweepSettings(sampler="grid"))


def test_range_of_one_value() -> None:
    assert Range(low=3, high=3).is_whole
