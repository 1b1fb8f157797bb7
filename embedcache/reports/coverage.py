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
    """Return a hint for a user who is about to collect items for a gap."""
    pool = report.pool
    items, partners = pair_nouns((pool.modality, pool.other_modality or "text"))

    # Captions are rarely collected without an image, so the advice to collect names the images.
    if pool.modality == "text":
        captions = items
        items = partners if pool.other_modality else "images"
        partners = captions
    return (
        f"Before you collect more {items} for a gap, look at its nearest items, and count {partners} too: "
        "--modality both."
    )


def summary_table(report: CoverageReport) -> Table:
    """Return the main numbers, with one column for the pool and one for its selection."""
    rows: dict[str, list[str]] = {}
    for part in report.all_counts:
        for name, cell in _summarize_part(part, report.settings.min_count).items():
            rows.setdefault(name, [name]).append(cell)
    return ["", *_part_names(report)], list(rows.values())


def _part_names(report: CoverageReport) -> list[str]:
    return [part.name for part in report.all_counts]


def _summarize_part(part: ConceptCounts, min_count: int) -> dict[str, str]:
    """Return the cells of one column of the summary by the names of their rows."""
    # NumPy warns of the median of no estimates.
    median = np.median(part.estimate.counts[part.can_tell]) if part.can_tell.any() else np.nan
    cells = {
        "items": format_count(part.num_items),
        "items above any threshold": format_part(part.num_covered, part.num_items),
        "concepts with an estimate": format_part(part.can_tell.sum(), len(part.can_tell)),
        f"gaps: upper bound below {min_count:,}": format_count(len(part.gaps(min_count))),
        "items per concept, median estimate": _format_estimate(median),
        "Gini coefficient": format_fraction(part.gini),
    }
    for fraction in _FRACTIONS:
        cells[f"items of the largest {fraction:.0%} of concepts"] = format_percent(part.top_fraction(fraction))
    return cells


def _format_estimate(count: float) -> str:
    """Return an estimate as a whole number; `cannot tell` if there is none."""
    return "cannot tell" if np.isnan(count) else f"{count:,.0f}"


def format_interval(part: ConceptCounts, number: int) -> str:
    """Return the estimate of a concept with its interval, such as `16 [6, 60]`."""
    count, low, high = _bounds(part, number)
    return "cannot tell" if np.isnan(count) else f"{count:,.0f} [{low:,.0f}, {high:,.0f}]"


def _format_intervals(parts: Sequence[ConceptCounts], number: int) -> list[str]:
    return [format_interval(part, number) for part in parts]


def _bounds(part: ConceptCounts, numbers: int | Ints) -> tuple[Any, Any, Any]:
    """Return the estimate of a concept, or of several, and the ends of its interval."""
    estimate = part.estimate
    return estimate.counts[numbers], estimate.lows[numbers], estimate.highs[numbers]


def concept_table(report: CoverageReport, numbers: Ints | Sequence[int]) -> Table:
    """Return the estimates, counts, threshold and similarities of the concepts at some positions."""
    names = report.concepts.names
    pool = report.pool_counts
    columns = [
        "concept",
        *_part_names(report),
        "most similar to it",
        "certain",
        "median",
        "threshold",
        "highest",
        "nearest concept",
    ]

    rows = []
    for number in map(int, numbers):
        # A list of one concept has no nearest one, which is stored as -1.
        nearest = int(report.nearest[number])
        rows.append(
            [
                names[number],
                *_format_intervals(report.all_counts, number),
                format_count(pool.best[number]),
                format_count(pool.certain[number]),
                format_fraction(report.background.scale.medians[number]),
                format_fraction(report.thresholds[number]),
                format_fraction(report.scores[number, 0]),
                names[nearest] if nearest >= 0 else "",
            ]
        )
    return columns, rows


def nouns_of(first: CoverageReport, second: CoverageReport) -> tuple[str, str]:
    """Return the plurals of the items of two modalities, such as `("images", "captions")`."""
    return pair_nouns((first.pool.modality, second.pool.modality))


def modality_line(first: CoverageReport, second: CoverageReport) -> str:
    """Return how many concepts are gaps among the items of either modality, and of both, in one line."""
    min_count = first.settings.min_count
    first_noun, second_noun = nouns_of(first, second)
    first_gaps = set(_gaps(first).tolist())
    second_gaps = set(_gaps(second).tolist())
    return (
        f"of {len(first.concepts.names):,} concepts, fewer than {min_count:,} items show: {len(first_gaps):,} among "
        f"{first_noun}, {len(second_gaps):,} among {second_noun}, {len(first_gaps & second_gaps):,} among both"
    )


def modality_table(first: CoverageReport, second: CoverageReport, *, num_rows: int) -> Table:
    """Return the concepts whose fractions of the items of two modalities differ most."""
    parts = (first.pool_counts, second.pool_counts)
    # Fractions, because a cache often has more captions than images.
    differences_C = np.abs(_fractions(parts[0]) - _fractions(parts[1]))
    order = np.argsort(-differences_C, kind="stable")[:num_rows]
    rows = [[first.concepts.names[number], *_format_intervals(parts, number)] for number in order]
    return ["concept", *nouns_of(first, second)], rows


def _fractions(part: ConceptCounts) -> Array:
    """Return the fraction of the items that show each concept: (C,), 0 if there is no estimate."""
    return np.nan_to_num(part.estimate.counts / max(1, part.num_items))


def coverage_json(report: CoverageReport) -> dict[str, Any]:
    """Return a report as JSON values: the pool that was measured, a summary of each part, and each concept."""
    pool = report.pool
    names = report.concepts.names
    parts = []
    for part in report.all_counts:
        gaps = part.gaps(report.settings.min_count)
        parts.append(
            {
                "name": part.name,
                "items": part.num_items,
                "covered": part.num_covered,
                "gaps": [names[number] for number in gaps],
                "gini": round_json(part.gini),
            }
        )

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
        "parts": parts,
        "strip_weights": report.strip_weights.tolist(),
        "concepts": _concepts_json(report),
    }


def _concepts_json(report: CoverageReport) -> list[dict[str, Any]]:
    scale = report.background.scale
    # The items of all concepts are looked up together: one read of the item table per concept would be slow.
    nearest = _items_json(report, report.rows, report.scores)
    strips = _items_json(report, report.strip_rows, report.background.strip_cosines)

    concepts = []
    for number, name in enumerate(report.concepts.names):
        concept: dict[str, Any] = {"name": name, **_counts_json(report.pool_counts, number)}
        if report.selection_counts is not None:
            concept["selection"] = _counts_json(report.selection_counts, number)
        concept[report.concepts.source["of"]] = int(report.concepts.counts[number])
        concept["threshold"] = round_json(report.thresholds[number])
        concept["scale"] = _floats_at(number, scale.medians, scale.spreads, scale.reaches)
        # JSON has no integer keys.
        concept["answers"] = {str(row): shows for row, shows in report.answers.get(name, {}).items()}
        concept["nearest"] = nearest[number]
        concept["strip"] = strips[number]
        concepts.append(concept)
    return concepts


def _floats_at(number: int, *columns: Array) -> list[float]:
    return [float(column[number]) for column in columns]


def _counts_json(part: ConceptCounts, number: int) -> dict[str, Any]:
    """Return the counts of a concept; an estimate is null if its scores cannot tell."""
    counts: dict[str, Any] = {}
    for name, bound in zip(("count", "low", "high"), _bounds(part, number), strict=True):
        # JSON has no NaN.
        counts[name] = None if np.isnan(bound) else round(bound)

    counts["best"] = int(part.best[number])
    counts["certain"] = int(part.certain[number])
    counts["prior"] = _floats_at(number, part.prior.counts, part.prior.lows, part.prior.highs)
    return counts


def _items_json(report: CoverageReport, rows_CK: Ints, cosines_CK: Array) -> list[list[dict[str, Any]]]:
    """Return the row, key and cosine of the K items of each concept."""
    cache = report.pool.cache
    samples = cache.items(report.pool.modality, columns=["sample"])["sample"].to_numpy()[rows_CK.ravel()]
    keys_CK = keys_at(cache, samples).to_numpy().reshape(rows_CK.shape)

    concepts = []
    for rows_K, keys_K, cosines_K in zip(rows_CK, keys_CK, cosines_CK, strict=True):
        items = []
        for row, key, cosine in zip(rows_K, keys_K, cosines_K, strict=True):
            items.append({"row": int(row), "key": key, "cosine": round_json(cosine)})
        concepts.append(items)
    return concepts


def present_coverage(reports: Mapping[str, CoverageReport]) -> Presentation:
    """Return the presentation of coverage, with one report per modality: one or two."""
    is_both = len(reports) > 1
    lines = []
    warnings = []
    sections = [_difference_section(*reports.values())] if is_both else []
    notes = []
    renderers = []
    for report in reports.values():
        renderer = ItemRenderer(report.pool.cache, report.pool.modality)
        lines.append(report.line())
        warnings += report.warnings()
        renderers.append(renderer)
        if len(_gaps(report)):
            notes.append(gap_note(report))

        # Sections of two modalities have the same titles, so they say which modality they describe.
        prefix = f"{noun(report.pool.modality).capitalize()}: " if is_both else ""
        for section in _sections(report, renderer):
            sections.append(replace(section, title=f"{prefix}{section.title}"))

    def record() -> Any:
        records = {modality: coverage_json(report) for modality, report in reports.items()}
        return records if is_both else next(iter(records.values()))

    return Presentation(
        title="Concept coverage",
        lines=lines,
        warnings=warnings,
        sections=sections,
        record=record,
        notes=notes,
        renderers=renderers,
    )


def concept_sections(
    report: CoverageReport, renderer: ItemRenderer, *, num: int, notes: Sequence[str] = ()
) -> list[Section]:
    """Return the sections of the largest concepts: their estimates as bars, and their most similar items."""
    part = report.pool_counts
    estimates = {}
    for number in largest_first(part)[:num]:
        # A concept without an estimate has no bar.
        if part.can_tell[number]:
            estimates[report.concepts.names[number]] = Estimate(*map(float, _bounds(part, number)))

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

    # A lower bound of zero has no logarithm, so the scale is linear below one item.
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_COUNT)
    label(axes, "estimated number")
    return svg(axes.figure)


def _difference_section(first: CoverageReport, second: CoverageReport) -> Section:
    first_noun, second_noun = nouns_of(first, second)
    return Section(
        title=f"{first_noun.capitalize()} and {second_noun}",
        notes=[
            f"{modality_line(first, second).capitalize()}.",
            f"The table lists the concepts whose fractions of the {first_noun} and of the {second_noun} differ most.",
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
    # A concept of a short list is not listed as one of the largest and of the smallest.
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
    gaps = _gaps(report)
    min_count = report.settings.min_count
    if not len(gaps):
        return Section(title="Gaps", notes=[f"No concept has an upper bound below {min_count:,} items."])

    part = report.all_counts[-1]
    notes = [f"Concepts of which even the upper bound is below {min_count:,} in {part.name}. {gap_note(report)}"]
    if len(gaps) > _MAX_GAPS:
        notes.append(f"The first {_MAX_GAPS} of {len(gaps):,}; the JSON report has all of them.")
    return Section(title="Gaps", notes=notes, table=concept_table(report, gaps[:_MAX_GAPS]), num_printed=0)


def _concept_section(report: CoverageReport, renderer: ItemRenderer, *, num: int | None = None) -> Section:
    order = largest_first(report.pool_counts)[:num]
    notes = ["The most similar items of each concept, best first; green: above its threshold."]

    # A page with the images of thousands of concepts would not open in a browser.
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
    name = report.concepts.names[number]
    part = report.all_counts[-1]
    pool = report.pool_counts
    threshold = report.thresholds[number]

    counts = " → ".join(_format_intervals(report.all_counts, number))
    outcome = (
        f"{counts}; best concept of {pool.best[number]:,}, certain for {pool.certain[number]:,}; "
        f"threshold {format_fraction(threshold)}"
    )
    num_answers = len(report.answers.get(name, {}))
    if num_answers:
        outcome += f"; settled by {num_answers} answers"

    results = []
    for row, score in zip(report.rows[number].tolist(), report.scores[number].tolist(), strict=True):
        results.append(renderer.render(row, is_correct=score > threshold))
    return QueryExample(
        query=PageItem(text=name),
        outcome=outcome,
        # A concept whose scores cannot tell has the bound NaN and is not marked as a gap.
        is_correct=not part.estimate.highs[number] < report.settings.min_count,
        results=results,
    )


def _coverage_curve(parts: Sequence[ConceptCounts], min_count: int) -> str:
    """Draw the items per concept with their interval, the largest first, as an SVG element: one curve per part."""
    axes = open_axes(3.4)

    for part, color in zip(parts, COLORS, strict=False):
        order = largest_first(part)[: int(part.can_tell.sum())]
        counts, lows, highs = _bounds(part, order)
        positions = np.arange(1, len(order) + 1)
        axes.plot(positions, counts, ".", color=color, label=legend_name(part.name))
        axes.vlines(positions, lows, highs, color=color, alpha=0.3)

    axes.axhline(min_count, color=BAD, linestyle="--", linewidth=1)

    # Linear below one item, since a lower bound of zero has no logarithm.
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
