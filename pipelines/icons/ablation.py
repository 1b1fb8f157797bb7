"""One setting at a time in the pipeline of icons: batch, temperature and shared width of `mlp` on 100,000 pairs.

Variants are compared with `train`'s default. Where a learning rate is chosen, the validation part of the first seed
chooses it. Finished runs and results are reused.
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
    """Train and measure all variants, but for what is finished; return the results as JSON values, with a page."""
    recipes = {name: recipe for group in groups.values() for name, recipe in group.variants.items()}
    every = open_runs(data, data.folder / "ablation", seeds, [size], recipes)
    chosen = run_all(every)
    trained = [Run.open(runs.path(*key, choice)).info.weights for runs in every for key, choice in chosen.items()]

    def measure() -> dict[str, Any]:
        values = ablation_json(every, chosen, groups)
        write_ablation_pages(data.folder / "ablation", values)
        return values

    values = data.step("ablation", {"runs": trained, "clothes": data.has_clothes}, measure)
    print_line(f"{data.folder / 'ablation.html'}; {data.folder / 'ablation.json'}")
    return values


def ablation_json(
    every: Sequence[SeedRuns], chosen: Mapping[tuple[str, int], int], groups: Mapping[str, Group]
) -> dict[str, Any]:
    """Return all results as JSON values.

    `groups`: setting -> its base and the names of its variants. `runs`: variant -> its choice, validation recall of
    each seed, and means of what the training took. `tests`: test -> metric -> `num_examples`, `chance`, `values` of
    each variant, and `gains`, setting -> variant -> what it gains over the base; all from the same resamples.
    """
    paths = [path for runs in every for path in sorted((runs.folder / "results").glob("*.json"))]
    results, names = Results(with_both(Result.read(path)) for path in paths), list(every[0].recipes)
    (size,) = every[0].num_pairs
    questions = {test: question(test, size) for test in every[0].tests}
    return {
        "seeds": [of_seed.seed for of_seed in every],
        "groups": {
            setting: {"base": group.base, "variants": list(group.variants)} for setting, group in groups.items()
        },
        "runs": {name: run_json(every, name, size, chosen[name, size]) for name in names},
        "tests": {
            test: measures_json(results, names[0], asked, partial(_variants_json, results, asked, names, groups))
            for test, asked in questions.items()
        },
    }


def _variants_json(
    results: Results, asked: str, names: Sequence[str], groups: Mapping[str, Group], measure: str
) -> dict[str, Any]:
    means = results.resample([(name, asked) for name in names], measure)
    columns = dict(zip(names, means.T, strict=True))
    return {
        "values": estimates_json(columns),
        "gains": {
            setting: estimates_json(
                {name: columns[name] - columns[group.base] for name in group.variants if name != group.base}
            )
            for setting, group in groups.items()
        },
    }


def write_ablation_pages(path: Path, values: Mapping[str, Any]) -> None:
    """Write the page as HTML and Markdown, from its JSON values."""
    intervals = intervals_note(values)
    retrieval = f"{_RETRIEVAL} {intervals}"
    about = {test: retrieval if len(measures) > 1 else intervals for test, measures in values["tests"].items()}
    parts = [
        Part("Gains over the base", [retrieval], figure=gain_figure(values), name="gains"),
        *(part_of_test(test, about[test], variant_table(values, test)) for test in values["tests"]),
    ]
    write_pages(path, TITLE, parts, notes=NOTES, credit=CREDIT)


def variant_table(values: Mapping[str, Any], test: str) -> Table:
    """Return the metrics of each variant on a test, with what it gains over its base."""
    measures, rows = values["tests"][test], []
    first = main_measure(values, test)
    for setting, group in values["groups"].items():
        for name in group["variants"]:
            gain = first["gains"][setting].get(name)
            cells = [str(estimate_of(found["values"][name])) for found in measures.values()]
            rows.append([setting, name, *cells, "" if gain is None else format_gain(estimate_of(gain))])
    rows.append(["", "chance", *(format_fraction(found["chance"]) for found in measures.values()), ""])
    return ["setting", "variant", *measures, "gain"], rows


def gain_figure(values: Mapping[str, Any]) -> Figure:
    """Draw what each variant gains over its base on each test with several measures, one bar per variant."""
    tests = [test for test, measures in values["tests"].items() if len(measures) > 1]
    gains = main_measure(values, tests[0])["gains"]
    colors = [COLORS[number] for number, of_setting in enumerate(gains.values()) for _ in of_setting]
    axes_P = open_axes(
        0.8 + 0.3 * len(colors), width=2.4 + 3.0 * len(tests), ncols=len(tests), sharey=True, squeeze=False
    )[0]
    for axes, test in zip(axes_P, tests, strict=True):
        found = main_measure(values, test)["gains"]
        bars = {name: estimate_of(gain) for of_setting in found.values() for name, gain in of_setting.items()}
        estimate_bars(axes, bars, height=0.6, colors=colors, is_gain=True)
        axes.set_title(test, color=INK, fontsize=11)
        label(axes, "gain in R@10")
    figure: Figure = axes_P[0].figure
    return figure
