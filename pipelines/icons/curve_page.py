"""The page of the learning curve: a figure and a table of each test, crossings, recommendations and costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from embedcache.arrays import Array
from embedcache.cli.console import print_line, print_table
from embedcache.metrics import Estimate, MetricValues, interval_of
from embedcache.reports.render import Table, format_count, format_fraction, round_json
from embedcache.runs import Run
from pipelines.curves import Curves, estimate_curves
from pipelines.icons.curve import (
    EMOJI,
    FAMILIES,
    NAMES,
    RECIPES,
    Recipe,
    SeedRuns,
    choice_name,
    curve_sizes,
    open_runs,
    question,
    read_cost,
    read_report,
    read_score,
    run_all,
)
from pipelines.icons.steps import Data
from pipelines.results import Part, Result, Results, estimates_json, file_name, write_pages

CREDIT = (
    "Icons: Iconify (npm package @iconify/json), each family under the license that its author chose. Drawings: "
    "OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0. Fashion-MNIST: Zalando (Debian "
    "package dataset-fashion-mnist), MIT license."
)
TITLE = "From how many pairs on training gains over a closed form"
NOTES = (
    "The pairs of a size are a random draw of the training part. The closed form of a size is the one with the highest "
    "mean validation recall; the recommended recipe has the highest R@10 on half of the names never seen, and figures "
    "are those of the other half. What each recipe and test is: `pipelines/icons/README.md`.",
)
INTERVALS = (
    "Brackets hold 95% percentile intervals from 1,000 resamples of both seeds and items (icons of one name are drawn "
    "together), the same for all that is compared."
)
_GAIN_NOTE = "The gain of each trained recipe over the closed form of the size, in recall at 10 of texts for an image."
_CROSSING_NOTE = (
    "The number of pairs from which on the gain over the closed form stays above zero, on a line over the logarithm of "
    "the number of pairs; “≤” is fewer than the smallest size, “>” more than all pairs."
)


def run_curve(
    data: Data,
    seeds: Sequence[int],
    sizes: Sequence[int],
    recipes: Mapping[str, Recipe] = RECIPES,
    *,
    name: str = "curve",
) -> dict[str, Any]:
    """Train and measure recipes on more and more pairs, but for what is finished; return the curve as JSON values.

    Args:
        data: the icons.
        seeds: seeds of splits, draws and trainings.
        sizes: numbers of pairs, besides all.
        recipes: recipes by name.
        name: name of the page and of the folder of the runs.
    """
    every = open_runs(data, data.folder / name, seeds, curve_sizes(data, seeds[0], sizes), recipes)
    chosen = run_all(every)
    trained = [Run.open(runs.path(*key, choice)).info.weights for runs in every for key, choice in chosen.items()]

    def measure() -> dict[str, Any]:
        values = curve_json(every, chosen, read_results(every))
        write_curve_pages(data.folder / name, values)
        return values

    values = data.step(name, {"runs": trained, "clothes": data.has_clothes}, measure)
    print_table(*recommendation_table(values), title="recommended, and gains over the closed form")
    print_table(*crossing_table(values), title="pairs from which on training gains")
    print_line(f"{data.folder / name}.html; {data.folder / name}.json")
    return values


def intervals_note(values: Mapping[str, Any]) -> str:
    """Return what the intervals of a page are."""
    return INTERVALS + " With one seed they are over items only." * (len(values["seeds"]) == 1)


def part_of_test(test: str, note: str, table: Table, figure: Figure | None = None) -> Part:
    """Return the section of a test: what it is, a note, a table and perhaps a figure."""
    return Part(f"{test[0].upper()}{test[1:]}", [note], table, figure, file_name(test))


def write_curve_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page of the curve as HTML and Markdown, from its JSON values."""
    intervals = intervals_note(values)
    tests = [
        part_of_test(test, f"{_counts(measures)}. {intervals}", curve_table(values, test), curve_figure(values, test))
        for test, measures in values["tests"].items()
    ]
    gained = "Gains of the recommended recipe over the closed form, on nothing it was chosen by; empty where it is one."
    taken = "Means over seeds, of one thread; seconds are of all of the run, or what followed its last interruption."
    parts = [
        Part("Recommended recipe", [gained, intervals], recommendation_table(values)),
        Part("Gains of training", [_GAIN_NOTE, intervals], figure=gain_figure(values), name="gains"),
        Part("Where training begins to gain", [_CROSSING_NOTE], crossing_table(values)),
        *tests,
        Part("What training takes", [taken], cost_table(values)),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def _counts(measures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {found['num_examples']:,} queries" for name, found in measures.items())


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


CHOOSING = "names to choose by"
"""Half of the names never seen, by which the recommended recipe is chosen; the other half is the test."""
_Choices = Mapping[tuple[str, int], int]


def read_results(every: Sequence[SeedRuns]) -> Results:
    """Read all that was measured on the runs of these seeds, with the names never seen in two halves."""
    paths = [path for runs in every for path in sorted((runs.folder / "results").glob("*.json"))]
    names = {question(NAMES, size): question(CHOOSING, size) for size in every[0].num_pairs}
    found: list[Result] = []
    for result in map(Result.read, paths):
        found += halve(result, names[result.question]) if result.question in names else [result]
    return Results(found)


def halve(result: Result, choosing: str) -> Iterator[Result]:
    """Divide queries into the test and the half to choose by, whose question is named; a name is in one of them.

    Both halves have the same candidates.
    """
    for is_choosing, name in enumerate((result.question, choosing)):
        measures = {}
        for measure, (value_M, cluster_M) in result.measures.items():
            is_asked_M = cluster_M % 2 == is_choosing
            measures[measure] = MetricValues(value_M[is_asked_M], cluster_M[is_asked_M])
        count = max(len(item.values_M) for item in measures.values())
        yield replace(result, question=name, measures=measures, num_examples=count)


def curve_json(every: Sequence[SeedRuns], chosen: _Choices, results: Results) -> dict[str, Any]:
    """Return the curve as JSON values.

    Sizes are text. `runs`: recipe -> size -> its choice, validation recall of each seed, and means of what the training
    took. `tests`: test -> metric -> `recipes`, `gains` over the closed form of the size (recipe -> size -> value and
    interval), `crossings` (recipe -> pairs from which on it gains, with an interval: 0 is fewer than the smallest size
    has, null more than the largest has), `chance`. `closed_form`: size -> closed form that validation chose.
    `recommended`: size -> recipe with the highest recall on the names to choose by, which are no part of `tests`.
    Validation would not do: trained recipes have chosen their epoch by it. `controls`: recipes that are drawn thin.
    """
    sizes, recipes = list(every[0].num_pairs), every[0].recipes
    runs = {name: {str(size): run_json(every, name, size, chosen[name, size]) for size in sizes} for name in recipes}
    scored = [name for name, recipe in recipes.items() if recipe.control_of is None]
    closed = [name for name in scored if recipes[name].length is None]
    closed_form = {
        str(size): max(closed, key=lambda name: fmean(runs[name][str(size)]["validation"])) for size in sizes
    }
    trained = [name for name in scored if name not in closed]
    tests = {test: _curves_json(results, test, list(recipes), trained, closed_form) for test in every[0].tests}

    def recall(name: str, size: str) -> float:
        found = results.seeds(name, question(CHOOSING, int(size)))
        return fmean(item.values_M.mean() for result in found for item in result.measures.values())

    return {
        "seeds": [of_seed.seed for of_seed in every],
        "num_pairs": {size: of_size["num_pairs"] for size, of_size in runs[closed[0]].items()},
        "controls": [name for name in recipes if name not in trained],
        "closed_form": closed_form,
        "recommended": {size: max(scored, key=lambda name: recall(name, size)) for size in closed_form},
        "tests": tests,
        "runs": runs,
    }


def run_json(every: Sequence[SeedRuns], name: str, size: int, choice: int) -> dict[str, Any]:
    """Return what the trainings of a recipe took, with its choice and the validation recall of each seed."""
    paths = [runs.path(name, size, choice) for runs in every]
    reports, costs = [read_report(path) for path in paths], [read_cost(path) for path in paths]
    recipe = every[0].recipes[name]
    return {
        "num_pairs": fmean(report.num_samples["train"] for report in reports),
        "choice": dict(recipe.choices[choice]),
        "options": {**recipe.options, **(recipe.length.options(every[0].num_pairs[size]) if recipe.length else {})},
        "validation": [round_json(read_score(path)) for path in paths],
        "best_epochs": [report.best_epoch for report in reports],
        "epochs": fmean(cost.epochs for cost in costs),
        "seconds": round(fmean(cost.seconds for cost in costs), 1),
        "flops": fmean(cost.flops for cost in costs),
        "num_parameters": reports[0].num_parameters,
    }


def _curves_json(
    results: Results, test: str, names: Sequence[str], trained: Sequence[str], closed: Mapping[str, str]
) -> dict[str, Any]:
    """Return all estimates of one test; of each metric from the same resamples for all recipes and sizes."""
    asked = [question(test, int(size)) for size in closed]
    counts = [fmean(result.num_trained for result in results.seeds(names[0], size)) for size in asked]
    estimates = partial(_recipes_json, results, test, names, trained, closed, counts)
    return measures_json(results, names[0], asked[0], estimates)


def measures_json(
    results: Results, model: str, asked: str, estimates: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Return metric -> `num_examples`, `chance` and estimates, of a question whose examples all models share.

    Args:
        model: any of the models that were asked.
        estimates: metric -> what else is recorded of it.
    """
    found = results.seeds(model, asked)
    return {
        measure: {
            "num_examples": len(found[0].measures[measure].values_M),
            "chance": round_json(fmean(result.chance[measure] for result in found)),
            **estimates(measure),
        }
        for measure in found[0].measures
    }


def _recipes_json(
    results: Results,
    test: str,
    names: Sequence[str],
    trained: Sequence[str],
    closed: Mapping[str, str],
    counts: Sequence[float],
    measure: str,
) -> dict[str, Any]:
    asked = [(name, size) for name in names for size in closed]
    means = results.resample([(name, question(test, int(size))) for name, size in asked], measure)
    columns = dict(zip(asked, means.T, strict=True))
    gains = {name: {size: columns[name, size] - columns[closed[size], size] for size in closed} for name in trained}
    crossings = {
        name: interval_of(np.array([find_crossing(counts, row) for row in np.stack([*of_size.values()], axis=1)]))
        for name, of_size in gains.items()
    }
    return {
        "recipes": {name: estimates_json({size: columns[name, size] for size in closed}) for name in names},
        "gains": {name: estimates_json(of_size) for name, of_size in gains.items()},
        "crossings": {
            name: {"value": _finite(found.value), "interval": [_finite(found.low), _finite(found.high)]}
            for name, found in crossings.items()
        },
    }


def find_crossing(num_pairs: Sequence[float], gain_V: Array) -> float:
    """Return the number of pairs from which on a gain stays above zero.

    Between two sizes it is a line over the logarithm of the number of pairs. It is 0 if all gains are above zero, and
    infinite if the last one is not.

    Args:
        num_pairs: the sizes, ascending.
        gain_V: (V,) gain at each of them.
    """
    below = np.flatnonzero(gain_V <= 0)
    if not len(below):
        return 0.0
    last = int(below[-1])
    if last == len(gain_V) - 1:
        return float("inf")
    place = -gain_V[last] / (gain_V[last + 1] - gain_V[last])
    low, high = np.log(num_pairs[last : last + 2])
    return float(np.exp(low + place * (high - low)))


def _finite(value: float) -> float | None:
    return round(value, 1) if np.isfinite(value) else None


def estimate_of(values: Mapping[str, Any]) -> Estimate:
    """Return an estimate from its JSON values."""
    return Estimate(values["value"], *values["interval"])


def format_gain(gain: Estimate) -> str:
    """Return a gain with its interval as text, such as `+0.012 [-0.003, +0.027]`."""
    return f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def size_names(values: Mapping[str, Any]) -> dict[str, str]:
    """Return size -> number of pairs as text."""
    return {size: format_count(count) for size, count in values["num_pairs"].items()}


def curve_table(values: Mapping[str, Any], test: str) -> Table:
    """Return a test's metrics of each recipe by the number of pairs, with chance as the last row of each metric."""
    sizes, rows = size_names(values), []
    for measure, found in values["tests"][test].items():
        for name, of_size in found["recipes"].items():
            rows.append([measure, name, *(str(estimate_of(of_size[size])) for size in sizes)])
        rows.append([measure, "chance", *[format_fraction(found["chance"])] * len(sizes)])
    return ["", "recipe", *sizes.values()], rows


def crossing_table(values: Mapping[str, Any]) -> Table:
    """Return from how many pairs on each trained recipe is better than the closed form, by test and metric."""
    counts, rows, names = list(values["num_pairs"].values()), [], []
    for test, measures in values["tests"].items():
        for measure, found in measures.items():
            names = list(found["crossings"])
            rows.append([f"{test}, {measure}", *(format_crossing(found["crossings"][name], counts) for name in names)])
    return ["", *names], rows


def format_crossing(values: Mapping[str, Any], num_pairs: Sequence[float]) -> str:
    """Return a crossing with its interval as text, such as `4,200 [≤ 1,000, 9,100]`."""

    def text(value: float | None) -> str:
        if value is None:
            return f"> {format_count(num_pairs[-1])}"
        return format_count(value) if value else f"≤ {format_count(num_pairs[0])}"

    low, high = values["interval"]
    return f"{text(values['value'])} [{text(low)}, {text(high)}]"


def recommendation_table(values: Mapping[str, Any]) -> Table:
    """Return the recommended recipe for each number of pairs, and what it gains on each test."""
    columns = [f"{test}, {measure}" for test, measures in values["tests"].items() for measure in measures]
    rows = []
    for size, count in size_names(values).items():
        name, closed = values["recommended"][size], values["closed_form"][size]
        gains = [
            str(estimate_of(found["gains"][name][size])) if name in found["gains"] else ""
            for measures in values["tests"].values()
            for found in measures.values()
        ]
        rows.append([count, _with_choice(values, name, size), _with_choice(values, closed, size), *gains])
    return ["pairs", "recommended", "closed form", *columns], rows


def _with_choice(values: Mapping[str, Any], name: str, size: str) -> str:
    return ", ".join(filter(None, [name, choice_name(values["runs"][name][size]["choice"])]))


def main_measure(values: Mapping[str, Any], test: str) -> dict[str, Any]:
    """Return the estimates of the first metric of a test."""
    return dict(next(iter(values["tests"][test].values())))


def cost_table(values: Mapping[str, Any]) -> Table:
    """Return epochs, seconds and operations of the training of each recipe by the number of pairs."""
    sizes = size_names(values)
    rows = [
        [name, format_count(next(iter(of_size.values()))["num_parameters"]), *(_cost(of_size[size]) for size in sizes)]
        for name, of_size in values["runs"].items()
    ]
    return ["recipe", "parameters", *sizes.values()], rows


def _cost(run: Mapping[str, Any]) -> str:
    return f"{run['epochs']:.0f} epochs, {run['seconds']:,.0f} s, {run['flops'] / 1e12:,.2f} TFLOP"
