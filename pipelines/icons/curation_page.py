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
NOTES = ("Each method selects as many pairs of the training part. What it is: `pipelines/icons/README.md`.",)
_RANDOM_NOTE = "In each resample random is one of its draws. Of 40 intervals two exclude zero by chance."
_GAIN_NOTE = (
    "Random itself, and what each method gains over it, with 95% intervals. *: less than half of the pairs are the "
    "method's. Blue bars: methods with concepts; gray: one more random draw."
)
_VERDICT_NOTE = (
    "Better than random (the interval of the gain is above zero) / undecided / worse, without budgets of which a "
    "method found less than half."
)


def run_curation(
    data: Data,
    seeds: Sequence[int],
    budgets: Sequence[int],
    methods: Mapping[str, Sequence[Step]] = METHODS,
    recipes: Mapping[str, Recipe] = TAUGHT,
) -> dict[str, Any]:
    """Select, train and measure at each budget, but for what is finished; return all as JSON values, with a page."""
    data.measure_coverage()
    data.cut_target()
    curation = Curation(data, seeds, budgets, methods, recipes)
    chosen = curation.run_all()

    def measure() -> dict[str, Any]:
        values = curation_json(curation, chosen, read_results(curation))
        write_curation_pages(data.folder / "curation", values)
        return values

    trained = [Run.open(run.path).info.weights for run in curation.all_runs(chosen)]
    values = data.step("curation", {"runs": trained, "clothes": data.has_clothes}, measure)
    print_table(*verdict_table(values), title="better than random / undecided / worse")
    print_line(f"{data.folder / 'curation.html'}; {data.folder / 'curation.json'}")
    return values


def write_curation_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page of curation as HTML and Markdown, from its JSON values."""
    intervals = f"{intervals_note(values)} {_RANDOM_NOTE}"
    tests = [
        part_of_test(
            test,
            f"{main_measure(values, test)['num_examples']:,} queries. {_GAIN_NOTE}",
            gain_table(values, test),
            gain_figure(values, test),
        )
        for test in values["tests"]
    ]
    parts = [
        Part("Better or worse than random", [_VERDICT_NOTE, intervals], verdict_table(values)),
        *tests,
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def gain_figure(values: Mapping[str, Any], test: str) -> Figure:
    """Draw the gain of each method over random with its interval: a panel per recipe and budget."""
    found, sizes = main_measure(values, test), size_names(values)
    colors = [_color(name, values["concept_methods"]) for name in values["methods"]]
    height = 0.6 + len(found["recipes"]) * (0.7 + 0.27 * len(colors))
    axes_RP = open_axes(
        height,
        width=2.2 + 3.2 * len(sizes),
        nrows=len(found["recipes"]),
        ncols=len(sizes),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes_P, (recipe, of_size) in zip(axes_RP, found["recipes"].items(), strict=True):
        for axes, (size, count) in zip(axes_P, sizes.items(), strict=True):
            gains = {name: estimate_of(gain) for name, gain in of_size[size]["gains"].items()}
            estimate_bars(axes, gains, height=0.6, colors=colors, is_gain=True)
            axes.set_title(f"{recipe}, {count} pairs", color=INK, fontsize=11)
            label(axes, "gain over random" * (recipe == list(found["recipes"])[-1]))
    figure: Figure = axes_RP[0, 0].figure
    return figure


def _color(name: str, concept_methods: Sequence[str]) -> str:
    if name == AGAIN:
        return SOFT
    return COLORS[0] if name in concept_methods else COLORS[1]


RANDOM = "random"
_BETTER, _UNDECIDED, _WORSE = "better", "undecided", "worse"


def read_results(curation: Curation) -> Results:
    """Read all that was measured; a model is a method and a recipe, and the metric of both directions comes first."""
    return Results(
        replace(with_both(result), model=_model(name, result.model))
        for name, every in curation.runs.items()
        for runs in every
        for path in sorted((runs.folder / "results").glob("*.json"))
        for result in [Result.read(path)]
    )


def _model(method: str, recipe: str) -> str:
    return f"{method}; {recipe}"


def curation_json(curation: Curation, chosen: Mapping[tuple[str, int], int], results: Results) -> dict[str, Any]:
    """Return all of curation as JSON values.

    Budgets are text. `recipes`: recipe -> budget -> its choice and the mean validation recall of the draws that chose
    it. `selections`: method -> budget -> means over seeds of what `Curation.select` returns. `tests`: test ->
    metric -> `num_examples`, `chance`, and `recipes` -> recipe -> budget -> `values` and `gains` over random of each
    method. `concept_methods`: methods that are given the names of concepts.
    """
    draws = [curation.runs[name][0] for name in DRAWS]
    methods = [name for name in curation.methods if name not in DRAWS]
    selections = {
        name: {str(size): _selection_json(curation, names, size) for size in curation.budgets}
        for name, names in {RANDOM: [*DRAWS], **{name: [name] for name in methods}}.items()
    }
    recipes = {
        name: {
            str(size): {
                "choice": dict(recipe.choices[chosen[name, size]]),
                "validation": round_json(
                    fmean(read_score(runs.path(name, size, chosen[name, size])) for runs in draws)
                ),
            }
            for size in curation.budgets
        }
        for name, recipe in draws[0].recipes.items()
    }
    return {
        "seeds": [runs.seed for runs in curation.runs[AGAIN]],
        "num_pairs": {str(size): size for size in curation.budgets},
        "num_draws": len(DRAWS),
        "methods": methods,
        "concept_methods": [
            name for name in methods if any("concepts" in step.inputs for step in curation.methods[name])
        ],
        "recipes": recipes,
        "selections": selections,
        "tests": {test: _budgets_json(results, test, methods, selections, list(recipes)) for test in draws[0].tests},
    }


def _selection_json(curation: Curation, names: Sequence[str], size: int) -> dict[str, Any]:
    """Return what the selections of some methods took and hold, means over methods and seeds."""
    folders = [runs.folder for name in names for runs in curation.runs[name]]
    found = [read_json(selection_path(folder, size).with_suffix(".json"))["values"] for folder in folders]
    return {name: round(fmean(values[name] for values in found), 4) for name in found[0]}


def _budgets_json(
    results: Results, test: str, methods: Sequence[str], selections: Mapping[str, Any], recipes: Sequence[str]
) -> dict[str, Any]:
    """Return all estimates of one test: metric -> recipe -> budget, each from resamples of its own."""
    sizes = list(selections[RANDOM])

    def estimates(measure: str) -> dict[str, Any]:
        """Return the estimates of one metric."""
        of_recipe = {
            recipe: {
                size: _methods_json(
                    results,
                    question(test, int(size)),
                    measure,
                    recipe,
                    methods,
                )
                for size in sizes
            }
            for recipe in recipes
        }
        return {"recipes": of_recipe}

    return measures_json(results, _model(AGAIN, recipes[0]), question(test, int(sizes[0])), estimates)


def _methods_json(results: Results, asked: str, measure: str, recipe: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return recalls and gains of one test, recipe and budget, all from the same resamples.

    In each resample, random is one of its draws: an interval holds how much one draw differs from another.
    """
    means = results.resample([(_model(name, recipe), asked) for name in [*DRAWS, *methods]], measure)
    draw_R = np.random.default_rng(0).integers(len(DRAWS), size=len(means))
    random_R = means[np.arange(len(means)), draw_R]
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
    """Return whether a method found less than half of a budget; the others were drawn at random."""
    return bool(2 * values["selections"][name][size]["num_filled"] > int(size))


def iterate_gains(values: Mapping[str, Any], names: Sequence[str], tests: Sequence[str] | None = None) -> Iterator[Any]:
    """Iterate over the gains of methods on tests, or on all, with each recipe and budget of which they found half."""
    for test in values["tests"] if tests is None else tests:
        for of_size in main_measure(values, test)["recipes"].values():
            for size, found in of_size.items():
                yield from (found["gains"][name] for name in names if not is_mostly_random(values, name, size))


def count_verdicts(values: Mapping[str, Any], names: Sequence[str], tests: Sequence[str] | None = None) -> str:
    """Return how often methods are better than random, undecided, and worse, such as `3 / 4 / 1`."""
    counts = Counter(map(verdict, iterate_gains(values, names, tests)))
    return " / ".join(str(counts[name]) for name in (_BETTER, _UNDECIDED, _WORSE))


def verdict_table(values: Mapping[str, Any]) -> Table:
    """Return how often each method is better than random, undecided and worse on each test, and its mean gain."""
    rows = []
    gains = {name: [gain["value"] for gain in iterate_gains(values, [name])] for name in values["methods"]}
    means = {name: fmean(of_method) for name, of_method in gains.items() if of_method}
    for name in sorted(means, key=lambda name: -means[name]):
        counts = [count_verdicts(values, [name], [test]) for test in values["tests"]]
        rows.append([name, *counts, count_verdicts(values, [name]), f"{means[name]:+.3f}"])
    return ["method", *values["tests"], "all", "mean gain"], rows


def gain_table(values: Mapping[str, Any], test: str) -> Table:
    """Return the recall of random draws and of chance, and the gain of each method over random, by budget."""
    sizes, found = size_names(values), main_measure(values, test)
    rows = []
    for recipe, of_size in found["recipes"].items():
        at = [str(estimate_of(of_size[size]["values"][RANDOM])) for size in sizes]
        rows.append([f"{recipe}, {RANDOM}", *at])
        for name in values["methods"]:
            gains = [format_gain(estimate_of(of_size[size]["gains"][name])) for size in sizes]
            stars = [" *" * is_mostly_random(values, name, size) for size in sizes]
            rows.append([f"{recipe}, {name}", *map("".join, zip(gains, stars, strict=True))])
    rows.append(["chance", *[format_fraction(found["chance"])] * len(sizes)])
    return ["", *sizes.values()], rows
