"""Training runs and recipes: what they learn, choose, write, reuse and refuse."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs
from embedcache.cli.commands import read_config as read_options
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.selections import Selection, write_selection
from embedcache.dataset.splits import read_split
from embedcache.errors import CorruptError, DataError, FingerprintError, SettingError, UnknownNameError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.inference import load
from embedcache.projectors.base import project
from embedcache.reports.summary import summarize
from embedcache.runs import Run
from embedcache.settings import to_flat
from embedcache.store.cache import Cache
from embedcache.train import train as train_module
from embedcache.train.batches import PairBatches
from embedcache.train.data import TrainData, open_data
from embedcache.train.initialization import initialize, source_digests
from embedcache.train.pair import Validation
from embedcache.train.recipes import RecipeScore, count_training_pairs, list_recipes, recipe_options, with_recipe
from embedcache.train.settings import command_line, train_settings
from embedcache.train.train import train
from tests.cli.run import embedcache
from tests.recorded import RecordedProgress
from tests.train.runs import IMAGE, TEXT, beats_chance, log_lines, run


@pytest.fixture(scope="module")
def finished(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all defaults of `run`. Not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    run(cache_path, path)
    return path


RANDOM = {"initialization": "random", "epochs": 6, "lr": 1e-2}
RECIPES: dict[str, dict[str, Any]] = {
    "cca mlp": {"initialization": "cca", "projector": "mlp"},
    "info_nce": {**RANDOM, "loss": "info_nce"},
    "multi_positive": {**RANDOM, "loss": "multi_positive", "projector": "linear"},
    "siglip": {**RANDOM, "loss": "siglip"},
    "sail": {**RANDOM, "loss": "sail", "epochs": 10},
    "mixup and structure": {**RANDOM, "mixup": 0.3, "structure": 2.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_beats_chance(cache_path: Path, tmp_path: Path, recipe: str) -> None:
    report = run(cache_path, tmp_path / "run", shrinkage=0.01, **{"epochs": 4, **RECIPES[recipe]})
    assert beats_chance(evaluate_retrieval(cache_path, [tmp_path / "run"]))
    if RECIPES[recipe]["initialization"] == "random":
        assert report.best_epoch > 0


@pytest.mark.slow
def test_shuffled_control_stays_at_chance(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", epochs=5, shuffle_pairs=True)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert report.recalls["i2t"]["r@5"].value < report.chance["i2t"]["r@5"].high + 0.1


def test_run_folder_is_complete(cache_path: Path, finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {".claims", "last.safetensors", "losses.jsonl", "model.safetensors", "run.json", "split.parquet"}
    losses = [line["loss"] for line in log_lines(finished) if "loss" in line]
    assert len(losses) == 2 * 4
    assert [line["epoch"] for line in log_lines(finished) if "validation" in line] == [0, 1, 2]
    run_ = Run.open(finished)
    assert run_.input("image").feature == IMAGE
    assert run_.info.index_digest == Cache(cache_path).info.index_digest
    assert (run_.info.settings["block_rows"], run_.info.digests) == (1, {})
    assert run_.info.files.keys() == names - {".claims", "run.json"}
    assert run_.info.report["num_samples"] == {"train": 195, "val": 30, "test": 75}
    assert run_.info.report["num_parameters"] == sum(value.numel() for value in run_.pair.parameters())
    before = {path: path.read_bytes() for path in finished.iterdir()}
    again = run(cache_path, finished, memory=2**30)
    assert again.reused
    assert again.measures == run_.info.report["measures"]
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_changed_run_is_refused_by_each_reader(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(finished, tmp_path / "run"))
    path = changed / "run.json"
    path.write_text(path.read_text().replace('"shuffle_pairs": false', '"shuffle_pairs": true '))
    readers: list[Callable[[], object]] = [
        lambda: load(changed),
        lambda: summarize(changed),
        lambda: source_digests([str(changed)]),
        lambda: read_options(path),
        lambda: run(cache_path, changed),
        lambda: read_split(changed / "split.parquet", [Cache(cache_path)]),
    ]
    for read in readers:
        with pytest.raises(CorruptError, match=r"run\.json has changed since it was written; restore the file"):
            read()
    for text in ("{", "[]", '{"format": 1}'):
        path.write_text(text)
        result = embedcache("inspect", changed, cwd=tmp_path)
        assert (result.code, result.stderr.count("\n")) == (1, 1), result.stderr


def test_training_uses_only_its_part(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}

    def watch(name: str, function: Callable[..., Any], place: int) -> None:
        def call(*arguments: Any, **options: Any) -> Any:
            seen[name] = set(arguments[place].samples)
            return function(*arguments, **options)

        monkeypatch.setattr(train_module, name, call)

    for name, function, place in (
        ("initialize", initialize, 1),
        ("Validation", Validation, 0),
        ("PairBatches", PairBatches, 0),
    ):
        watch(name, function, place)
    run(cache_path, tmp_path / "run", epochs=1)
    split = read_split(tmp_path / "run/split.parquet", [Cache(cache_path)])
    assert seen["initialize"] == seen["PairBatches"] == set(split.rows("train"))
    assert seen["Validation"] == set(split.rows("val"))


@pytest.mark.slow
def test_same_seed_gives_the_same_weights(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    for name, seed in (("b", 0), ("c", 4)):
        torch.manual_seed(seed + 1)  # the caller's generator must not matter
        run(cache_path, tmp_path / name, seed=seed, split_seed=0)
    b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "bc")
    assert (finished / "model.safetensors").read_bytes() == b != c


def test_zero_epochs_keep_the_closed_form(cache_path: Path, tmp_path: Path) -> None:
    assert run(cache_path, tmp_path / "run", epochs=0).best_epoch == 0
    pair = Run.open(tmp_path / "run").pair
    vectors = Cache(cache_path).feature("image", IMAGE).load()
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    linear = (unit - pair.tower("image").mean.numpy()) @ pair.tower("image").projector.linear.weight.detach().numpy().T
    linear /= np.linalg.norm(linear, axis=1, keepdims=True)
    np.testing.assert_allclose(project(pair.tower("image"), Inputs(vectors)), linear, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"image": "open_toy/clss"}, UnknownNameError, "clss"),
        ({"image": None}, UnknownNameError, "patches"),
        ({"image": "open_toy/patches"}, DataError, "vector"),
        ({"image": "open_toy/patches", "projector": "token+mlp", "mixup": 1.0}, SettingError, "mixup"),
        ({"image": "open_toy/cls+open_toy/patches", "projector": "cls_token+mlp"}, DataError, "48"),
        ({"projector": "lineal"}, UnknownNameError, "lineal"),
        ({"loss": "siglib"}, UnknownNameError, "siglib"),
        ({"loss": "info_nce", "captions": "all"}, SettingError, "captions"),
        ({"loss": "embedcache.train.losses:InfoNce", "captions": "all"}, SettingError, "captions"),
        ({"language": "xx"}, UnknownNameError, "language"),
        ({"device": "cuda:77"}, SettingError, "cuda:77"),
        ({"batch_size": 196}, SettingError, "195"),
        ({"batch_size": 3, "mixup": 1.0}, SettingError, "at least 4"),
        ({"projector": "glu", "initialization": "cca"}, SettingError, "glu"),
    ],
)
def test_invalid_options_raise(
    cache_path: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        run(cache_path, tmp_path / "run", **options)


@pytest.mark.slow
def test_split_of_another_run_is_used(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "a", epochs=0, split_seed=3)
    given = {"split": str(tmp_path / "a" / "split.parquet"), "epochs": 0}
    run(cache_path, tmp_path / "b", **given)
    assert (tmp_path / "a/split.parquet").read_bytes() == (tmp_path / "b/split.parquet").read_bytes()
    assert run(cache_path, tmp_path / "b", **given).reused
    run(cache_path, tmp_path / "c", epochs=0, split_seed=4)
    (tmp_path / "a/split.parquet").write_bytes((tmp_path / "c/split.parquet").read_bytes())
    with pytest.raises(FingerprintError, match=r"digests\.split: "):
        run(cache_path, tmp_path / "b", **given)


@pytest.mark.slow
def test_weights_of_the_best_epoch_are_kept(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", epochs=6, lr=0.5)  # far too high: recall falls at once
    scores = {line["epoch"]: line["validation"] for line in log_lines(tmp_path / "run") if "validation" in line}
    best = max(scores, key=lambda epoch: sum(scores[epoch].values()))
    assert report.best_epoch == best != 6
    pair = Run.open(tmp_path / "run").pair
    cache = Cache(cache_path)
    pairs = train_module.open_data(cache_path, {"image": IMAGE, "text": "open_toy/mean"}, memory_bytes=10**9)
    split = read_split(tmp_path / "run/split.parquet", [cache])
    validation = Validation(pairs.pairs(None).select(split.rows("val")), *pairs.readers.values(), device="cpu")
    assert validation.recalls(pair) == pytest.approx(scores[best])


@pytest.mark.parametrize(
    ("count", "given", "expected"), [(1025, None, [513, 512]), (1024, None, [1024]), (9, 9, [9]), (9, 2, [3, 2, 2, 2])]
)
def test_a_batch_has_1024_samples_or_all(count: int, given: int | None, expected: list[int]) -> None:
    rows = np.arange(count)
    items = Items(rows=rows, samples=rows, contents=rows)
    settings = train_settings({"batch_size": given, "block_rows": 1})
    batches = train_module._make_batches(Pairs(first=items, second=items), settings, [None, None], None)
    assert [len(batch.samples) for batch in batches.epoch(0)] == expected


def test_towers_without_parameters_are_not_trained(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", projector="asif", shared_width=40)
    assert (report.best_epoch, report.samples_per_s) == (0, 0.0)
    assert [list(line) for line in log_lines(tmp_path / "run")] == [["epoch", "validation"]]


def test_projections_that_overflow_after_the_last_step_name_it(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="after step 0"):
        run(cache_path, tmp_path / "run", epochs=1, batch_size=195, lr=1e30)


@pytest.mark.slow
def test_several_threads_give_the_same_weights(cache_path: Path, tmp_path: Path) -> None:
    options = {"threads": 2, "batch_size": 195, "initialization": "random", "epochs": 1}
    for name in "ab":
        run(cache_path, tmp_path / name, **options)
    a, b = ((tmp_path / name / "last.safetensors").read_bytes() for name in "ab")
    assert a == b


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
