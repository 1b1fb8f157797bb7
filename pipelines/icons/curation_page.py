"""The page of curation: gains of each method over random draws on each test, costs, concepts, and what was claimed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from embedcache.arrays import Array
from embedcache.cli.console import print_line, print_table
from embedcache.metrics.intervals import interval_of
from embedcache.provenance import digest_file, read_json
from embedcache.reports.base import (
    COLORS,
    INK,
    SOFT,
    Table,
    estimate_bars,
    format_count,
    format_estimate,
    format_fraction,
    format_percent,
    label,
    open_axes,
    round_json,
)
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
    validation_table,
)
from pipelines.icons.results import NAMES
from pipelines.icons.steps import Data
from pipelines.results import Part, Result, Results, estimate_json, estimates_json, with_both, write_pages

TITLE = "Is curation worth it at scale? Equal numbers of icons by several methods, compared with random draws"
NOTES = (
    "The pairs, tests and recipes of the learning curve. Each method selects a budget of pairs from the training part "
    "of each seed's split, with `embedcache curate`, and every budget is the number of pairs that is trained on. Where "
    "a method finds fewer, the others are drawn at random. What each method is: `pipelines/icons/README.md`.",
)
_RANDOM_NOTE = "In each resample random is one of its draws. Of 40 intervals two exclude zero by chance."
_GAIN_NOTE = (
    "Random itself, and what each method gains over it, with 95% intervals. *: less than half of the pairs are the "
    "method's. Blue bars: methods with concepts; gray: one more random draw."
)
_VERDICT_NOTE = (
    "Better than random (the interval of the gain is above zero) / undecided / worse, without budgets of which a "
    "method found less than half."
)
_CORRELATION_NOTE = "Spearman's rank correlation over methods of the number of concepts covered and the gain."
_SELECTION_NOTE = (
    "Means over seeds. Seconds are of the selection alone; a step that several methods or budgets share is counted in "
    "each. Concepts: those with a selected pair; Gini: of the pairs of all concepts, 0 is even."
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

    trained = [digest_file(run.path / "config.json") for run in curation.all_runs(chosen)]
    values = data.step("curation", {"runs": trained, "clothes": data.has_clothes}, measure)
    print_table(*verdict_table(values), title="better than random / undecided / worse")
    print_line(summarize(values))
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
    removed = "Near-duplicates among the images of the training part, means over seeds."
    validated = validation_table({**values, "runs": values["recipes"]})
    parts = [
        Part("Better or worse than random", [_VERDICT_NOTE, intervals], verdict_table(values)),
        *tests,
        Part("Concepts and gains", [_CORRELATION_NOTE], correlation_table(values)),
        Part("What selections cost and cover", [_SELECTION_NOTE], selection_table(values)),
        *([Part("What deduplication removes", [removed], dedup_table(values))] if values["dedup"] else []),
        Part(
            "Validation recall of random draws",
            ["R@1, R@5, R@10, and what is chosen."],
            validated,
        ),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, summary=summarize(values), credit=CREDIT)


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
PAPER = "rare-first"
"""The curation of "Harnessing Frozen Unimodal Encoders for Flexible Multimodal Alignment" (CVPR 2025)."""
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
    it. `selections`: method -> budget -> means over seeds of what `Curation.select` returns. `dedup`: what
    deduplication removes of the training part of each seed. `tests`: test -> metric -> `num_examples`, `chance`, and
    `recipes` -> recipe -> budget -> `values` and `gains` over random of each method, and `correlation` of the gains
    with the number of concepts, over methods. `concept_methods`: methods that are given the names of concepts.
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
        "dedup": [read_json(path)["values"] for path in curation.dedup_paths()],
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
                    [selections[name][size]["concepts"] for name in methods],
                )
                for size in sizes
            }
            for recipe in recipes
        }
        return {"recipes": of_recipe}

    return measures_json(results, _model(AGAIN, recipes[0]), question(test, int(sizes[0])), estimates)


def _methods_json(
    results: Results, asked: str, measure: str, recipe: str, methods: Sequence[str], concepts: Sequence[float]
) -> dict[str, Any]:
    """Return recalls and gains of one test, recipe and budget, all from the same resamples.

    In each resample, random is one of its draws: an interval holds how much one draw differs from another.
    """
    means = results.resample([(_model(name, recipe), asked) for name in [*DRAWS, *methods]], measure)
    draw_R = np.random.default_rng(0).integers(len(DRAWS), size=len(means))
    random_R = means[np.arange(len(means)), draw_R]
    random_R[0] = means[0, : len(DRAWS)].mean()
    columns = {RANDOM: random_R, **dict(zip(methods, means.T[len(DRAWS) :], strict=True))}
    gains = {name: columns[name] - random_R for name in methods}
    correlation_R = rank_correlations(np.array(concepts), np.stack(list(gains.values()), axis=1))
    return {
        "values": estimates_json(columns),
        "gains": estimates_json(gains),
        "correlation": estimate_json(interval_of(correlation_R)),
    }


def rank_correlations(x_M: Array, values_RM: Array) -> Array:
    """Compute Spearman's rho of x and each row of values: (R,); 0 where one of them is constant."""
    first_M, second_RM = rankdata(x_M), rankdata(values_RM, axis=1)
    first_M, second_RM = first_M - first_M.mean(), second_RM - second_RM.mean(axis=1, keepdims=True)
    lengths_R = np.sqrt((first_M**2).sum() * (second_RM**2).sum(axis=1))
    return np.asarray(second_RM @ first_M / np.where(lengths_R > 0, lengths_R, np.inf))


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
        at = [format_estimate(estimate_of(of_size[size]["values"][RANDOM])) for size in sizes]
        rows.append([f"{recipe}, {RANDOM}", *at])
        for name in values["methods"]:
            gains = [format_gain(estimate_of(of_size[size]["gains"][name])) for size in sizes]
            stars = [" *" * is_mostly_random(values, name, size) for size in sizes]
            rows.append([f"{recipe}, {name}", *map("".join, zip(gains, stars, strict=True))])
    rows.append(["chance", *[format_fraction(found["chance"])] * len(sizes)])
    return ["", *sizes.values()], rows


def selection_table(values: Mapping[str, Any]) -> Table:
    """Return what each selection costs, covers, and lacked."""
    rows = []
    for name, of_size in values["selections"].items():
        for size, count in size_names(values).items():
            found = of_size[size]
            rows.append(
                [
                    name,
                    count,
                    format_count(found["num_filled"]),
                    f"{found['cpu']:,.1f}",
                    f"{found['wall']:,.1f}",
                    format_count(found["concepts"]),
                    format_percent(found["matched"] / int(size)),
                    format_fraction(found["gini"]),
                ]
            )
    return ["method", "pairs", "filled at random", "CPU s", "wall s", "concepts", "pairs with a concept", "Gini"], rows


def correlation_table(values: Mapping[str, Any]) -> Table:
    """Return the rank correlation of concepts and gains over methods, by test, recipe and budget."""
    sizes = size_names(values)
    rows = [
        [test, recipe, *(format_estimate(estimate_of(of_size[size]["correlation"])) for size in sizes)]
        for test in values["tests"]
        for recipe, of_size in main_measure(values, test)["recipes"].items()
    ]
    return ["test", "recipe", *sizes.values()], rows


def dedup_table(values: Mapping[str, Any]) -> Table:
    """Return how many pairs of the training part deduplication would remove at each cosine, means over seeds."""
    of_seeds = values["dedup"]
    total = fmean(found["num_samples"] for found in of_seeds)
    rows = []
    for number, (cosine, _) in enumerate(of_seeds[0]["levels"]):
        gone = [found["levels"][number][1] for found in of_seeds]
        if None not in gone:
            rows.append(
                [
                    "copies only" if cosine is None else f"{cosine:g}",
                    format_count(fmean(gone)),
                    format_percent(fmean(gone) / total),
                ]
            )
    return ["cosine", "removed", "of the training part"], rows


def summarize(values: Mapping[str, Any]) -> str:
    """Return which methods are better and worse than random on names never seen, and whether concepts are worth it."""
    recipe, of_size = list(main_measure(values, NAMES)["recipes"].items())[-1]
    lines = []
    for size, count in size_names(values).items():
        names = [name for name in values["methods"] if name != AGAIN and not is_mostly_random(values, name, size)]
        gains = {name: of_size[size]["gains"][name] for name in names}
        ranked = sorted(gains, key=lambda name: -gains[name]["value"])
        parts = [f"random {of_size[size]['values'][RANDOM]['value']:.3f}"]
        for kind in (_BETTER, _WORSE):
            named = [f"{name} {gains[name]['value']:+.3f}" for name in ranked if verdict(gains[name]) == kind]
            parts.append(f"{kind}: {', '.join(named) or 'none'}")
        lines.append(f"{count} pairs: {'; '.join(parts)}")
    head = f"R@10 on {NAMES} with {recipe}, over both directions, and gains whose interval does not hold zero."
    return " ".join([head, ". ".join(lines) + ".", count_all(values)])


def count_all(values: Mapping[str, Any]) -> str:
    """Return how the methods fare on all tests, in a sentence."""
    with_concepts = values["concept_methods"]
    groups = {name: [name] for name in (PAPER, "dedup + random", AGAIN) if name in values["methods"]}
    groups[f"all {len(with_concepts)} methods with concepts"] = with_concepts
    counted = ", ".join(f"{title} {count_verdicts(values, names)}" for title, names in groups.items())
    return f"Better / undecided / worse than random on all tests, with all recipes and budgets: {counted}."
