"""What do smaller widths cost, with and without a Matryoshka loss? OpenMoji, strict splits, five seeds.

    python -m pipelines.matryoshka work/

Writes docs/benchmarks/matryoshka.md and .svg. Existing results in the folder are reused.
"""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from embedcache.cli.console import print_line
from embedcache.cli.failures import run_program
from embedcache.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.quickstart.quickstart import TRAINED
from embedcache.reports.base import COLORS, GRID, INK, format_estimate
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from pipelines import common

SEEDS = (0, 1, 2, 3, 4)
WIDTHS = (8, 16, 32, 64, 128)
RECIPES = {
    "from CCA": common.with_options(TRAINED, language=None),
    "random start": train_settings(
        {"batch_size": 512, "dropout": 0.3, "initialization": "random", "epochs": 30, "patience": 8}
    ),
}
PAGE = Path("docs/benchmarks/matryoshka.md")
NOTES = (
    "EfficientNet-Lite0's `patch_mean` and MiniLM's `mean` of OpenMoji's 1,893 images and English names, projector "
    "`mlp`, shared width 256. Produced by `python -m pipelines.matryoshka work/` on 2 CPU cores.",
    "`--widths 8,16,32,64,128` adds the loss of the first 8 to 128 components to that of all 256; `--widths` of "
    "`evaluate retrieval` ranks by the first components alone, scaled to length 1 again, also for runs that were "
    "trained without. Five seeds: five strict splits, batch orders and initializations. Nothing was tuned for this "
    "page: 'from CCA' is the recipe of the quickstart, 'random start' that of the table of "
    "[projectors](projectors.md), and each run keeps the epoch of the best validation recall at the whole width.",
    "From random weights the loss over prefixes more than doubles recall at width 8, and a quarter of the width comes "
    "close to the whole. From CCA, whose components are ordered by their correlation, it changes hardly anything: "
    "a quarter of the width serves either way. The whole width loses nothing that can be seen.",
)


def main() -> None:
    """Extract features, train both recipes with and without smaller widths, rank by width and write the page."""
    workdir = common.parse_workdir(__doc__)
    cache_path = workdir / "cache"
    common.extract_source("openmoji:en", cache_path)
    features = {"image": common.IMAGE_FEATURE, "text": common.TEXT_FEATURE}
    data, reports = open_data(cache_path, features, memory_bytes=10**9), {}
    for recipe, base in RECIPES.items():
        for name, widths in ((recipe, ()), (f"{recipe}, Matryoshka", WIDTHS)):
            path, settings = workdir / "runs" / name.replace(", ", "-"), common.with_options(base, widths=widths)
            run_paths, _ = common.train_seeds(data, path, settings, SEEDS)
            reports[name] = evaluate_retrieval(cache_path, run_paths, RetrievalSettings(widths=WIDTHS))
            print_line(f"{name}: {reports[name].line()}")
    tables = [_table(reports, way) for way in ("i2t", "t2i")]
    notes = [*NOTES, *(_difference(reports, recipe) for recipe in RECIPES), reports["from CCA"].line() + "."]
    common.write_markdown_page(PAGE, "Recall by width, with and without Matryoshka", notes, _plot(reports), tables)


def _difference(reports: Mapping[str, RetrievalReport], recipe: str) -> str:
    before, after = (reports[name].by_seed for name in (recipe, f"{recipe}, Matryoshka"))
    return (
        f"{recipe}: with Matryoshka, mean recall at the whole width changes by "
        f"{common.format_difference(before, after)} (paired by seed, Student's t)."
    )


def _table(reports: Mapping[str, RetrievalReport], way: str) -> str:
    rows = [
        [name, *(format_estimate(recalls[way]["r@10"]) for recalls in report.by_width.values())]
        for name, report in reports.items()
    ]
    return common.markdown_table([f"{way} R@10 at width", *map(str, reports["from CCA"].by_width)], rows)


def _plot(reports: Mapping[str, RetrievalReport]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), ("i2t", "t2i"), strict=True):
        for number, (name, report) in enumerate(reports.items()):
            widths = list(report.by_width)
            values = [recalls[way]["r@10"].value for recalls in report.by_width.values()]
            style = "o-" if number % 2 else "o--"
            axes.plot(widths, values, style, color=COLORS[number // 2], markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_xlabel(f"width, {way} R@10", color=INK)
        axes.grid(axis="y", color=GRID)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


if __name__ == "__main__":
    run_program(main)
