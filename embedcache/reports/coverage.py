"""The presentation of concept coverage: counts, gaps, and the best items of each concept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from embedcache.arrays import Array, Ints
from embedcache.curate.coverage import ConceptCounts, CoverageReport
from embedcache.metrics import Estimate
from embedcache.modalities import noun, pair_nouns
from embedcache.reports.figures import BAD, COLORS, INK, estimate_bars, label, legend_name, open_axes, svg
from embedcache.reports.items import ItemRenderer, PageItem, QueryExample
from embedcache.reports.render import (
    Presentation,
    Section,
    Table,
    format_count,
    format_fraction,
    format_part,
    format_percent,
    round_json,
)
from embedcache.store.cache import keys_at

_FRACTIONS = (0.01, 0.1)
_NUM_ENDS = 10
_MAX_GAPS = 100
_MAX_EXAMPLES = 100
_MAX_DIFFERENCES = 20
_COUNT = "{x:,.0f}"


def gap_note(report: CoverageReport) -> str:
    """Return what to know before gaps are filled."""
    pool = report.pool
    items, others = pair_nouns((pool.modality, pool.other_modality or "text"))
    if pool.modality == "text":
        items, others = others if pool.other_modality else "images", items
    return (
        f"Before you collect more {items} for a gap, look at its nearest items, and count {others} too: "
        "--modality both."
    )


def summary_table(report: CoverageReport) -> Table:
    """Return the main numbers, with one column for the pool and one for its selection."""
    least, parts, num = report.settings.min_count, report.all_counts, len(report.concepts.names)
    medians = [np.median(part.estimate.counts[part.can_tell]) if part.can_tell.any() else np.nan for part in parts]
    rows = [
        ["items", *(format_count(part.num_items) for part in parts)],
        ["items above any threshold", *(format_part(part.num_covered, part.num_items) for part in parts)],
        ["concepts with an estimate", *(format_part(part.can_tell.sum(), num) for part in parts)],
        [f"gaps: upper bound below {least:,}", *(format_count(len(part.gaps(least))) for part in parts)],
        ["items per concept, median estimate", *(_format_estimate(median) for median in medians)],
        ["Gini coefficient", *(format_fraction(part.gini) for part in parts)],
    ]
    for fraction in _FRACTIONS:
        percents = [format_percent(part.top_fraction(fraction)) for part in parts]
        rows.append([f"items of the largest {fraction:.0%} of concepts", *percents])
    return ["", *(part.name for part in parts)], rows


def _format_estimate(count: float) -> str:
    """Return an estimate as a whole number; `cannot tell` if there is none."""
    return "cannot tell" if np.isnan(count) else f"{count:,.0f}"


def format_interval(part: ConceptCounts, number: int) -> str:
    """Return the estimate of a concept with its interval, such as `16 [6, 60]`."""
    count, low, high = (bound[number] for bound in _bounds(part))
    return "cannot tell" if np.isnan(count) else f"{count:,.0f} [{low:,.0f}, {high:,.0f}]"


def _bounds(part: ConceptCounts) -> tuple[Array, Array, Array]:
    return part.estimate.counts, part.estimate.lows, part.estimate.highs


def concept_table(report: CoverageReport, numbers: Ints | Sequence[int]) -> Table:
    """Return the estimates, counts, threshold and similarities of the concepts at some positions."""
    names, pool, rows = report.concepts.names, report.pool_counts, []
    for number in map(int, numbers):
        nearest = int(report.nearest[number])
        cosines = (report.background.scale.medians[number], report.thresholds[number], report.scores[number, 0])
        rows.append(
            [
                names[number],
                *(format_interval(part, number) for part in report.all_counts),
                *map(format_count, (pool.best[number], pool.certain[number])),
                *map(format_fraction, cosines),
                names[nearest] if nearest >= 0 else "",
            ]
        )
    columns = ["concept", *(part.name for part in report.all_counts)]
    return [*columns, "most similar to it", "certain", "median", "threshold", "highest", "nearest concept"], rows


def nouns_of(first: CoverageReport, second: CoverageReport) -> tuple[str, str]:
    """Return the plurals of the items of two modalities, such as `("images", "captions")`."""
    return pair_nouns((first.pool.modality, second.pool.modality))


def modality_line(first: CoverageReport, second: CoverageReport) -> str:
    """Return how many concepts are gaps among the items of either modality, and of both, in one line."""
    least, nouns = first.settings.min_count, nouns_of(first, second)
    gaps = [set(report.all_counts[-1].gaps(least).tolist()) for report in (first, second)]
    return (
        f"of {len(first.concepts.names):,} concepts, fewer than {least:,} items show: {len(gaps[0]):,} among "
        f"{nouns[0]}, {len(gaps[1]):,} among {nouns[1]}, {len(gaps[0] & gaps[1]):,} among both"
    )


def modality_table(first: CoverageReport, second: CoverageReport, *, num_rows: int) -> Table:
    """Return the concepts whose fractions of the items of two modalities differ most."""
    parts = (first.pool_counts, second.pool_counts)
    fractions = [np.nan_to_num(part.estimate.counts / max(1, part.num_items)) for part in parts]
    order = np.argsort(-np.abs(fractions[0] - fractions[1]), kind="stable")[:num_rows]
    rows = [[first.concepts.names[number], *(format_interval(part, number) for part in parts)] for number in order]
    return ["concept", *nouns_of(first, second)], rows


def coverage_json(report: CoverageReport) -> dict[str, Any]:
    """Return a report as JSON values: what was measured, a summary of each part, and each concept."""
    pool = report.pool
    return {
        "pool": {
            "cache": str(pool.cache.path),
            "index_digest": pool.cache.info.index_digest,
            "modality": pool.modality,
            "feature": pool.feature.name,
            "fingerprint": dict(pool.feature.fingerprint),
            "run": None if pool.run_path is None else str(pool.run_path),
            "run_weights": None if pool.run is None else pool.run.info.weights,
        },
        "concepts_from": report.concepts.source,
        "min_count": report.settings.min_count,
        "num_sampled": report.background.num_items,
        "warnings": report.warnings(),
        "parts": [
            {
                "name": part.name,
                "items": part.num_items,
                "covered": part.num_covered,
                "gaps": [report.concepts.names[number] for number in part.gaps(report.settings.min_count)],
                "gini": round_json(part.gini),
            }
            for part in report.all_counts
        ],
        "strip_weights": report.strip_weights.tolist(),
        "concepts": _concepts_json(report),
    }


def _concepts_json(report: CoverageReport) -> list[dict[str, Any]]:
    scale = report.background.scale
    nearest = _items_json(report, report.rows, report.scores)
    strips = _items_json(report, report.strip_rows, report.background.strip_cosines)
    return [
        {
            "name": name,
            **_counts_json(report.pool_counts, number),
            **({} if report.selection_counts is None else {"selection": _counts_json(report.selection_counts, number)}),
            report.concepts.source["of"]: int(report.concepts.counts[number]),
            "threshold": round_json(report.thresholds[number]),
            "scale": [float(column[number]) for column in (scale.medians, scale.spreads, scale.reaches)],
            "answers": {str(row): shows for row, shows in report.answers.get(name, {}).items()},
            "nearest": nearest[number],
            "strip": strips[number],
        }
        for number, name in enumerate(report.concepts.names)
    ]


def _counts_json(part: ConceptCounts, number: int) -> dict[str, Any]:
    """Return the counts of a concept; an estimate is null if its scores cannot tell."""
    prior = part.prior
    bounds = (None if np.isnan(bound[number]) else round(bound[number]) for bound in _bounds(part))
    return {
        **dict(zip(("count", "low", "high"), bounds, strict=True)),
        "best": int(part.best[number]),
        "certain": int(part.certain[number]),
        "prior": [float(column[number]) for column in (prior.counts, prior.lows, prior.highs)],
    }


def _items_json(report: CoverageReport, rows_CK: Ints, cosines_CK: Array) -> list[list[dict[str, Any]]]:
    cache = report.pool.cache
    samples = cache.items(report.pool.modality, columns=["sample"])["sample"].to_numpy()[rows_CK.ravel()]
    keys_CK = keys_at(cache, samples).to_numpy().reshape(rows_CK.shape)
    return [
        [
            {"row": int(row), "key": key, "cosine": round_json(cosine)}
            for row, key, cosine in zip(rows_K, keys_K, cosines_K, strict=True)
        ]
        for rows_K, keys_K, cosines_K in zip(rows_CK, keys_CK, cosines_CK, strict=True)
    ]


def present_coverage(reports: Mapping[str, CoverageReport]) -> Presentation:
    """Return the presentation of coverage by modality, of one or of two."""
    renderers = [ItemRenderer(report.pool.cache, report.pool.modality) for report in reports.values()]
    is_both = len(reports) > 1
    sections = [_difference_section(*reports.values())] if is_both else []
    for report, renderer in zip(reports.values(), renderers, strict=True):
        prefix = f"{noun(report.pool.modality).capitalize()}: " if is_both else ""
        sections += [replace(section, title=f"{prefix}{section.title}") for section in _sections(report, renderer)]

    def record() -> Any:
        records = {modality: coverage_json(report) for modality, report in reports.items()}
        return records if is_both else next(iter(records.values()))

    return Presentation(
        title="Concept coverage",
        lines=[report.line() for report in reports.values()],
        warnings=[warning for report in reports.values() for warning in report.warnings()],
        sections=sections,
        record=record,
        notes=[gap_note(report) for report in reports.values() if len(_gaps(report))],
        renderers=renderers,
    )


def concept_sections(
    report: CoverageReport, renderer: ItemRenderer, *, num: int, notes: Sequence[str] = ()
) -> list[Section]:
    """Return the sections of the largest concepts: their estimates as bars, and their most similar items."""
    part = report.pool_counts
    order = [number for number in largest_first(part)[:num] if part.can_tell[number]]
    estimates = {
        report.concepts.names[number]: Estimate(*(float(bound[number]) for bound in _bounds(part))) for number in order
    }
    bars = Section(
        title="Coverage",
        notes=[
            f"Estimated {noun(report.pool.modality)} of each concept. The 95% intervals are wide without labels: look "
            "at the items below.",
            *notes,
            *report.warnings(),
        ],
        figures=lambda: [_estimate_figure(estimates)] if estimates else [],
    )
    return [bars, _concept_section(report, renderer, num=num)]


def _estimate_figure(estimates: Mapping[str, Estimate]) -> str:
    axes = open_axes(0.7 + 0.24 * len(estimates))
    estimate_bars(axes, estimates, height=0.6, colors=COLORS[:1])
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_COUNT)
    label(axes, "estimated number")
    return svg(axes.figure)


def _difference_section(first: CoverageReport, second: CoverageReport) -> Section:
    items, others = nouns_of(first, second)
    return Section(
        title=f"{items.capitalize()} and {others}",
        notes=[
            f"{modality_line(first, second).capitalize()}.",
            f"The table lists the concepts whose fractions of the {items} and of the {others} differ most.",
        ],
        table=modality_table(first, second, num_rows=_MAX_DIFFERENCES),
        num_printed=10,
    )


def _sections(report: CoverageReport, renderer: ItemRenderer) -> list[Section]:
    notes = [
        "A threshold is little more than half way from the background to the concept's typical best items. An estimate "
        "lies between all items above it and those of them whose best concept it is. Its interval is as wide as "
        "labeled collections needed for 9 of 10 concepts. Answers about some items narrow it: embedcache serve INDEX "
        "--coverage REPORT.json, then curate coverage with --answers.",
        "Certain items have the concept as their best one, and are about as near as its typical best items.",
    ]
    order = largest_first(report.pool_counts)
    smallest = order[_NUM_ENDS:][-_NUM_ENDS:]
    return [
        Section(title="Summary", notes=notes, table=summary_table(report)),
        Section(
            title="Items per concept",
            figures=lambda: [_coverage_curve(report.all_counts, report.settings.min_count)],
        ),
        Section(title="Largest concepts", table=concept_table(report, order[:_NUM_ENDS])),
        *([Section(title="Smallest concepts", table=concept_table(report, smallest))] if len(smallest) else []),
        _gap_section(report),
        _concept_section(report, renderer),
    ]


def _gaps(report: CoverageReport) -> Ints:
    """Return the positions of the gaps in the pool, or in its selection."""
    return report.all_counts[-1].gaps(report.settings.min_count)


def _gap_section(report: CoverageReport) -> Section:
    gaps, least, part = _gaps(report), report.settings.min_count, report.all_counts[-1].name
    if not len(gaps):
        return Section(title="Gaps", notes=[f"No concept has an upper bound below {least:,} items."])
    notes = [f"Concepts of which even the upper bound is below {least:,} in {part}. {gap_note(report)}"]
    if len(gaps) > _MAX_GAPS:
        notes.append(f"The first {_MAX_GAPS} of {len(gaps):,}; the JSON report has all of them.")
    return Section(title="Gaps", notes=notes, table=concept_table(report, gaps[:_MAX_GAPS]), num_printed=0)


def _concept_section(report: CoverageReport, renderer: ItemRenderer, *, num: int | None = None) -> Section:
    order = largest_first(report.pool_counts)[:num]
    notes = ["The most similar items of each concept, best first; green: above its threshold."]
    if len(order) > _MAX_EXAMPLES:
        order = order[np.linspace(0, len(order) - 1, _MAX_EXAMPLES).round().astype(np.int64)]
        total = len(report.concepts.names)
        notes.append(f"{_MAX_EXAMPLES} of {total:,} concepts, evenly spaced from the largest to the smallest.")
    return Section(
        title="Concepts",
        notes=notes,
        examples=lambda: [_concept_example(report, renderer, int(number)) for number in order],
    )


def _concept_example(report: CoverageReport, renderer: ItemRenderer, number: int) -> QueryExample:
    part, threshold = report.all_counts[-1], report.thresholds[number]
    counts = " → ".join(format_interval(part, number) for part in report.all_counts)
    answered = len(report.answers.get(report.concepts.names[number], {}))
    return QueryExample(
        query=PageItem(text=report.concepts.names[number]),
        outcome=f"{counts}; best concept of {report.pool_counts.best[number]:,}, certain for "
        f"{report.pool_counts.certain[number]:,}; threshold {format_fraction(threshold)}"
        + (f"; settled by {answered} answers" if answered else ""),
        is_correct=not part.estimate.highs[number] < report.settings.min_count,
        results=[
            renderer.render(row, is_correct=score > threshold)
            for row, score in zip(report.rows[number].tolist(), report.scores[number].tolist(), strict=True)
        ],
    )


def _coverage_curve(parts: Sequence[ConceptCounts], min_count: int) -> str:
    """Draw the items per concept with their interval, the largest first, as an SVG element: one curve per part."""
    axes = open_axes(3.4)
    for part, color in zip(parts, COLORS, strict=False):
        order = largest_first(part)[: int(part.can_tell.sum())]
        counts, lows, highs = (bound[order] for bound in _bounds(part))
        positions = np.arange(1, len(order) + 1)
        axes.plot(positions, counts, ".", color=color, label=legend_name(part.name))
        axes.vlines(positions, lows, highs, color=color, alpha=0.3)
    axes.axhline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(_COUNT)
    axes.legend(frameon=False, labelcolor=INK)
    label(axes, f"concepts, the largest first; dashed: {min_count:,}, gaps lie below", "estimated items")
    return svg(axes.figure)


def largest_first(part: ConceptCounts) -> Ints:
    """Return the positions of concepts in order of their estimates, the largest first, those without one last."""
    order: Ints = np.argsort(-np.nan_to_num(part.estimate.counts, nan=-1.0), kind="stable")
    return order
