import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from embedcache.errors import SettingError
from embedcache.evaluate.probe import evaluate_probe
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.evaluate.settings import ProbeSettings, RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.provenance import read_json, write_json
from embedcache.reports.probe import probe_json
from embedcache.reports.results import (
    clip_benchmark_result,
    result_files,
    retrieval_result,
    write_results,
    zero_shot_result,
)
from embedcache.sources import open_source
from tests.images import write_images
from tests.interop.runs import SIDES, train_run
from tests.toy import IMAGE, TEXT

pytestmark = pytest.mark.slow

FIELDS = {"dataset", "model", "pretrained", "task", "metrics", "language"}  # clip_benchmark/cli.py, `dump`
CLASSES = ("red", "green", "blue", "yellow", "black")


@pytest.fixture(scope="module")
def folder(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, `labeled` with images in class folders, and `prompts` for these classes."""
    folder = tmp_path_factory.mktemp("results")
    train_run(cache_path, folder / "run", *SIDES["vectors"])
    for number, name in enumerate(CLASSES):
        write_images(folder / "source" / name, 6, seed=number)
    extract(open_source(folder / "source"), folder / "labeled", image_encoder=[IMAGE])
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    extract(open_source(f"prompts:{folder / 'names.txt'}"), folder / "prompts", text_encoder=[TEXT])
    return folder


@pytest.fixture(scope="module")
def retrieved(cache_path: Path, folder: Path) -> RetrievalReport:
    return evaluate_retrieval(cache_path, [folder / "run"], RetrievalSettings(check_overlap=False))


@pytest.fixture(scope="module")
def classified(folder: Path) -> ZeroShotReport:
    return evaluate_zero_shot(
        folder / "labeled", [folder / "run"], folder / "prompts", ZeroShotSettings(check_overlap=False)
    )


def test_retrieval_result(retrieved: RetrievalReport) -> None:
    result = retrieval_result(retrieved, cache="caches/flickr", runs=["run-0", "run-1"])
    assert set(result) == {*FIELDS, "details"}
    assert result["metrics"] == {
        f"{name}_retrieval_recall@{k}": retrieved.recalls[way][f"r@{k}"].value
        for name, way in (("text", "i2t"), ("image", "t2i"))
        for k in (1, 5, 10)
    }
    assert (result["dataset"], result["pretrained"], result["language"]) == ("flickr", "run-0,run-1", None)
    assert result["details"]["num_images"] == 75


def test_zero_shot_result(classified: ZeroShotReport, folder: Path) -> None:
    places = {"cache": folder / "labeled", "prompts": folder / "prompts", "runs": [folder / "run"]}
    result = zero_shot_result(classified, **places)
    assert set(result) == {*FIELDS, "details"}
    assert result["metrics"] == {name: estimate.value for name, estimate in classified.accuracies.items()}
    assert set(result["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert (result["dataset"], result["task"], result["language"]) == ("labeled", "zeroshot_classification", "en")
    of_four = replace(classified, names=classified.names[:4], by_class=classified.by_class[:4])
    assert "acc5" not in zero_shot_result(of_four, **places)["metrics"]


@pytest.mark.parametrize(("task", "name"), [("zeroshot_retrieval", "acc1"), ("zeroshot_classification", "r@1")])
def test_unknown_metric_raises(task: str, name: str) -> None:
    with pytest.raises(SettingError, match=f"metric of {task}: expected .*, got '{name}'"):
        clip_benchmark_result(task, {name: 0.5}, dataset="d", runs=["r"], language=None, details={})


def build(monkeypatch: pytest.MonkeyPatch, *files: Path) -> list[dict[str, str]]:
    """Return CLIP_benchmark's table of some files and folders."""
    import clip_benchmark.cli

    table = files[0].parent / "benchmark.csv"
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", *map(str, files), "--output", str(table)])
    clip_benchmark.cli.main()
    with table.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # clip_benchmark closes no file
def test_clip_benchmark_build_reads_results(
    monkeypatch: pytest.MonkeyPatch,
    retrieved: RetrievalReport,
    classified: ZeroShotReport,
    folder: Path,
    tmp_path: Path,
) -> None:
    languages = {
        f"run, {code}": retrieval_result(replace(retrieved, language=code), cache="cache", runs=["run-0", "run-1"])
        for code in ("en", "de")
    }
    files = result_files(tmp_path / "retrieval", "zeroshot_retrieval", "cache", [[folder / "run"]], ["en", "de"])
    write_results(files, languages)
    accuracies = zero_shot_result(classified, cache="cache", prompts=folder / "prompts", runs=["run-0"])
    write_results([tmp_path / "zero-shot.json"], {"run": accuracies})
    probe = evaluate_probe(folder / "labeled", ProbeSettings(feature="open_toy/cls", classifiers=("ridge",)))
    write_json(tmp_path / "probe.json", probe_json(probe, "cache"))

    first, second, *others = build(
        monkeypatch, tmp_path / "zero-shot.json", tmp_path / "probe.json", tmp_path / "retrieval"
    )
    assert first["acc1"] == str(classified.accuracies["acc1"].value)
    assert first["model_fullname"] == "embedcache run-0"
    assert (second["task"], second["acc1"]) == ("linear_probe", "")
    assert float(second["ridge_acc1"]) == pytest.approx(probe.scores[0].accuracy.value, abs=1e-5)
    assert {row["language"]: row["model_fullname"] for row in others} == dict.fromkeys(
        ("en", "de"), "embedcache run-0,run-1"
    )
    for row in others:
        assert float(row["image_retrieval_recall@5"]) == retrieved.recalls["t2i"]["r@5"].value
    assert {row["dataset"] for row in (first, second, *others)} == {"cache"}


def test_results_have_files_of_their_own(tmp_path: Path) -> None:
    recipes = [[Path("a-run")], [Path("a run"), Path("b")]]
    first, second = result_files(tmp_path, "zeroshot_retrieval", "cache", recipes)
    assert first == tmp_path / "cache_a-run_zeroshot_retrieval.json"
    assert second == tmp_path / "cache_a-run+b_zeroshot_retrieval.json"
    with pytest.raises(SettingError, match="output: "):
        result_files(tmp_path, "zeroshot_retrieval", "cache", [*recipes, [Path("a/run")]])


def test_json_file_holds_all_results(retrieved: RetrievalReport, tmp_path: Path) -> None:
    results = {name: retrieval_result(retrieved, cache="cache", runs=[name]) for name in ("run", "shuffled")}
    write_results(result_files(tmp_path / "figures.json", "zeroshot_retrieval", "cache", [[Path("run")]]), results)
    written = read_json(tmp_path / "figures.json")
    assert written["pretrained"] == "run"
    assert written["details"]["others"] == {"shuffled": results["shuffled"]}
    assert written["details"]["num_texts"] == 75
