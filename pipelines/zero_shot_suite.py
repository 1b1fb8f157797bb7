"""Zero-shot accuracy of a run on all the sets at hand: the paper's twelve or thirteen, by their usual names.

    python -m pipelines.zero_shot_suite sets/ work/ run-0/ run-1/

`sets/` holds a folder a set, in CLIP_benchmark's WebDataset layout or with a folder a class below `test/`: imagenet1k,
imagenetv2, caltech101, pets, cars, flowers, food101, fgvc_aircraft, sun397, dtd, cub, eurosat, ucf101, or any other.
Class names and templates are the folder's own, or those that the package clip-benchmark has for that name. Features
that are cached in `work/` are used again.
"""

import argparse
from pathlib import Path

from embedcache.cli.console import open_progress, print_line, print_table
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.projectors.saved import PairConfig
from embedcache.reports.zero_shot import zero_shot_table
from embedcache.sources import open_source
from embedcache.sources.prompts import CLASS_NAMES, clip_benchmark_file

SHIPPED = {"imagenetv2": "imagenet1k"}  # whose classes they have


def main() -> None:
    """Extract, classify, print a row a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, help="a folder a set")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("runs", nargs="+", type=Path, help="seeds of one recipe")
    options = parser.parse_args()
    folders = sorted(path for path in options.sets.iterdir() if path.is_dir())
    reports = {folder.name: measure(folder, options.workdir / folder.name, options.runs) for folder in folders}
    for name, report in reports.items():
        print_line(f"{name}: {report.line()}")
        columns, (row, chance) = zero_shot_table({name: report})
        print_table(columns, [row, chance])


def measure(folder: Path, work: Path, runs: list[Path]) -> ZeroShotReport:
    """Measure one set."""
    config = load_runs(runs[:1])[0].config
    images = folder / "test" if (folder / "test").is_dir() else folder
    cache_side(str(images), work / "images", config, "image")
    cache_side(f"prompts:{prompts_of(folder, images)}", work / "prompts", config, "text")
    return evaluate_zero_shot(work / "images", runs, work / "prompts")


def cache_side(source: str, cache: Path, config: PairConfig, modality: str) -> None:
    """Extract what one side of the run takes."""
    side = config.tower_input(modality)
    settings = ExtractSettings(features=tuple(name.partition("/")[2] for name in side.feature.split("+")))
    image, text = ([side.spec], []) if modality == "image" else ([], [side.spec])
    reports = extract(
        open_source(source),
        cache,
        image_encoders=image,
        text_encoders=text,
        settings=settings,
        progress=open_progress(),
    )
    for report in reports:
        print_line(report.line())


def prompts_of(folder: Path, images: Path) -> str:
    """Say where a set's classes and templates come from."""
    if (folder / CLASS_NAMES).is_file():
        return str(folder)
    name = SHIPPED.get(folder.name, folder.name)
    classes = name if folder.name in SHIPPED else str(images)
    has_templates = name in clip_benchmark_file("en_zeroshot_classification_templates.json")
    return f"{classes}+{name}" if has_templates else classes


if __name__ == "__main__":
    main()
