"""Every report of an evaluation or of curation holds the contract of reports, and CLIP_benchmark reads its JSON."""

import csv
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from embedcache.curate.coverage import measure_coverage_by_modality
from embedcache.curate.dedup import analyze, dedup
from embedcache.curate.leaks import find_leaks
from embedcache.curate.outliers import find_outliers
from embedcache.curate.score import score
from embedcache.evaluate.encoder_pairs import evaluate_pairs
from embedcache.evaluate.probe import evaluate_probe
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.evaluate.settings import RetrievalSettings, ZeroShotSettings
from embedcache.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.provenance import write_report_json
from embedcache.reports.coverage import present_coverage
from embedcache.reports.dedup import present_dedup, present_thresholds
from embedcache.reports.encoder_pairs import present_encoder_pairs
from embedcache.reports.leaks import present_leaks
from embedcache.reports.probe import present_probe
from embedcache.reports.render import Presentation
from embedcache.reports.retrieval import present_retrieval
from embedcache.reports.scores import present_outliers, present_scores
from embedcache.reports.zero_shot import present_zero_shot
from embedcache.sources import open_source
from tests.images import write_images
from tests.reports.contract import check_report
from tests.toy import IMAGE, TEXT
from tests.vectors.runs import SIDES, train_run

pytestmark = pytest.mark.slow

CLASSES = ("red", "green", "blue", "yellow", "black")
RETRIEVAL = RetrievalSettings(check_overlap=False, widths=(8,))


@pytest.fixture(scope="module")
def folder(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a copy of `cache`, `labeled` with images in class folders and one image twice, and `prompts`."""
    folder = tmp_path_factory.mktemp("results")
    train_run(cache_path, folder / "run", *SIDES["vectors"])
    for number, name in enumerate(CLASSES):
        write_images(folder / "source" / name, 6, seed=number)
    shutil.copy(folder / "source/red/00000.png", folder / "source/blue/00000.png")
    extract(open_source(folder / "source"), folder / "labeled", image_encoder=[IMAGE], text_encoder=[TEXT])
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    extract(open_source(f"prompts:{folder / 'names.txt'}"), folder / "prompts", text_encoder=[TEXT])
    return folder


@pytest.fixture(scope="module")
def classified(folder: Path) -> ZeroShotReport:
    return evaluate_zero_shot(
        folder / "labeled", [folder / "run"], folder / "prompts", ZeroShotSettings(check_overlap=False)
    )


def retrieval(cache: Path, folder: Path) -> Presentation:
    report = evaluate_retrieval(cache, [folder / "run"], RETRIEVAL)
    return present_retrieval({"run": report}, cache, RETRIEVAL)


def coverage(cache: Path, folder: Path) -> Presentation:
    return present_coverage(
        measure_coverage_by_modality(cache, folder / "prompts", run=folder / "run", modality="both", min_count=400)
    )


REPORTS: dict[str, tuple[Callable[[Path, Path], Presentation], int, int]] = {
    "retrieval": (retrieval, 2, 40),
    "coverage": (coverage, 2, 20),
    "pairs": (lambda cache, _: present_encoder_pairs(evaluate_pairs(cache, split="key")), 3, 0),
    "thresholds": (lambda _, folder: present_thresholds(analyze(folder / "labeled")), 1, 2),
    "dedup": (lambda _, folder: present_dedup(dedup(folder / "labeled", folder / "kept.parquet", cosine=0.9)), 1, 2),
    "leaks": (lambda cache, folder: present_leaks(find_leaks(cache, folder / "labeled")), 0, 2),
    "outliers": (
        lambda cache, folder: present_outliers(find_outliers(cache, None, run=folder / "run"), None),
        2,
        20,
    ),
    "scores": (
        lambda cache, folder: present_scores(
            score(cache, folder / "score.parquet", run=folder / "run", prompt=("a red bar",))
        ),
        1,
        40,
    ),
}
"""Name -> function that makes a report on a cache and the folder, its number of figures, and the least of images."""


@pytest.mark.parametrize("name", REPORTS)
def test_report_holds_the_contract(cache_path: Path, folder: Path, name: str) -> None:
    make, num_figures, num_images = REPORTS[name]
    page = check_report(make(cache_path, folder))
    assert page.count("<svg") == num_figures
    assert page.count("data:image/webp") >= num_images


def test_accuracy_of_top_5_needs_5_classes(classified: ZeroShotReport, folder: Path) -> None:
    of_four = replace(
        classified, names=classified.names[:4], by_class=classified.by_class[:4], confusion=classified.confusion[:4, :4]
    )
    for report, expected in ((classified, {"acc1", "acc5"}), (of_four, {"acc1"})):
        record = present_zero_shot({"run": report}, folder / "labeled", ZeroShotSettings()).record()
        assert set(record["metrics"]) == {*expected, "mean_per_class_recall"}
        assert record["language"] == "en"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # clip_benchmark closes no file
def test_clip_benchmark_build_reads_results(
    monkeypatch: pytest.MonkeyPatch, classified: ZeroShotReport, cache_path: Path, folder: Path, tmp_path: Path
) -> None:
    import clip_benchmark.cli

    retrieved = evaluate_retrieval(cache_path, [folder / "run"], RETRIEVAL)
    probe = evaluate_probe(folder / "labeled", feature="open_toy/cls", classifier=("ridge",), split="key")
    shown = {
        "a": present_zero_shot({"run": classified}, folder / "labeled", ZeroShotSettings()),
        "b": present_probe(probe, "labeled"),
        "c": present_retrieval({"run": retrieved}, cache_path, RETRIEVAL),
    }
    for name, presentation in shown.items():
        check_report(presentation)
        write_report_json(tmp_path / f"{name}.json", presentation.record())
    both = present_retrieval({"one": retrieved, "other": replace(retrieved, language="de")}, cache_path, RETRIEVAL)
    assert [record["language"] for record in both.record()] == [None, "de"]

    table = tmp_path / "table.csv"
    files = [str(tmp_path / f"{name}.json") for name in shown]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", *files, "--output", str(table)])
    clip_benchmark.cli.main()
    with table.open() as file:
        first, second, third = csv.DictReader(file)
    assert first["acc1"] == str(classified.accuracies["acc1"].value)
    assert first["model_fullname"] == f"embedcache {folder / 'run'}"
    assert (second["task"], second["acc1"]) == ("linear_probe", "")
    assert float(second["ridge_acc1"]) == pytest.approx(probe.scores[0].accuracy.value, abs=1e-5)
    for way, modality in (("i2t", "text"), ("t2i", "image")):
        assert float(third[f"{modality}_retrieval_recall@5"]) == retrieved.recalls[way]["r@5"].value
