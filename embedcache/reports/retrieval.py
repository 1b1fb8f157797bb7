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
    """Return recalls with their 95% intervals: rows per report, and one for the first's chance level.

    A report of several seeds has a second row, whose intervals hold the variance of seeds, too; one of runs with
    prototypes has a row without the samples whose captions name one of their classes.
    """
    first = next(iter(reports.values()))
    columns = ["", *(f"{direction} R@{k}" for direction in first.directions for k in KS)]
    rows = {}
    for name, report in reports.items():
        rows[name] = report.recalls
        if report.over_seeds:
            rows[f"{name}, over seeds"] = report.over_seeds
        if report.unnamed:
            rows[f"{name}, no class named"] = report.unnamed
    rows["chance"] = first.chance
    return columns, [
        [name, *(str(recalls[direction][f"r@{k}"]) for direction in first.directions for k in KS)]
        for name, recalls in rows.items()
    ]


def recall_tiles(report: RetrievalReport) -> list[tuple[str, str]]:
    """Return R@10 of both directions as main numbers of a page."""
    tiles = []
    for direction, recalls in report.recalls.items():
        chance = format_fraction(report.chance[direction]["r@10"].value)
        tiles.append((format_fraction(recalls["r@10"].value), f"{direction} R@10 on test, chance {chance}"))
    return tiles


def rank_table(reports: Mapping[str, RetrievalReport]) -> Table:
    """Return mean average precisions and median ranks with their 95% intervals, one row per report."""
    directions = next(iter(reports.values())).directions
    columns = ["", *(f"{direction} {metric}" for direction in directions for metric in ("mAP", "median rank"))]
    rows = []
    for name, report in reports.items():
        cells = []
        for direction in directions:
            cells += [
                str(report.rank_metrics[direction]["map"]),
                _format_rank(report.rank_metrics[direction]["median_rank"]),
            ]
        rows.append([name, *cells])
    return columns, rows


def width_table(reports: Mapping[str, RetrievalReport]) -> Table:
    """Return recalls by the first components of the shared space: rows per report and width; none without widths."""
    directions = next(iter(reports.values())).directions
    columns = ["", "width", *(f"{direction} R@{k}" for direction in directions for k in KS)]
    return columns, [
        [name, str(width), *(str(recalls[direction][f"r@{k}"]) for direction in directions for k in KS)]
        for name, report in reports.items()
        for width, recalls in report.by_width.items()
    ]


def _format_rank(rank: Estimate) -> str:
    return f"{format_count(rank.value)} [{format_count(rank.low)}, {format_count(rank.high)}]"


def retrieval_json(report: RetrievalReport, **others: RetrievalReport | None) -> dict[str, Any]:
    """Return a report as JSON values: `i2t`, `t2i`, `chance`, one entry for each of `others`, counts and seeds.

    Of several seeds also `over_seeds`, with intervals that hold their variance; if smaller widths were ranked `widths`,
    by width. Each direction holds `r@1`, `r@5`, `r@10`, the report's own also `map` and `median_rank`, and `intervals`
    with the 95% interval of each.
    """
    widths = {str(width): _directions_json(recalls) for width, recalls in report.by_width.items()}
    return {
        **{
            direction: estimates_json({**report.recalls[direction], **report.rank_metrics[direction]})
            for direction in report.directions
        },
        "chance": _directions_json(report.chance),
        **({"over_seeds": _directions_json(report.over_seeds)} if report.over_seeds else {}),
        **({"widths": widths} if report.by_width else {}),
        **({"no_class_named": _directions_json(report.unnamed)} if report.unnamed else {}),
        **({"named_samples": [list(counts) for counts in report.named_samples]} if report.named_samples else {}),
        **{name: _directions_json(other.recalls) for name, other in others.items() if other is not None},
        **{f"num_{noun(modality).replace(' ', '_')}": counts[0] for modality, counts in report.num_items.items()},
        "seeds": report.seeds,
        "recall_by_seed": [round_json(recall) for recall in report.by_seed],
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
    cache, first = Cache(cache), next(iter(reports.values()))

    @once
    def rank_first() -> Ranking:
        run = load_runs(first.run_paths[:1], device=settings.device)[0]
        return rank(cache, run, replace_fields(settings, language=settings.language[:1], check_overlap=False))

    notes = [
        "In brackets the 95% interval; over seeds, one that holds the variance of seeds, too; for chance, the range "
        "that holds 95% of random rankings, in which equal captions stay together."
    ]
    if any(report.unnamed for report in reports.values()):
        notes.append(NO_CLASS_NAMED)
    recall = Section(
        title="Recall",
        notes=notes,
        table=retrieval_table(reports),
        figures=lambda: [
            _recall_curves(reports),
            recall_bars({**{name: report.recalls for name, report in reports.items()}, "chance": first.chance}),
        ],
    )
    by_width = Section(
        title="Recall by width",
        notes=["Ranked by the first components of the shared space alone, scaled to length 1 again."],
        table=width_table(reports),
    )
    widths = [by_width] if any(report.by_width for report in reports.values()) else []
    queries, renderers = query_sections(cache, tuple(first.num_items), rank_first)
    return Presentation(
        title=f"{'-'.join(first.num_items).capitalize()} retrieval",
        lines=report_lines(reports),
        warnings=[f"{name}: {report.warning}" for name, report in reports.items() if report.warning],
        sections=[recall, *widths, Section(title="Ranks", table=rank_table(reports)), *queries],
        record=lambda: one_or_list([_result(report, cache) for report in reports.values()]),
        renderers=renderers,
    )


def report_lines(reports: Mapping[str, Any]) -> list[str]:
    """Return the line of each report of a recipe, and that of its overlap with the training part."""
    lines = []
    for name, report in reports.items():
        lines.append(f"{name}: {replace(report, overlap=None).line()}")
        if report.overlap:
            lines.append(f"{name}: {report.overlap.line()}")
    return lines


def _result(report: RetrievalReport, cache: Cache) -> dict[str, Any]:
    """Return a report of a run, or of seeds that were averaged, as CLIP_benchmark's `zeroshot_retrieval`.

    `image_retrieval_recall@K` is the fraction of texts with their image among the top K, `text_retrieval_recall@K`
    that of images with any of their texts there. Two things differ: equal texts and copies of an image are positives
    of each other here and not there; among equal similarities we rank the wrong ones first, CLIP_benchmark any.
    """
    first, second = report.num_items
    retrieved = dict(zip(report.directions, (second, first), strict=True))
    metrics = {
        f"{retrieved[direction]}_retrieval_recall@{name.removeprefix('r@')}": estimate.value
        for direction, recalls in report.recalls.items()
        for name, estimate in recalls.items()
    }
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
    colors = [*islice(cycle(COLORS), len(rows) - 1), SOFT]
    for axes, direction in zip(all_axes, next(iter(rows.values())), strict=True):
        estimates = {name: recalls[direction]["r@10"] for name, recalls in rows.items()}
        estimate_bars(axes, estimates, height=0.55, colors=colors)
        label(axes, f"{direction} R@10 with its 95% interval")
    return svg(axes.figure)


def _recall_curves(reports: Mapping[str, RetrievalReport]) -> str:
    """Draw recall by k in both directions, one line per report and gray for the first one's chance level, as SVG."""
    directions = next(iter(reports.values())).directions
    for axes, direction in zip(open_axes(3.2, ncols=2, sharey=True), directions, strict=True):
        for position, (name, report) in enumerate(reports.items()):
            ks = np.arange(1, len(report.curves[direction]) + 1)
            axes.plot(ks, report.curves[direction], color=COLORS[position % len(COLORS)], label=legend_name(name))
        chance = next(iter(reports.values())).chance[direction]
        chance_ks = [int(metric.removeprefix("r@")) for metric in chance]
        axes.plot(chance_ks, [estimate.value for estimate in chance.values()], color=SOFT, label="chance")
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        label(axes, f"k of {direction} R@k", "recall")
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")
    return svg(axes.figure)


def query_sections(
    cache: Cache, modalities: Sequence[str], get_ranking: Callable[[], Ranking]
) -> tuple[list[Section], list[ItemRenderer]]:
    """Return one section per direction, with queries and their top results, texts to images first; and the renderers.

    `get_ranking` returns the ranking whose queries are shown; called for a page only.
    """
    renderers = [ItemRenderer(cache, modality) for modality in modalities]
    queries_of = dict(zip(modalities, pair_nouns(modalities), strict=True))
    there, back = directions(modalities)

    def show(direction: str) -> list[QueryExample]:
        ranking = get_ranking()
        sides = (ranking.pairs.first, ranking.pairs.second)
        first, second = (_item_view(renderer, items.rows) for renderer, items in zip(renderers, sides, strict=True))
        return query_examples(ranking, direction, *((first, second) if direction == there else (second, first)))

    sections = [
        Section(
            title=f"{one_noun(query).capitalize()} to {noun(result)}",
            notes=[_EXAMPLES_NOTE.format(queries=queries_of[query])],
            examples=partial(show, direction),
        )
        for direction, (query, result) in ((back, modalities[::-1]), (there, modalities))
    ]
    return sections, renderers


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
    first, second = (ranking.first, ranking.positives[0]), (ranking.second, ranking.positives[1])
    is_forward = ranking.is_forward(direction)
    (queries, query_ids), (candidates, candidate_ids) = (first, second) if is_forward else (second, first)
    examples = []
    for query in sample_outcomes(ranking.ranks[direction] == 1, _EXAMPLES_PER_OUTCOME):
        order = np.argsort(-(candidates @ queries[query]), kind="stable")[:_NUM_RESULTS].tolist()
        positives = candidate_ids[query_ids == query].tolist()
        results = [show_result(position, is_correct=position in positives) for position in order]
        answer = show_result(positives[0], is_correct=True)
        examples.append(
            ranked_example(show_query(query), results, rank=int(ranking.ranks[direction][query]), answer=answer)
        )
    return examples
