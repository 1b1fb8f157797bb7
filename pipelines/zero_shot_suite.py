"""Zero-shot accuracy of a run on all available datasets: the twelve or thirteen of the paper, by their usual names.

    python -m pipelines.zero_shot_suite sets/ work/ run-0/ run-1/

`sets/` holds one folder per dataset, in CLIP_benchmark's WebDataset layout or with one folder per class below `test/`:
imagenet1k, imagenetv2, caltech101, pets, cars, flowers, food101, fgvc_aircraft, sun397, dtd, cub, eurosat, ucf101, or
any other. Class names and templates are those in the folder, or those of the package clip-benchmark for that name.
Features that are cached in `work/` are reused.
"""

import argparse
from pathlib import Path

from embedcache.cli.console import print_line, print_table
from embedcache.cli.failures import run_program
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import PairConfig
from embedcache.reports.zero_shot import zero_shot_table
from embedcache.sources.prompts import CLASS_NAMES, clip_benchmark_file
from pipelines.common import extract_source

SAME_CLASSES = {"imagenetv2": "imagenet1k"}  # dataset -> dataset of clip-benchmark with the same classes


def main() -> None:
    """Extract, classify and print one table per dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, help="folder with one folder per dataset")
    parser.add_argument("workdir", type=Path, help="folder for caches; existing features are reused")
    parser.add_argument("runs", nargs="+", type=Path, help="seeds of one recipe")
    options = parser.parse_args()
    folders = sorted(path for path in options.sets.iterdir() if path.is_dir())
    reports = {folder.name: measure(folder, options.workdir / folder.name, options.runs) for folder in folders}
    for name, report in reports.items():
        print_line(f"{name}: {report.line()}")
        print_table(*zero_shot_table({name: report}))


def measure(folder: Path, work: Path, runs: list[Path]) -> ZeroShotReport:
    """Measure the accuracy on one dataset."""
    config = load_runs(runs[:1])[0].config
    images = folder / "test" if (folder / "test").is_dir() else folder
    extract_tower_input(str(images), work / "images", config, "image")
    extract_tower_input(f"prompts:{prompts_location(folder, images)}", work / "prompts", config, "text")
    return evaluate_zero_shot(work / "images", runs, work / "prompts")


def extract_tower_input(source: str, cache: Path, config: PairConfig, modality: str) -> None:
    """Extract the input feature of one modality of the run."""
    tower = config.tower_input(modality)
    settings = ExtractSettings(features=tuple(name.partition("/")[2] for name in tower.feature.split("+")))
    images, texts = ([tower.spec], []) if modality == "image" else ([], [tower.spec])
    extract_source(source, cache, images=images, texts=texts, settings=settings)


def prompts_location(folder: Path, images: Path) -> str:
    """Return the location of classes and templates, as the source `prompts` expects it."""
    if (folder / CLASS_NAMES).is_file():
        return str(folder)
    name = SAME_CLASSES.get(folder.name, folder.name)
    classes = name if folder.name in SAME_CLASSES else str(images)
    has_templates = name in clip_benchmark_file("en_zeroshot_classification_templates.json")
    return f"{classes}+{name}" if has_templates else classes


if __name__ == "__main__":
    run_program(main)
