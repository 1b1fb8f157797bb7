"""The page of the learning curve: a figure and a table of each test, crossings, recommendations and costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from embedcache.cli.console import print_line, print_table
from embedcache.metrics.intervals import Estimate
from embedcache.provenance import digest_file
from embedcache.reports.base import Curves, Table, estimate_curves, format_count
from pipelines.drawings.curve import RECIPES, Recipe, curve_sizes, open_runs, run_all
from pipelines.drawings.curve_results import (
    cost_table,
    crossing_table,
    curve_json,
    curve_table,
    estimate_of,
    read_results,
    recommendation_table,
    size_names,
    validation_table,
)
from pipelines.drawings.results import CLOTHES, EMOJI, FAMILIES, NAMES
from pipelines.drawings.steps import Data
from pipelines.results import Part, file_name, write_pages

TITLE = "From how many pairs on training gains over a closed form"
CREDIT = (
    "Icons: Iconify (npm package @iconify/json), each family under the license that its author chose. Drawings: "
    "OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0. Fashion-MNIST: Zalando (Debian "
    "package dataset-fashion-mnist), MIT license."
)
NOTES = (
    "Pairs of an icon of Iconify and its name, under EfficientNet-Lite0's `patch_mean` and MiniLM's `mean`, both "
    "frozen and cached once. A pair is an icon; of several names one is drawn in each epoch. The pairs of a size are a "
    "random draw of the training part, and each draw is a part of the next larger one. Validation and test parts stay "
    "the same. Each seed has a split, draws and trainings of its own.",
    "Closed forms choose their shrinkage (10, 1, 0.1, 0.01), and trained recipes their dropout (0.1, 0.5) for each "
    "size by the validation recall of the first seed; the other seeds use the same. `linear` and both `mlp` start from "
    "CCA, all others from random weights; `token` gets one vector per item. The loss is `multi_positive` unless "
    "`siglip` is named, the batch 1,024 or all pairs if fewer, the learning rate 1e-3. Each has 2 million pairs in all "
    "to train on, but 10 epochs at least and 100 at most, and stops after a quarter of its epochs without a better "
    "validation recall, three at least; the best epoch is kept.",
    "The closed form of a size is the one with the highest mean validation recall. The recommended recipe has the "
    "highest R@10 on half of the names never seen, averaged over both directions; all figures are those of the other "
    "half, and of the other tests. Validation would not do: trained recipes have chosen their epoch by it. The control "
    "is CCA of shuffled pairs.",
)
_GLU = "`glu`, of 20 times the operations per pair, has dropout 0.3 and a learning rate of 5e-4, which nothing chose."
_INTERVALS = (
    "Brackets hold 95% percentile intervals from 1,000 resamples of both seeds and items (icons of one name are drawn "
    "together); all recipes and sizes are compared on the same resamples."
)
_SAME_SEED = " With one seed they are over items only."
ABOUT: Mapping[str, str] = {
    NAMES: "Icons whose names, and drawings, are no near-duplicates of any in training.",
    FAMILIES: "Whole families, whose drawings are no near-duplicates of any in training; their names may be.",
    EMOJI: "The test part of OpenMoji's strict split; icons that are near-duplicates of OpenMoji's are not in "
    "training.",
    CLOTHES: "Ten classes by their bare names.",
}
_GAIN_NOTE = "The gain of each trained recipe over the closed form of the size, in recall at 10 of texts for an image."
_CROSSING_NOTE = (
    "The number of pairs from which on the gain over the closed form stays above zero: between two sizes the gain is a "
    "line over the logarithm of the number of pairs, and the interval is that of the same number for each resample. "
    "“≤” is fewer than the smallest size, “>” more than all pairs."
)


def run_curve(
    data: Data, seeds: Sequence[int], sizes: Sequence[int], recipes: Mapping[str, Recipe] = RECIPES
) -> dict[str, Any]:
    """Train and measure recipes on more and more pairs, but for what is finished; return the curve as JSON values."""
    every = open_runs(data, data.folder / "curve", seeds, curve_sizes(data, seeds[0], sizes), recipes)
    chosen = run_all(every)
    trained = [digest_file(runs.path(*key, choice) / "config.json") for runs in every for key, choice in chosen.items()]

    def measure() -> dict[str, Any]:
        values = curve_json(every, chosen, read_results(every))
        write_curve_pages(data.folder / "curve", values)
        return values

    values = data.step("curve", {"runs": trained, "clothes": data.has_clothes}, measure)
    print_table(*recommendation_table(values), title="recommended, and gains over the closed form")
    print_table(*crossing_table(values), title="pairs from which on training gains")
    print_line(f"{data.folder / 'curve.html'}; {data.folder / 'curve.json'}")
    return values


def part_of_test(test: str, note: str, table: Table, figure: Figure | None = None) -> Part:
    """Return the section of a test: what it is, a note, a table and perhaps a figure."""
    return Part(f"{test[0].upper()}{test[1:]}", [ABOUT[test], note], table, figure, file_name(test))


def write_curve_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page of the curve as HTML and Markdown, from its JSON values."""
    is_glu_measured = "glu" in next(iter(values["tests"][NAMES].values()))["recipes"]
    notes = [*NOTES, _GLU] if is_glu_measured else [*NOTES]
    if precision := _precision(values):
        notes.append(f"Trained recipes compute in {precision}, closed forms in float32.")
    intervals = _INTERVALS + _SAME_SEED * (len(values["seeds"]) == 1)
    tests = [
        part_of_test(test, f"{_counts(measures)}. {intervals}", curve_table(values, test), curve_figure(values, test))
        for test, measures in values["tests"].items()
    ]
    gained = "Gains of the recommended recipe over the closed form, on nothing it was chosen by; empty where it is one."
    taken = (
        "Means over seeds, of one thread; operations are counted: three forward passes per pair, the products of the "
        "loss, second moments, and the solution of the closed form that a recipe starts from. Seconds include all of "
        "the run, or what followed its last interruption, on a machine that may do other things."
    )
    parts = [
        Part("Recommended recipe", [gained, intervals], recommendation_table(values)),
        Part("Gains of training", [_GAIN_NOTE, intervals], figure=gain_figure(values), name="gains"),
        Part("Where training begins to gain", [_CROSSING_NOTE], crossing_table(values)),
        *tests,
        Part("Validation recall", ["The mean of R@1, R@5 and R@10 in both directions."], validation_table(values)),
        Part("What training takes", [taken], cost_table(values)),
    ]
    write_pages(path, TITLE, parts, notes=notes, summary=summarize(values), credit=CREDIT)


def _precision(values: Mapping[str, Any]) -> str | None:
    """Return the precision that trained recipes were asked to compute in, if any."""
    options = [run["options"] for of_size in values["runs"].values() for run in of_size.values()]
    return next((given["precision"] for given in options if "precision" in given), None)


def _counts(measures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {found['num_examples']:,} queries" for name, found in measures.items())


def summarize(values: Mapping[str, Any]) -> str:
    """Return what is recommended for each number of pairs, and what it changes on names never seen."""
    lines = []
    for size, count in size_names(values).items():
        name, closed = values["recommended"][size], values["closed_form"][size]
        changes = [
            f"{measure} {found['recipes'][closed][size]['value']:.3f} → {found['recipes'][name][size]['value']:.3f}"
            for measure, found in values["tests"][NAMES].items()
        ]
        lines.append(f"{count} pairs: {closed} → {name}, {', '.join(changes)}")
    return f"The closed form and the recommended recipe on {NAMES}. {'; '.join(lines)}."


def curve_figure(values: Mapping[str, Any], test: str) -> Figure:
    """Draw each recipe by the number of pairs, both axes logarithmic, beside the control and chance."""
    names, places = _ticks(values), list(values["num_pairs"].values())
    panels = {}
    for measure, found in values["tests"][test].items():
        lines = {name: [estimate_of(of_size[size]) for size in names] for name, of_size in found["recipes"].items()}
        chance = Estimate(*[found["chance"]] * 3)
        panels[measure] = Curves(list(names.values()), {**lines, "chance": [chance] * len(names)}, places)
    return estimate_curves(
        panels,
        x="training pairs",
        y="recall" if len(panels) > 1 else "accuracy",
        controls=[*values["controls"], "chance"],
        is_log=True,
    )


def gain_figure(values: Mapping[str, Any]) -> Figure:
    """Draw what each trained recipe gains over the closed form, by the number of pairs, a panel for each retrieval."""
    names, places = _ticks(values), list(values["num_pairs"].values())
    panels = {}
    for test in (NAMES, FAMILIES, EMOJI):
        gains = next(iter(values["tests"][test].values()))["gains"]
        lines = {name: [estimate_of(of_size[size]) for size in names] for name, of_size in gains.items()}
        panels[test] = Curves(list(names.values()), lines, places)
    return estimate_curves(panels, x="training pairs", y="gain in recall at 10", is_gain=True)


def _ticks(values: Mapping[str, Any]) -> dict[str, str]:
    """Return size -> number of pairs in thousands, such as `161k`, short enough for neighbors on a logarithmic axis."""
    counts = values["num_pairs"].items()
    return {size: format_count(count) if count < 1000 else f"{count / 1000:,.0f}k" for size, count in counts}
