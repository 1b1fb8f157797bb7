"""The page of curation: gains of each method over random draws on each test, costs and concepts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from embedcache.cli.console import print_line, print_table
from embedcache.provenance import read_json
from embedcache.reports.figures import COLORS, INK, SOFT, estimate_bars, label, open_axes
from embedcache.reports.render import Table, format_fraction, round_json
from embedcache.runs import Run
from pipelines.icons.curation import AGAIN, DRAWS, METHODS, TAUGHT, Curation, Step
from pipelines.icons.curve import Recipe, question, read_score, selection_path
from pipelines.icons.curve_page import (
    CREDIT,
    estimate_of,
    format_gain,
    intervals_note,
    main_measure,
    measures_json,
    part_of_test,
    size_names,
)
from pipelines.icons.steps import Data
from pipelines.results import Part, Result, Results, estimates_json, with_both, write_pages

TITLE = "Is curation worth it at scale? Equal numbers of icons by several methods, compared with random draws"
NOTES = ("Each method selects as many pairs of the training part. They are explained in `pipelines/icons/README.md`.",)
_RANDOM_NOTE = "In each resample random is one of its draws. Of 40 intervals two exclude zero by chance."
_RANDOM_NOTE = "In each resample, random is one of its draws. By chance, 2 of 40 intervals exclude zero."
_GAIN_NOTE = (
    "Random itself, and the gain of each method over it, with 95% intervals. *: the method selected less than half of "
    "the pairs. Blue bars: methods with concepts; gray: one more random draw."
)
_VERDICT_NOTE = (
    "Better than random (the interval of the gain is above zero) / undecided / worse, without budgets of which a "
    "method selected less than half."
)


def run_curation(
    data: Data,
    seeds: Sequence[int],
    budgets: Sequence[int],
    methods: Mapping[str, Sequence[Step]] = METHODS,
    recipes: Mapping[str, Recipe] = TAUGHT,
) -> dict[str, Any]:
    """Run all unfinished selections, trainings and tests, write a page, and return the results as JSON values."""
    data.measure_coverage()
    data.cut_target()
    curation = Curation(data, seeds, budgets, methods, recipes)
    choices = curation.run_all()

    def measure() -> dict[str, Any]:
        values = curation_json(curation, choices, read_results(curation))
        write_curation_pages(data.folder / "curation", values)
        return values

    # The digests of all runs decide whether the stored page is reused.
    weights = [Run.open(run.path).info.weights for run in curation.all_runs(choices)]
    values = data.step("curation", {"runs": weights, "clothes": data.has_clothes}, measure)

    print_table(*verdict_table(values), title="better than random / undecided / worse")
    print_line(f"{data.folder / 'curation.html'}; {data.folder / 'curation.json'}")
    return values


def write_curation_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page of curation as HTML and Markdown, from its JSON values."""
    intervals = f"{intervals_note(values)} {_RANDOM_NOTE}"
    tests = []
    for test in values["tests"]:
        note = f"{main_measure(values, test)['num_examples']:,} queries. {_GAIN_NOTE}"
        tests.append(part_of_test(test, note, gain_table(values, test), gain_figure(values, test)))
    parts = [
        Part("Better or worse than random", [_VERDICT_NOTE, intervals], verdict_table(values)),
        *tests,
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def gain_figure(values: Mapping[str, Any], test: str) -> Figure:
    """Draw the gain of each method over random with its interval: a panel per recipe and budget."""
    recipes = main_measure(values, test)["recipes"]
    sizes = size_names(values)
    colors = [_color(name, values["concept_methods"]) for name in values["methods"]]

    height = 0.6 + len(recipes) * (0.7 + 0.27 * len(colors))
    axes_RP = open_axes(
        height,
        width=2.2 + 3.2 * len(sizes),
        nrows=len(recipes),
        ncols=len(sizes),
        squeeze=False,
        sharex=True,
        sharey=True,
    )

    # Recipes are rows and budgets are columns, with one axis of gains for all.
    for axes_P, (recipe, estimates) in zip(axes_RP, recipes.items(), strict=True):
        for axes, (size, count) in zip(axes_P, sizes.items(), strict=True):
            gains = {name: estimate_of(gain) for name, gain in estimates[size]["gains"].items()}
            estimate_bars(axes, gains, height=0.6, colors=colors, is_gain=True)
            axes.set_title(f"{recipe}, {count} pairs", color=INK, fontsize=11)
            label(axes, "gain over random" * (recipe == list(recipes)[-1]))

    figure: Figure = axes_RP[0, 0].figure
    return figure


def _color(name: str, concept_methods: Sequence[str]) -> str:
    if name == AGAIN:
        return SOFT
    return COLORS[0] if name in concept_methods else COLORS[1]


RANDOM = "random"
_BETTER = "better"
_UNDECIDED = "undecided"
_WORSE = "worse"


def read_results(curation: Curation) -> Results:
    """Read all results. A model is a method and a recipe, and the metric of both directions comes first."""
    results = []
    for name, method_runs in curation.runs.items():
        for runs in method_runs:
            for path in sorted((runs.folder / "results").glob("*.json")):
                result = Result.read(path)
                results.append(replace(with_both(result), model=_model(name, result.model)))
    return Results(results)


def _model(method: str, recipe: str) -> str:
    return f"{method}; {recipe}"


def curation_json(curation: Curation, choices: Mapping[tuple[str, int], int], results: Results) -> dict[str, Any]:
    """Return all of curation as JSON values.

    Budgets are strings. `recipes`: recipe -> budget -> its choice and the mean validation recall of the draws that
    chose it. `selections`: method -> budget -> means over seeds of the values of `Curation.select`. `tests`: test ->
    metric -> `num_examples`, `chance`, and `recipes` -> recipe -> budget -> `values` and `gains` over random of each
    method. `concept_methods`: methods that use the names of concepts.
    """
    # Only the draws of the first seed chose settings.
    draws = [curation.runs[name][0] for name in DRAWS]
    methods = [name for name in curation.methods if name not in DRAWS]
    concept_methods = [name for name in methods if any("concepts" in step.inputs for step in curation.methods[name])]

    selections = {RANDOM: _selections_json(curation, list(DRAWS))}
    selections |= {name: _selections_json(curation, [name]) for name in methods}

    recipes: dict[str, Any] = {}
    for name, recipe in draws[0].recipes.items():
        recipes[name] = {}
        for size in curation.budgets:
            choice = choices[name, size]
            score = fmean(read_score(runs.path(name, size, choice)) for runs in draws)
            recipes[name][str(size)] = {"choice": dict(recipe.choices[choice]), "validation": round_json(score)}

    return {
        "seeds": [runs.seed for runs in curation.runs[AGAIN]],
        "num_pairs": {str(size): size for size in curation.budgets},
        "num_draws": len(DRAWS),
        "methods": methods,
        "concept_methods": concept_methods,
        "recipes": recipes,
        "selections": selections,
        "tests": {test: _budgets_json(results, test, methods, selections, list(recipes)) for test in draws[0].tests},
    }


def _selections_json(curation: Curation, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return budget -> values of the selections of some methods, as means over methods and seeds."""
    folders = [runs.folder for name in names for runs in curation.runs[name]]
    budgets = {}
    for size in curation.budgets:
        values = [read_json(selection_path(folder, size).with_suffix(".json"))["values"] for folder in folders]
        budgets[str(size)] = {name: round(fmean(value[name] for value in values), 4) for name in values[0]}
    return budgets


def _budgets_json(
    results: Results, test: str, methods: Sequence[str], selections: Mapping[str, Any], recipes: Sequence[str]
) -> dict[str, Any]:
    """Return all estimates of a test: metric -> recipe -> budget, each from separate resamples."""
    sizes = list(selections[RANDOM])

    def estimates(measure: str) -> dict[str, Any]:
        """Return the estimates of one metric."""
        values: dict[str, Any] = {}
        for recipe in recipes:
            values[recipe] = {}
            for size in sizes:
                name = question(test, int(size))
                values[recipe][size] = _methods_json(results, name, measure, recipe, methods)
        return {"recipes": values}

    return measures_json(results, _model(AGAIN, recipes[0]), question(test, int(sizes[0])), estimates)


def _methods_json(
    results: Results, question_name: str, measure: str, recipe: str, methods: Sequence[str]
) -> dict[str, Any]:
    """Return recalls and gains of one test, recipe and budget, all from the same resamples.

    In each resample, random is one of its draws, so that an interval includes the differences between draws.
    """
    means = results.resample([(_model(name, recipe), question_name) for name in [*DRAWS, *methods]], measure)

    # One draw per resample, so that the spread between draws is part of the interval.
    draw_R = np.random.default_rng(0).integers(len(DRAWS), size=len(means))
    random_R = means[np.arange(len(means)), draw_R]

    # The first row has the estimates themselves, for which random is the mean of its draws.
    random_R[0] = means[0, : len(DRAWS)].mean()

    columns = {RANDOM: random_R, **dict(zip(methods, means.T[len(DRAWS) :], strict=True))}
    gains = {name: columns[name] - random_R for name in methods}
    return {
        "values": estimates_json(columns),
        "gains": estimates_json(gains),
    }


def verdict(gain: Mapping[str, Any]) -> str:
    """Return whether a method is better or worse than random, by the interval of its gain."""
    low, high = gain["interval"]
    return _BETTER if low > 0 else _WORSE if high < 0 else _UNDECIDED


def is_mostly_random(values: Mapping[str, Any], name: str, size: str) -> bool:
    """Return whether a method selected less than half of a budget, and the rest is random."""
    return bool(2 * values["selections"][name][size]["num_filled"] > int(size))


def iterate_gains(values: Mapping[str, Any], names: Sequence[str], tests: Sequence[str] | None = None) -> Iterator[Any]:
    """Iterate over the gains of methods on some or all tests, for each recipe and each budget that they half filled."""
    for test in values["tests"] if tests is None else tests:
        for budgets in main_measure(values, test)["recipes"].values():
            for size, estimates in budgets.items():
                yield from (estimates["gains"][name] for name in names if not is_mostly_random(values, name, size))


def count_verdicts(values: Mapping[str, Any], names: Sequence[str], tests: Sequence[str] | None = None) -> str:
    """Return how often methods are better than random, undecided and worse, such as `3 / 4 / 1`."""
    counts = Counter(map(verdict, iterate_gains(values, names, tests)))
    return " / ".join(str(counts[name]) for name in (_BETTER, _UNDECIDED, _WORSE))


def verdict_table(values: Mapping[str, Any]) -> Table:
    """Return how often each method is better than random, undecided and worse on each test, and its mean gain."""
    means = {}
    for name in values["methods"]:
        # A method that never filled half of a budget has no mean gain.
        gains = [gain["value"] for gain in iterate_gains(values, [name])]
        if gains:
            means[name] = fmean(gains)

    rows = []
    for name in sorted(means, key=lambda name: -means[name]):
        counts = [count_verdicts(values, [name], [test]) for test in values["tests"]]
        rows.append([name, *counts, count_verdicts(values, [name]), f"{means[name]:+.3f}"])
    return ["method", *values["tests"], "all", "mean gain"], rows


def gain_table(values: Mapping[str, Any], test: str) -> Table:
    """Return the recall of random draws and of chance, and the gain of each method over random, by budget."""
    sizes = size_names(values)
    measure = main_measure(values, test)

    rows = []
    for recipe, estimates in measure["recipes"].items():
        recalls = [str(estimate_of(estimates[size]["values"][RANDOM])) for size in sizes]
        rows.append([f"{recipe}, {RANDOM}", *recalls])
        for name in values["methods"]:
            cells = []
            for size in sizes:
                star = " *" * is_mostly_random(values, name, size)
                cells.append(format_gain(estimate_of(estimates[size]["gains"][name])) + star)
            rows.append([f"{recipe}, {name}", *cells])
    rows.append(["chance", *[format_fraction(measure["chance"])] * len(sizes)])
    return ["", *sizes.values()], rows
