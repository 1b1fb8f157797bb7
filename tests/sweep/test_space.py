from collections import Counter
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from embedcache.errors import PathError, SettingError, UnknownNameError
from embedcache.sweep.settings import SweepSettings
from embedcache.sweep.space import Space, read_space
from embedcache.sweep.study import make_grid_points
from tests.sweep.conftest import write_space

WHOLE = """
[fixed]
epochs = 7
seed = 5

[space]
lr = {low = 1e-4, high = 1e-2, log = true}
batch_size = {low = 128, high = 1024, step = 128}
dropout = {low = 0, high = 0.5}
projector = ["linear", "mlp"]
mixup = [0, 0.5]
widths = [[], [4], [4, 8], 16]
"""


def read(folder: Path, text: str) -> Space:
    return read_space(write_space(folder, text))


def test_read_space(tmp_path: Path) -> None:
    space = read(tmp_path, WHOLE)
    assert space.fixed == {"epochs": 7, "seed": 5, "split_seed": 0}
    assert space.ranges == {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "batch_size": IntDistribution(128, 1024, step=128),
        "dropout": FloatDistribution(0.0, 0.5),
        "projector": CategoricalDistribution(("linear", "mlp")),
        "mixup": CategoricalDistribution((0, 0.5)),
        "widths": CategoricalDistribution(("", "4", "4,8", 16)),
    }
    settings = space.settings({"projector": "linear", "batch_size": 256})
    assert (settings.model.projector, settings.optimizer.batch_size, settings.optimizer.epochs) == ("linear", 256, 7)
    assert (settings.seed, settings.split.seed) == (5, 0)
    widths = [space.settings({"widths": value}).loss.widths for value in ("", "4", "4,8", 16)]
    assert widths == [(), (4,), (4, 8), (16,)]
    stored = space.to_json()
    assert stored["space"]["dropout"] == {"low": 0.0, "high": 0.5, "log": False, "step": None}
    assert stored["fixed"]["epochs"] == 7


FIXED = "[space]\ndropout = [0.1]\n[fixed]\n"
INVALID: list[tuple[str, str]] = [
    ("", "expected settings"),
    ("[fixed]\nepochs = 3", "expected settings"),
    ("dropout = [0.1]", "at the top"),
    ("[space]\ndropout = 0.1.2", "line 2"),
    ("[fixd]\nepochs = 3\n[space]\ndropout = [0.1]", "fixd"),
    ("[space]\nlearning_rat = [1.0]", "did you mean"),
    (f"{FIXED}lrr = 1", "did you mean"),
    (f"{FIXED}feature = 'a/b'", "--feature"),
    (f"{FIXED}shared-width = 8\nshared_width = 16", "two"),
    (f"{FIXED}epochs = 2.5", "epochs"),
    (f"{FIXED}device = 'cuda:77'", "cuda:77"),
    ("[fixed]\nepochs = 2\n[space]\nepochs = [2, 3]", "both"),
    ("[fixed]\ncaptions = 'all'\n[space]\nmixup = [0.0, 1.0]", "mixup = 1.0"),
    ("[fixed]\ncaptions = 'all'\n[space]\nloss = ['siglip', 'info_nce']", "info_nce"),
    ("[space]\ndropout = {low = 0.5, high = 0.1}", "low <= high"),
    ("[space]\ndropout = {low = 0.0, high = 0.1, log = true}", "low > 0"),
    ("[space]\ndropout = {low = 0.1, high = 0.2, log = true, step = 0.1}", "not supported when `log`"),
    ("[space]\nbatch_size = {low = 8, high = 20, step = 8}", "8, 16"),
    ("[space]\nbatch_size = {low = 8.0, high = 16.0}", "8.0"),
    ("[space]\ndropout = {low = 0.1}", "high"),
    ("[space]\ndropout = {low = 0.1, high = 0.2, hihg = 1}", "hihg"),
    ("[space]\ndropout = {low = 'a', high = 0.2}", "'a'"),
    ("[space]\ndropout = {low = nan, high = 0.2}", "nan"),
    ("[space]\ndropout = {low = 0.1, high = 1.5}", "1.5"),
    ("[space]\ndropout = 0.1", "choices"),
    ("[space]\ndropout = []", "choices"),
    ("[space]\ndropout = [[0.1]]", "dropout"),
    ("[space]\ndropout = [0.1, {low = 0.2}]", "dropout"),
    ("[space]\ndropout = [0.1, 1.5]", "1.5"),
    ("[space]\nprojector = ['mlp', 'lineal']", "did you mean"),
    ("[space]\nrecipe = ['auto']", "recipe"),
    ("[fixed]\nrecipe = 'auto'\n[space]\ndropout = [0.1]", "recipe"),
    ("[space]\nsplit_seed = [1, 2]", "split_seed"),
    ("[space]\nlanguage = ['en', 'de']", "language"),
    ("[space]\nseed = [1, 2]", "best seed"),
    ("[space]\nthreads = [1, 2]", "threads"),
]


@pytest.mark.parametrize(("text", "word"), INVALID)
def test_invalid_space_raises(tmp_path: Path, text: str, word: str) -> None:
    error = UnknownNameError if word == "did you mean" else SettingError
    with pytest.raises(error, match=word) as raised:
        read(tmp_path, text)
    assert "space.toml" in str(raised.value)


def test_missing_file_raises(tmp_path: Path) -> None:
    for name in ("none.toml", ""):
        with pytest.raises(PathError, match="a TOML file with"):
            read_space(tmp_path / name)


def test_max_epochs(tmp_path: Path) -> None:
    for line, most in (("dropout = [0.1]", 30), ("epochs = [2, 4]", 4), ("epochs = {low = 1, high = 9}", 9)):
        assert read(tmp_path, f"[space]\n{line}").max_epochs() == most


def test_grid_has_every_point_in_the_order_of_the_seed(tmp_path: Path) -> None:
    text = "[space]\ndropout = {low = 0.1, high = 0.3, step = 0.1}\nshared_width = {low = 4, high = 6}\nloss = ['sail']"
    space = read(tmp_path, text)
    a, b, c = (make_grid_points(space, SweepSettings(sampler="grid", seed=seed)) for seed in (0, 0, 1))
    assert a is not None
    assert a == b != c
    assert Counter((p["dropout"], p["shared_width"], p["loss"]) for p in a) == Counter(
        (dropout, width, "sail") for dropout in (0.1, 0.2, 0.3) for width in (4, 5, 6)
    )  # 0.1 + 2 * 0.1 is above 0.3
    assert make_grid_points(space, SweepSettings(sampler="random")) is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lr = {low = 0.1, high = 0.2}", "step"),
        ("shared_width = {low = 1, high = 8, log = true}", "step"),
        ("shared_width = {low = 1, high = 1000}\nbatch_size = {low = 2, high = 1001}", "1,000,000"),
    ],
)
def test_infinite_grid_raises(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(SettingError, match=word):
        make_grid_points(read(tmp_path, f"[space]\n{text}"), SweepSettings(sampler="grid"))
