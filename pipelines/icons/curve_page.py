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
    "mean validation recall. The recommended recipe has the highest R@10 on half of the names never seen, and figures "
    "come from the other half. Recipes and tests are explained in `pipelines/icons/README.md`.",
)
INTERVALS = (
    "Brackets are 95% percentile intervals from 1,000 resamples of both seeds and items (icons of one name are drawn "
    "together), the same for everything compared."
)
_GAIN_NOTE = "The gain of each trained recipe over the closed form of the size, in recall at 10 of texts for an image."
_CROSSING_NOTE = (
    "The number of pairs from which on the gain over the closed form stays above zero, interpolated over the logarithm "
    "of the number of pairs; “≤” is at or below the smallest size, “>” more than all pairs."
)


def run_curve(
    data: Data,
    seeds: Sequence[int],
    sizes: Sequence[int],
    recipes: Mapping[str, Recipe] = RECIPES,
    *,
    name: str = "curve",
) -> dict[str, Any]:
    """Train and measure recipes on more and more pairs, except for finished runs, and return the curve as JSON values.

    Args:
        data: the icons.
        seeds: seeds of splits, draws and trainings.
        sizes: numbers of pairs, in addition to all.
        recipes: recipes by name.
        name: name of the page and of the folder of the runs.
    """
    seed_runs = open_runs(data, data.folder / name, seeds, curve_sizes(data, seeds[0], sizes), recipes)
    choices = run_all(seed_runs)

    # The digests of all runs decide whether the stored page is reused.
    weights = [Run.open(runs.path(*key, choice)).info.weights for runs in seed_runs for key, choice in choices.items()]

    def measure() -> dict[str, Any]:
        values = curve_json(seed_runs, choices, read_results(seed_runs))
        write_curve_pages(data.folder / name, values)
        return values

    values = data.step(name, {"runs": weights, "clothes": data.has_clothes}, measure)
    print_table(*recommendation_table(values), title="recommended, and gains over the closed form")
    print_table(*crossing_table(values), title="pairs from which on training gains")
    print_line(f"{data.folder / name}.html; {data.folder / name}.json")
    return values


def intervals_note(values: Mapping[str, Any]) -> str:
    """Return the note that explains the intervals of a page."""
    return INTERVALS + " With one seed they are over items only." * (len(values["seeds"]) == 1)


def part_of_test(test: str, note: str, table: Table, figure: Figure | None = None) -> Part:
    """Return the section of a test: a note, a table and perhaps a figure."""
    return Part(f"{test[0].upper()}{test[1:]}", [note], table, figure, file_name(test))


def write_curve_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page of the curve as HTML and Markdown, from its JSON values."""
    intervals = intervals_note(values)
    tests = [
        part_of_test(test, f"{_counts(measures)}. {intervals}", curve_table(values, test), curve_figure(values, test))
        for test, measures in values["tests"].items()
    ]

    gain_note = "Gains of the recommended recipe over the closed form, on unseen queries; empty if it is a closed form."
    cost_note = "Means over seeds, of one thread. Seconds are those of the whole run, or since its last interruption."

    parts = [
        Part("Recommended recipe", [gain_note, intervals], recommendation_table(values)),
        Part("Gains of training", [_GAIN_NOTE, intervals], figure=gain_figure(values), name="gains"),
        Part("Where training begins to gain", [_CROSSING_NOTE], crossing_table(values)),
        *tests,
        Part("What training takes", [cost_note], cost_table(values)),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def _counts(measures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {estimates['num_examples']:,} queries" for name, estimates in measures.items())


def curve_figure(values: Mapping[str, Any], test: str) -> Figure:
    """Draw each recipe by the number of pairs, both axes logarithmic, with the control and chance."""
    names = _ticks(values)
    places = list(values["num_pairs"].values())

    panels = {}
    for measure, estimates in values["tests"][test].items():
        lines = {}
        for name, by_size in estimates["recipes"].items():
            lines[name] = [estimate_of(by_size[size]) for size in names]
        lines["chance"] = [Estimate(*[estimates["chance"]] * 3)] * len(names)
        panels[measure] = Curves(list(names.values()), lines, places)

    return estimate_curves(
        panels,
        x="training pairs",
        y="recall" if len(panels) > 1 else "accuracy",
        controls=[*values["controls"], "chance"],
        is_log=True,
    )


def gain_figure(values: Mapping[str, Any]) -> Figure:
    """Draw the gain of each trained recipe over the closed form by the number of pairs, a panel per retrieval test."""
    names = _ticks(values)
    places = list(values["num_pairs"].values())

    panels = {}
    for test in (NAMES, FAMILIES, EMOJI):
        gains = next(iter(values["tests"][test].values()))["gains"]
        lines = {}
        for name, by_size in gains.items():
            lines[name] = [estimate_of(by_size[size]) for size in names]
        panels[test] = Curves(list(names.values()), lines, places)
    return estimate_curves(panels, x="training pairs", y="gain in recall at 10", is_gain=True)


def _ticks(values: Mapping[str, Any]) -> dict[str, str]:
    """Return size -> number of pairs in thousands, such as `161k`, short enough for neighbors on a logarithmic axis."""
    names = {}
    for size, count in values["num_pairs"].items():
        names[size] = format_count(count) if count < 1000 else f"{count / 1000:,.0f}k"
    return names


CHOOSING = "names to choose by"
"""Half of the names never seen, which choose the recommended recipe. The other half is the test."""
_Choices = Mapping[tuple[str, int], int]


def read_results(seed_runs: Sequence[SeedRuns]) -> Results:
    """Read all results of the runs of these seeds, with the names never seen in two halves."""
    paths = [path for runs in seed_runs for path in sorted((runs.folder / "results").glob("*.json"))]
    names = {question(NAMES, size): question(CHOOSING, size) for size in seed_runs[0].num_pairs}

    results: list[Result] = []
    for path in paths:
        result = Result.read(path)
        if result.question in names:
            results += halve(result, names[result.question])
        else:
            results.append(result)
    return Results(results)


def halve(result: Result, choosing: str) -> Iterator[Result]:
    """Split queries into the test and the half to choose by. All queries of a name are in the same half.

    Both halves have the same candidates. `choosing` is the question of the second half.
    """
    for is_choosing, name in enumerate((result.question, choosing)):
        measures = {}
        for measure, (value_M, cluster_M) in result.measures.items():
            # Clusters are names, so their parity splits the queries by name.
            is_half_M = cluster_M % 2 == is_choosing
            measures[measure] = MetricValues(value_M[is_half_M], cluster_M[is_half_M])

        count = max(len(item.values_M) for item in measures.values())
        yield replace(result, question=name, measures=measures, num_examples=count)


def curve_json(seed_runs: Sequence[SeedRuns], choices: _Choices, results: Results) -> dict[str, Any]:
    """Return the curve as JSON values.

    Sizes are strings. `runs`: recipe -> size -> its choice, validation recall of each seed, and mean costs of the
    training. `tests`: test -> metric -> `recipes`, `gains` over the closed form of the size (recipe -> size -> value
    and interval), `crossings` and `chance`. A crossing is recipe -> number of pairs from which on it gains, with an
    interval: 0 is below the smallest size, null above the largest. `closed_form`: size -> closed form that validation
    chose. `recommended`: size -> recipe with the highest recall on the names to choose by, which are not in `tests`.
    Validation would not do, because it already chose the epoch of trained recipes. `controls`: recipes drawn thin.
    """
    sizes = list(seed_runs[0].num_pairs)
    recipes = seed_runs[0].recipes
    runs: dict[str, dict[str, Any]] = {}
    for name in recipes:
        runs[name] = {str(size): run_json(seed_runs, name, size, choices[name, size]) for size in sizes}

    # Controls are never recommended.
    scored = [name for name, recipe in recipes.items() if recipe.control_of is None]
    closed_forms = [name for name in scored if recipes[name].length is None]
    trained = [name for name in scored if name not in closed_forms]

    closed_form = {}
    for size in map(str, sizes):
        scores = {name: fmean(runs[name][size]["validation"]) for name in closed_forms}
        closed_form[size] = max(closed_forms, key=scores.__getitem__)
    tests = {test: _curves_json(results, test, list(recipes), trained, closed_form) for test in seed_runs[0].tests}

    def recall(name: str, size: str) -> float:
        values: list[MetricValues] = []
        for result in results.seeds(name, question(CHOOSING, int(size))):
            values += result.measures.values()
        return fmean(value.values_M.mean() for value in values)

    return {
        "seeds": [item.seed for item in seed_runs],
        "num_pairs": {size: values["num_pairs"] for size, values in runs[closed_forms[0]].items()},
        "controls": [name for name in recipes if name not in trained],
        "closed_form": closed_form,
        "recommended": {size: max(scored, key=lambda name: recall(name, size)) for size in closed_form},
        "tests": tests,
        "runs": runs,
    }


def run_json(seed_runs: Sequence[SeedRuns], name: str, size: int, choice: int) -> dict[str, Any]:
    """Return the mean costs of the trainings of a recipe, its choice, and the validation recall of each seed."""
    paths = [runs.path(name, size, choice) for runs in seed_runs]
    reports = [read_report(path) for path in paths]
    costs = [read_cost(path) for path in paths]

    recipe = seed_runs[0].recipes[name]
    length = recipe.length.options(seed_runs[0].num_pairs[size]) if recipe.length else {}
    return {
        "num_pairs": fmean(report.num_samples["train"] for report in reports),
        "choice": dict(recipe.choices[choice]),
        "options": {**recipe.options, **length},
        "validation": [round_json(read_score(path)) for path in paths],
        "best_epochs": [report.best_epoch for report in reports],
        "epochs": fmean(cost.epochs for cost in costs),
        "seconds": round(fmean(cost.seconds for cost in costs), 1),
        "flops": fmean(cost.flops for cost in costs),
        "num_parameters": reports[0].num_parameters,
    }


def _curves_json(
    results: Results, test: str, names: Sequence[str], trained: Sequence[str], closed_form: Mapping[str, str]
) -> dict[str, Any]:
    """Return all estimates of a test. Each metric has the same resamples for all recipes and sizes."""
    questions = [question(test, int(size)) for size in closed_form]
    counts = [fmean(result.num_trained for result in results.seeds(names[0], name)) for name in questions]
    estimates = partial(_recipes_json, results, test, names, trained, closed_form, counts)
    return measures_json(results, names[0], questions[0], estimates)


def measures_json(
    results: Results, model: str, question_name: str, estimates: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Return metric -> `num_examples`, `chance` and estimates, for a question whose examples all models share.

    Args:
        model: any model that has results.
        estimates: metric -> its other values.
    """
    seeds = results.seeds(model, question_name)
    values = {}
    for measure in seeds[0].measures:
        values[measure] = {
            "num_examples": len(seeds[0].measures[measure].values_M),
            "chance": round_json(fmean(result.chance[measure] for result in seeds)),
            **estimates(measure),
        }
    return values


def _recipes_json(
    results: Results,
    test: str,
    names: Sequence[str],
    trained: Sequence[str],
    closed_form: Mapping[str, str],
    counts: Sequence[float],
    measure: str,
) -> dict[str, Any]:
    models = [(name, size) for name in names for size in closed_form]
    means = results.resample([(name, question(test, int(size))) for name, size in models], measure)
    columns = dict(zip(models, means.T, strict=True))

    gains = {}
    crossings = {}
    for name in trained:
        gains[name] = {size: columns[name, size] - columns[closed_form[size], size] for size in closed_form}

        # One crossing per resample, so that its interval follows from those of the gains.
        gain_RV = np.stack([*gains[name].values()], axis=1)
        crossing = interval_of(np.array([find_crossing(counts, gain_V) for gain_V in gain_RV]))
        interval = [_finite(crossing.low), _finite(crossing.high)]
        crossings[name] = {"value": _finite(crossing.value), "interval": interval}

    recipes = {}
    for name in names:
        recipes[name] = estimates_json({size: columns[name, size] for size in closed_form})
    return {
        "recipes": recipes,
        "gains": {name: estimates_json(by_size) for name, by_size in gains.items()},
        "crossings": crossings,
    }


def find_crossing(num_pairs: Sequence[float], gain_V: Array) -> float:
    """Return the number of pairs from which on a gain stays above zero.

    Between two sizes, the gain is a line over the logarithm of the number of pairs. Returns 0 if all gains are above
    zero, and infinity if the last one is not.

    Args:
        num_pairs: the sizes, ascending.
        gain_V: (V,) gain at each size.
    """
    losses = np.flatnonzero(gain_V <= 0)
    if not len(losses):
        return 0.0

    last = int(losses[-1])
    if last == len(gain_V) - 1:
        return float("inf")

    # Linear interpolation to the zero of the gain, over the logarithm of the number of pairs.
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
    sizes = size_names(values)
    rows = []
    for measure, estimates in values["tests"][test].items():
        for name, by_size in estimates["recipes"].items():
            rows.append([measure, name, *(str(estimate_of(by_size[size])) for size in sizes)])
        rows.append([measure, "chance", *[format_fraction(estimates["chance"])] * len(sizes)])
    return ["", "recipe", *sizes.values()], rows


def crossing_table(values: Mapping[str, Any]) -> Table:
    """Return the number of pairs from which on each trained recipe beats the closed form, by test and metric."""
    counts = list(values["num_pairs"].values())
    rows = []
    names: list[str] = []
    for test, measures in values["tests"].items():
        for measure, estimates in measures.items():
            names = list(estimates["crossings"])
            cells = [format_crossing(estimates["crossings"][name], counts) for name in names]
            rows.append([f"{test}, {measure}", *cells])
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
    """Return the recommended recipe for each number of pairs, and its gain on each test."""
    columns = [f"{test}, {measure}" for test, measures in values["tests"].items() for measure in measures]
    rows = []
    for size, count in size_names(values).items():
        name = values["recommended"][size]
        closed_form = values["closed_form"][size]

        gains = []
        for measures in values["tests"].values():
            for estimates in measures.values():
                # A closed form has no gain over itself.
                gain = estimates["gains"].get(name)
                gains.append(str(estimate_of(gain[size])) if gain else "")
        rows.append([count, _with_choice(values, name, size), _with_choice(values, closed_form, size), *gains])
    return ["pairs", "recommended", "closed form", *columns], rows


def _with_choice(values: Mapping[str, Any], name: str, size: str) -> str:
    return ", ".join(filter(None, [name, choice_name(values["runs"][name][size]["choice"])]))


def main_measure(values: Mapping[str, Any], test: str) -> dict[str, Any]:
    """Return the estimates of the first metric of a test."""
    return dict(next(iter(values["tests"][test].values())))


def cost_table(values: Mapping[str, Any]) -> Table:
    """Return epochs, seconds and operations of the training of each recipe by the number of pairs."""
    sizes = size_names(values)
    rows = []
    for name, runs in values["runs"].items():
        num_parameters = next(iter(runs.values()))["num_parameters"]
        rows.append([name, format_count(num_parameters), *(_cost(runs[size]) for size in sizes)])
    return ["recipe", "parameters", *sizes.values()], rows


def _cost(run: Mapping[str, Any]) -> str:
    return f"{run['epochs']:.0f} epochs, {run['seconds']:,.0f} s, {run['flops'] / 1e12:,.2f} TFLOP"
