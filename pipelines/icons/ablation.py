"""One setting at a time in the pipeline of icons: batch, temperature and shared width of `mlp` on 100,000 pairs.

Variants are compared with `train`'s default. The validation part of the first seed chooses learning rates. Finished
runs and results are reused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from embedcache.cli.console import print_line
from embedcache.reports.figures import COLORS, INK, estimate_bars, label, open_axes
from embedcache.reports.render import Table, format_fraction
from embedcache.runs import Run
from embedcache.train.recipes import TrainingLength
from pipelines.icons.curve import Recipe, SeedRuns, open_runs, question, run_all
from pipelines.icons.curve_page import (
    CREDIT,
    estimate_of,
    format_gain,
    intervals_note,
    main_measure,
    measures_json,
    part_of_test,
    run_json,
)
from pipelines.icons.steps import Data
from pipelines.results import Part, Result, Results, estimates_json, with_both, write_pages

NUM_PAIRS = 100_000
_MLP: Mapping[str, object] = {"projector": "mlp", "initialization": "cca"}
_LENGTH = TrainingLength(1_000_000, 10, 30)
_RATES = ({"lr": 1e-3}, {"lr": 4e-3})
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Variants of one setting.

    Args:
        base: name of the variant that the others are compared with.
        variants: name -> recipe, with the base.
    """

    base: str
    variants: Mapping[str, Recipe]


def _variant(**options: object) -> Recipe:
    return Recipe(options={**_MLP, **options}, length=_LENGTH)


def _kept(temperature: float) -> Recipe:
    return _variant(temperature=temperature, trainable="image+text")


_DEFAULT = _variant()
GROUPS: Mapping[str, Group] = {
    "temperature": Group(
        base=DEFAULT,
        variants={
            DEFAULT: _DEFAULT,
            **{f"temperature from {value:g}": _variant(temperature=value) for value in (0.02, 0.2)},
            **{f"temperature {value:g}, kept": _kept(value) for value in (0.02, 0.05, 0.1)},
        },
    ),
    "shared width": Group(
        base=DEFAULT,
        variants={
            "width 128": _variant(shared_width=128),
            DEFAULT: _DEFAULT,
            **{f"width {value:,}": _variant(shared_width=value) for value in (512, 1_024)},
        },
    ),
    "batch": Group(
        base="batch 1,024",
        variants={
            f"batch {size:,}": replace(_variant(batch_size=size), choices=_RATES)
            for size in (1_024, 4_096, 16_384, 32_768)
        },
    ),
}
"""Setting -> its variants."""

TITLE = "Batch, temperature and width: one setting of a training at a time"
NOTES = ("The pairs, split and tests of the learning curve; each variant changes one setting of `default`.",)
_RETRIEVAL = "R@10 over the queries of both directions."


def run_ablation(
    data: Data, seeds: Sequence[int], size: int = NUM_PAIRS, groups: Mapping[str, Group] = GROUPS
) -> dict[str, Any]:
    """Train and measure all unfinished variants, write a page, and return the results as JSON values."""
    recipes = {name: recipe for group in groups.values() for name, recipe in group.variants.items()}
    seed_runs = open_runs(data, data.folder / "ablation", seeds, [size], recipes)
    choices = run_all(seed_runs)
    weights = [Run.open(runs.path(*key, choice)).info.weights for runs in seed_runs for key, choice in choices.items()]

    def measure() -> dict[str, Any]:
        values = ablation_json(seed_runs, choices, groups)
        write_ablation_pages(data.folder / "ablation", values)
        return values

    values = data.step("ablation", {"runs": weights, "clothes": data.has_clothes}, measure)
    print_line(f"{data.folder / 'ablation.html'}; {data.folder / 'ablation.json'}")
    return values


def ablation_json(
    seed_runs: Sequence[SeedRuns], choices: Mapping[tuple[str, int], int], groups: Mapping[str, Group]
) -> dict[str, Any]:
    """Return all results as JSON values.

    `groups`: setting -> its base and the names of its variants. `runs`: variant -> its choice, validation recall of
    each seed, and mean costs of the training. `tests`: test -> metric -> `num_examples`, `chance`, `values` of each
    variant, and `gains`, setting -> variant -> gain over the base, all from the same resamples.
    """
    paths = [path for runs in seed_runs for path in sorted((runs.folder / "results").glob("*.json"))]
    results = Results(with_both(Result.read(path)) for path in paths)
    names = list(seed_runs[0].recipes)
    (size,) = seed_runs[0].num_pairs

    tests = {}
    for test in seed_runs[0].tests:
        name = question(test, size)
        tests[test] = measures_json(results, names[0], name, partial(_variants_json, results, name, names, groups))
    return {
        "seeds": [runs.seed for runs in seed_runs],
        "groups": {
            setting: {"base": group.base, "variants": list(group.variants)} for setting, group in groups.items()
        },
        "runs": {name: run_json(seed_runs, name, size, choices[name, size]) for name in names},
        "tests": tests,
    }


def _variants_json(
    results: Results, question_name: str, names: Sequence[str], groups: Mapping[str, Group], measure: str
) -> dict[str, Any]:
    means = results.resample([(name, question_name) for name in names], measure)
    columns = dict(zip(names, means.T, strict=True))

    gains = {}
    for setting, group in groups.items():
        # Differences within a resample have narrower intervals than two separate estimates.
        base = columns[group.base]
        gains[setting] = estimates_json({
            name: columns[name] - base for name in group.variants if name != group.base
        })  # fmt: skip
    return {"values": estimates_json(columns), "gains": gains}


def write_ablation_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page as HTML and Markdown, from its JSON values."""
    intervals = intervals_note(values)
    retrieval = f"{_RETRIEVAL} {intervals}"
    notes = {test: retrieval if len(measures) > 1 else intervals for test, measures in values["tests"].items()}

    parts = [
        Part("Gains over the base", [retrieval], figure=gain_figure(values), name="gains"),
        *(part_of_test(test, notes[test], variant_table(values, test)) for test in values["tests"]),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def variant_table(values: Mapping[str, Any], test: str) -> Table:
    """Return the metrics of each variant on a test, with its gain over its base."""
    measures = values["tests"][test]
    first = main_measure(values, test)

    rows = []
    for setting, group in values["groups"].items():
        for name in group["variants"]:
            gain = first["gains"][setting].get(name)
            cells = [str(estimate_of(estimates["values"][name])) for estimates in measures.values()]
            rows.append([setting, name, *cells, "" if gain is None else format_gain(estimate_of(gain))])
    rows.append(["", "chance", *(format_fraction(estimates["chance"]) for estimates in measures.values()), ""])
    return ["setting", "variant", *measures, "gain"], rows


def gain_figure(values: Mapping[str, Any]) -> Figure:
    """Draw the gain of each variant over its base, one bar per variant, for each test with several measures."""
    tests = [test for test, measures in values["tests"].items() if len(measures) > 1]
    gains = main_measure(values, tests[0])["gains"]

    # One color per setting, so that its variants belong together.
    colors = []
    for number, variants in enumerate(gains.values()):
        colors += [COLORS[number]] * len(variants)

    axes_P = open_axes(
        0.8 + 0.3 * len(colors), width=2.4 + 3.0 * len(tests), ncols=len(tests), sharey=True, squeeze=False
    )[0]

    for axes, test in zip(axes_P, tests, strict=True):
        test_gains = main_measure(values, test)["gains"]
        bars = {name: estimate_of(gain) for variants in test_gains.values() for name, gain in variants.items()}
        estimate_bars(axes, bars, height=0.6, colors=colors, is_gain=True)
        axes.set_title(test, color=INK, fontsize=11)
        label(axes, "gain in R@10")

    figure: Figure = axes_P[0].figure
    return figure
