"""The page of curation: gains of each method over random draws on each test, costs, concepts, and what was claimed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from embedcache.cli.console import print_line, print_table
from embedcache.provenance import digest_file
from embedcache.reports.base import COLORS, INK, SOFT, estimate_bars, label, open_axes
from pipelines.drawings.curation import AGAIN, METHODS, TAUGHT, Curation, Step
from pipelines.drawings.curation_results import (
    choice_table,
    correlation_table,
    curation_json,
    dedup_table,
    gain_table,
    main_measure,
    read_results,
    selection_table,
    summarize,
    verdict_table,
)
from pipelines.drawings.curve import Recipe
from pipelines.drawings.curve_page import CREDIT, part_of_test
from pipelines.drawings.curve_results import estimate_of, size_names
from pipelines.drawings.steps import Data
from pipelines.results import Part, write_pages

TITLE = "Is curation worth it at scale? Equal numbers of icons by several methods, compared with random draws"
NOTES = (
    "Pairs of an icon of Iconify and its name, under EfficientNet-Lite0's `patch_mean` and MiniLM's `mean`, both "
    "frozen and cached once. Each method selects a budget of pairs from the training part of each seed's split, with "
    "`embedcache curate`, and every budget is the number of pairs that is trained on. Where a method finds fewer, the "
    "others are drawn at random. Validation and test parts are the same for all.",
    "The recipes are the same for all: a closed form (CCA), and `mlp` that starts from it, trained as for the learning "
    "curve. Shrinkage (10, 1, 0.1, 0.01) and dropout (0.1, 0.5) are chosen for each budget by the validation recall of "
    "the random draws of the first seed, and by nothing else.",
    "random: three draws. random again: a fourth draw, compared like a method. dedup: without near-duplicates (from an "
    "image cosine of 0.9 on), then at random. concept-balanced: MetaCLIP's balancing, a name matches a concept from a "
    "cosine of 0.7 on. metaclip: the same by the words of names. rare-first: equally many names for each concept, the "
    "rarest concept first, the curation of the paper whose claim is tested. hierarchical: k-means on k-means of the "
    "images, equally many from each branch. clip-score: the highest cosines of image and name by the closed form of "
    "“random again” of the same budget, whose own pairs are left out, so that twice the pairs are used. image-based: "
    "clusters of images that hold a drawing of OpenMoji's other parts. “+”: the second method within what the first "
    "has left, of clip-score the better half.",
    "Concepts are the names that many families have, the same as those of the pipeline's coverage, among them names "
    "like those of the tests, as in the paper, whose concepts are the classes that it tests.",
)
_INTERVALS = (
    "Brackets hold 95% percentile intervals from 1,000 resamples of both seeds and items (icons of one name are drawn "
    "together), the same for all methods. In each resample random is one of its draws, so that an interval holds how "
    "much one draw differs from another. Of 40 intervals two exclude zero by chance; see “random again”."
)
_GAIN_NOTE = (
    "R@10 over the queries of both directions, or top-1: of random itself, and what each method gains over it, with "
    "95% intervals. *: less than half of the pairs are the method's, the others were drawn at random. Blue bars: "
    "methods with concepts; gray: one more random draw."
)
_VERDICT_NOTE = (
    "All recipes and budgets: better than random (the interval of the gain is above zero) / undecided / worse. Budgets "
    "of which a method found less than half are not counted. Sorted by the mean gain."
)
_CORRELATION_NOTE = (
    "If data that is rich in concepts were better, methods that cover more concepts would gain more: Spearman's rank "
    "correlation over methods of the number of concepts covered and the gain."
)
_SELECTION_NOTE = (
    "Means over seeds. Seconds are of the selection alone, of this process and by the clock, on a machine that may do "
    "other things; a step that several methods or budgets share, such as dedup, is counted in each, and the closed "
    "form that computes scores is not. Concepts: those with a selected pair; Gini: of the pairs of all concepts, 0 is "
    "even."
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
    intervals = _INTERVALS + " With one seed they are over items and draws only." * (len(values["seeds"]) == 1)
    tests = [
        part_of_test(
            test,
            f"{main_measure(values, test)['num_examples']:,} queries. {_GAIN_NOTE}",
            gain_table(values, test),
            gain_figure(values, test),
        )
        for test in values["tests"]
    ]
    removed = (
        "Near-duplicates among the images of the training part, means over seeds; “dedup + random” is what it gains."
    )
    parts = [
        Part("Better or worse than random", [_VERDICT_NOTE, intervals], verdict_table(values)),
        *tests,
        Part("Concepts and gains", [_CORRELATION_NOTE], correlation_table(values)),
        Part("What selections cost and cover", [_SELECTION_NOTE], selection_table(values)),
        *([Part("What deduplication removes", [removed], dedup_table(values))] if values["dedup"] else []),
        Part("Validation recall of random draws", ["R@1, R@5, R@10, and what is chosen."], choice_table(values)),
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
