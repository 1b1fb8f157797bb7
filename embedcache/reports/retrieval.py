"""The presentation of retrieval: recalls, curves, and example queries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache as once
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeAlias

import numpy as np

from embedcache.arrays import Ints
from embedcache.evaluate.retrieval import KS, Ranking, RetrievalReport, rank
from embedcache.evaluate.runs import load_runs
from embedcache.evaluate.settings import RetrievalSettings
from embedcache.files import AnyPath
from embedcache.metrics import Estimate
from embedcache.modalities import directions, noun, one_noun, pair_nouns
from embedcache.reports.figures import COLORS, INK, SOFT, estimate_bars, label, legend_name, open_axes, svg
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample, ranked_example, sample_outcomes
from embedcache.reports.render import (
    Presentation,
    Section,
    Table,
    clip_benchmark_json,
    estimates_json,
    format_count,
    format_fraction,
    one_or_list,
    round_json,
)
from embedcache.settings import replace_fields
from embedcache.store.cache import Cache

_DirectionEstimates: TypeAlias = Mapping[str, Mapping[str, Estimate]]
"""Direction (`i2t`, `t2i`) -> metric (`r@1`) -> estimate."""

NO_CLASS_NAMED = (
    "No class named: only samples whose captions contain no name of a class that the run was trained with as a "
    "prototype; they are ranked among all others."
)
_EXAMPLES_PER_OUTCOME = 5
_NUM_RESULTS = 5
_EXAMPLES_NOTE = (
    "Drawn at random: first {queries} whose top result is correct, then {queries} whose top result is wrong, with a "
    "correct one at the end if none is shown."
)


def retrieval_table(reports: Mapping[str, RetrievalReport]) -> Table:
    """Return recalls with their 95% intervals: rows per report, and one for the chance level of the first.

    A report of several seeds has a second row, whose intervals include the variance of seeds. A report of runs with
    prototypes has a row without the samples whose captions name one of their classes.
    """
    recalls = {}
    for name, report in reports.items():
        recalls[name] = report.recalls
        if report.over_seeds:
            recalls[f"{name}, over seeds"] = report.over_seeds
        if report.unnamed:
            recalls[f"{name}, no class named"] = report.unnamed

    first = next(iter(reports.values()))
    recalls["chance"] = first.chance
    rows = [[name, *_recall_cells(first.directions, estimates)] for name, estimates in recalls.items()]
    return ["", *_recall_columns(first)], rows


def _recall_columns(report: RetrievalReport) -> list[str]:
    return [f"{direction} R@{k}" for direction in report.directions for k in KS]


def _recall_cells(directions: Sequence[str], estimates: _DirectionEstimates) -> list[str]:
    """Return the recalls of both directions in the order of the columns."""
    cells = []
    for direction in directions:
        for k in KS:
            cells.append(str(estimates[direction][f"r@{k}"]))
    return cells


def recall_tiles(report: RetrievalReport) -> list[tuple[str, str]]:
    """Return R@10 of both directions as main numbers of a page."""
    tiles = []
    for direction, recalls in report.recalls.items():
        chance = format_fraction(report.chance[direction]["r@10"].value)
        tiles.append((format_fraction(recalls["r@10"].value), f"{direction} R@10 on test, chance {chance}"))
    return tiles


def rank_table(reports: Mapping[str, RetrievalReport]) -> Table:
    """Return mean average precisions and median ranks with their 95% intervals, one row per report."""
    columns = [""]
    for direction in next(iter(reports.values())).directions:
        columns += [f"{direction} mAP", f"{direction} median rank"]

    rows = []
    for name, report in reports.items():
        row = [name]
        for direction in report.directions:
            metrics = report.rank_metrics[direction]
            row += [str(metrics["map"]), _format_rank(metrics["median_rank"])]
        rows.append(row)
    return columns, rows


def width_table(reports: Mapping[str, RetrievalReport]) -> Table:
    """Return recalls by the first components of the shared space, one row per report and width."""
    rows = []
    for name, report in reports.items():
        for width, recalls in report.by_width.items():
            rows.append([name, str(width), *_recall_cells(report.directions, recalls)])
    return ["", "width", *_recall_columns(next(iter(reports.values())))], rows


def _format_rank(rank: Estimate) -> str:
    return f"{format_count(rank.value)} [{format_count(rank.low)}, {format_count(rank.high)}]"


def retrieval_json(report: RetrievalReport, **others: RetrievalReport | None) -> dict[str, Any]:
    """Return a report as JSON values: `i2t`, `t2i`, `chance`, one entry for each of `others`, counts and seeds.

    A report of several seeds also has `over_seeds`, with intervals that include their variance. If smaller widths were
    ranked, `widths` has their recalls by width. Each direction contains `r@1`, `r@5`, `r@10`, and `intervals` with the
    95% interval of each. The directions of the report itself also contain `map` and `median_rank`.
    """
    record: dict[str, Any] = {}
    for direction in report.directions:
        record[direction] = estimates_json({**report.recalls[direction], **report.rank_metrics[direction]})

    # Readers of several reports test for these keys, so an empty one is left out.
    record["chance"] = _directions_json(report.chance)
    if report.over_seeds:
        record["over_seeds"] = _directions_json(report.over_seeds)
    if report.by_width:
        record["widths"] = {str(width): _directions_json(recalls) for width, recalls in report.by_width.items()}
    if report.unnamed:
        record["no_class_named"] = _directions_json(report.unnamed)
    if report.named_samples:
        record["named_samples"] = list(map(list, report.named_samples))
    for name, other in others.items():
        if other is not None:
            record[name] = _directions_json(other.recalls)

    for modality, counts in report.num_items.items():
        record[f"num_{noun(modality).replace(' ', '_')}"] = counts[0]
    return {
        **record,
        "seeds": report.seeds,
        "recall_by_seed": list(map(round_json, report.by_seed)),
        "part": report.part,
        "language": report.language,
        "overlap": asdict(report.overlap) if report.overlap else None,
    }


def _directions_json(recalls: _DirectionEstimates) -> dict[str, Any]:
    return {direction: estimates_json(estimates) for direction, estimates in recalls.items()}


def present_retrieval(
    reports: Mapping[str, RetrievalReport], cache: AnyPath, settings: RetrievalSettings
) -> Presentation:
    """Return the presentation of reports on a cache, the main one first, with example queries of its first run."""
    cache = Cache(cache)
    first = next(iter(reports.values()))

    # Both sections of examples use one ranking. It is computed for a page only, since it loads the run again.
    @once
    def rank_first() -> Ranking:
        run = load_runs(first.run_paths[:1], device=settings.device)[0]
        return rank(cache, run, replace_fields(settings, language=settings.language[:1], check_overlap=False))

    sections = [_recall_section(reports)]
    by_width = width_table(reports)
    if by_width[1]:
        note = "Ranked by the first components of the shared space alone, scaled to length 1 again."
        sections.append(Section(title="Recall by width", notes=[note], table=by_width))
    queries, renderers = query_sections(cache, tuple(first.num_items), rank_first)
    sections += [Section(title="Ranks", table=rank_table(reports)), *queries]

    return Presentation(
        title=f"{'-'.join(first.num_items).capitalize()} retrieval",
        lines=report_lines(reports),
        warnings=report_warnings(reports),
        sections=sections,
        record=lambda: one_or_list([_result(report, cache) for report in reports.values()]),
        renderers=renderers,
    )


def _recall_section(reports: Mapping[str, RetrievalReport]) -> Section:
    notes = [
        "In brackets the 95% interval; over seeds, one that holds the variance of seeds, too; for chance, the range "
        "that holds 95% of random rankings, in which equal captions stay together."
    ]
    bars = {}
    for name, report in reports.items():
        bars[name] = report.recalls
        if report.unnamed and NO_CLASS_NAMED not in notes:
            notes.append(NO_CLASS_NAMED)
    bars["chance"] = next(iter(reports.values())).chance

    return Section(
        title="Recall",
        notes=notes,
        table=retrieval_table(reports),
        figures=lambda: [_recall_curves(reports), recall_bars(bars)],
    )


def report_lines(reports: Mapping[str, Any]) -> list[str]:
    """Return the line of each report of a recipe, and the line of its overlap with the training part."""
    lines = []
    for name, report in reports.items():
        lines.append(f"{name}: {replace(report, overlap=None).line()}")
        if report.overlap:
            lines.append(f"{name}: {report.overlap.line()}")
    return lines


def report_warnings(reports: Mapping[str, Any]) -> list[str]:
    """Return the warnings of the reports of several recipes, each with the name of its recipe."""
    return [f"{name}: {report.warning}" for name, report in reports.items() if report.warning]


def _result(report: RetrievalReport, cache: Cache) -> dict[str, Any]:
    """Return a report of a run, or of seeds that were averaged, as CLIP_benchmark's `zeroshot_retrieval`.

    `image_retrieval_recall@K` is the fraction of captions with their image among the top K. `text_retrieval_recall@K`
    is the fraction of images with any of their captions there. Two things differ. Equal captions and copies of an image
    are positives of each other here and not there. Among equal similarities we rank the wrong ones first, and
    CLIP_benchmark ranks any first.
    """
    first, second = report.num_items
    metrics = {}
    # CLIP_benchmark names a direction by the modality that is retrieved, not by the query.
    for direction, modality in zip(report.directions, (second, first), strict=True):
        for name, estimate in report.recalls[direction].items():
            metrics[f"{modality}_retrieval_recall@{name.removeprefix('r@')}"] = estimate.value

    return clip_benchmark_json(
        "zeroshot_retrieval",
        metrics,
        retrieval_json(report),
        dataset=cache.path.name,
        pretrained=",".join(map(str, report.run_paths)),
        language=report.language,
    )


def recall_bars(rows: Mapping[str, _DirectionEstimates]) -> str:
    """Draw R@10 with its 95% interval in both directions, one bar per row, as SVG; the last row is chance, in gray."""
    all_axes = open_axes(0.5 + 0.42 * len(rows), ncols=2, sharey=True)
    # Colors repeat after seven recipes. Chance is gray, so that it is not taken for one of them.
    colors = [*islice(cycle(COLORS), len(rows) - 1), SOFT]

    for axes, direction in zip(all_axes, next(iter(rows.values())), strict=True):
        estimates = {name: recalls[direction]["r@10"] for name, recalls in rows.items()}
        estimate_bars(axes, estimates, height=0.55, colors=colors)
        label(axes, f"{direction} R@10 with its 95% interval")
    return svg(axes.figure)


def _recall_curves(reports: Mapping[str, RetrievalReport]) -> str:
    """Draw recall by k in both directions as SVG: one line per report, and a gray one for the chance level."""
    first = next(iter(reports.values()))
    for axes, direction in zip(open_axes(3.2, ncols=2, sharey=True), first.directions, strict=True):
        for (name, report), color in zip(reports.items(), cycle(COLORS), strict=False):
            curve = report.curves[direction]
            axes.plot(np.arange(1, len(curve) + 1), curve, color=color, label=legend_name(name))

        # Chance is known at the reported k only.
        chance = first.chance[direction]
        chance_recalls = [chance[f"r@{k}"].value for k in KS]
        axes.plot(KS, chance_recalls, color=SOFT, label="chance")

        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        label(axes, f"k of {direction} R@k", "recall")

    # The last axes have the legend of both, which are the same.
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")
    return svg(axes.figure)


def query_sections(
    cache: Cache, modalities: Sequence[str], get_ranking: Callable[[], Ranking]
) -> tuple[list[Section], list[ItemRenderer]]:
    """Return one section of queries with their top results per direction, and the renderers of their items.

    Captions to images come first.

    Args:
        cache: cache of the items.
        modalities: both modalities, such as `("image", "text")`.
        get_ranking: returns the ranking whose queries are shown; called for a page only.
    """
    renderers = [ItemRenderer(cache, modality) for modality in modalities]

    def show(direction: str) -> list[QueryExample]:
        ranking = get_ranking()
        views = (
            _item_view(renderers[0], ranking.pairs.first.rows),
            _item_view(renderers[1], ranking.pairs.second.rows),
        )
        return query_examples(ranking, direction, *(views if ranking.is_forward(direction) else views[::-1]))

    first, second = modalities
    forward, backward = directions(modalities)
    sections = [
        _query_section(second, first, partial(show, backward)),
        _query_section(first, second, partial(show, forward)),
    ]
    return sections, renderers


def _query_section(query: str, result: str, examples: Callable[[], Sequence[QueryExample]]) -> Section:
    return Section(
        title=f"{one_noun(query).capitalize()} to {noun(result)}",
        notes=[_EXAMPLES_NOTE.format(queries=pair_nouns((query, result))[0])],
        examples=examples,
    )


def _item_view(renderer: ItemRenderer, rows: Ints) -> Callable[..., PageItem]:
    """Return a function that shows the item at a position; an image without its key, since there are many."""

    def show(position: int, *, is_correct: bool = False) -> PageItem:
        item = renderer.render(int(rows[position]), is_correct=is_correct)
        return replace(item, text="") if item.modality == "image" and item.image_url is not None else item

    return show


def query_examples(
    ranking: Ranking, direction: str, show_query: Callable[[int], PageItem], show_result: Callable[..., PageItem]
) -> list[QueryExample]:
    """Return random queries whose top candidate is correct, then random ones whose top candidate is wrong.

    `show_query` and `show_result` make the item at a position in the ranking's `pairs`.
    """
    sides = [(ranking.first, ranking.positives[0]), (ranking.second, ranking.positives[1])]
    if not ranking.is_forward(direction):
        sides.reverse()
    (queries, query_ids), (candidates, candidate_ids) = sides

    examples = []
    for query in sample_outcomes(ranking.ranks[direction] == 1, _EXAMPLES_PER_OUTCOME):
        # Few queries are shown, so their candidates are ranked one query at a time.
        order = np.argsort(-(candidates @ queries[query]), kind="stable")[:_NUM_RESULTS].tolist()
        positives = candidate_ids[query_ids == query].tolist()

        example = ranked_example(
            show_query(query),
            [show_result(position, is_correct=position in positives) for position in order],
            rank=int(ranking.ranks[direction][query]),
            answer=show_result(positives[0], is_correct=True),
        )
        examples.append(example)
    return examples
