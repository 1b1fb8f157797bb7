"""Concept coverage as tables, JSON and one page: counts, gaps, overlaps, and the best items of each concept."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.arrays import Ints
from embedcache.curate.counting import QUANTILES
from embedcache.curate.coverage import ConceptCounts, CoverageReport
from embedcache.dataset.thumbnails import credit
from embedcache.modalities import noun, pair_nouns
from embedcache.provenance import INDEX_DIGEST
from embedcache.reports.base import (
    BAD,
    COLORS,
    INK,
    SOFT,
    QueryExample,
    Section,
    Table,
    format_count,
    format_fraction,
    format_part,
    format_percent,
    label,
    legend_name,
    open_axes,
    round_json,
    svg,
    write_report,
)
from embedcache.reports.items import ItemRenderer, PageItem
from embedcache.store.rows import keys_at

_FRACTIONS = (0.01, 0.1)
_MAX_BARS = 50
_MAX_GAPS = 100
_MAX_EXAMPLES = 100
_MAX_OVERLAPS = 20
_MAX_DIFFERENCES = 20
_COUNT = "{x:,.0f}"


def gap_note(report: CoverageReport) -> str:
    """Return what to know before gaps are filled."""
    pool = report.pool
    items, others = pair_nouns((pool.modality, pool.other_modality or "text"))
    if pool.modality == "text":
        items, others = others if pool.other_modality else "images", items
    return (
        f"Thresholds favor precision, so counts are low: of a broad concept, or of {items} that are compared with "
        "names through a run, few items are above it. Before you collect more for a gap, look at its nearest items, "
        f"and count {others} too: --modality both."
    )


def summary_table(report: CoverageReport) -> Table:
    """Return the main numbers, with one column for the pool and one for its selection."""
    least, parts, num = report.settings.min_count, report.all_counts, len(report.concepts.names)
    gaps = [len(part.gaps(least)) for part in parts]
    rows = [
        ["items", *(format_count(part.num_items) for part in parts)],
        ["items above any threshold", *(format_part(part.num_covered, part.num_items) for part in parts)],
        [f"concepts with at least {least:,} items", *(format_part(num - count, num) for count in gaps)],
        [f"gaps: concepts with fewer than {least:,}", *map(format_count, gaps)],
        ["concepts without items", *(format_count((part.counts == 0).sum()) for part in parts)],
        ["items per concept, median", *(f"{np.median(part.counts):,.1f}".removesuffix(".0") for part in parts)],
        ["Gini coefficient", *(format_fraction(part.gini) for part in parts)],
    ]
    for fraction in _FRACTIONS:
        percents = [format_percent(part.top_fraction(fraction)) for part in parts]
        rows.append([f"matches of the largest {fraction:.0%} of concepts", *percents])
    if report.expected_by_chance is not None:
        empty = [""] * (len(parts) - 1)
        rows.append(["items above one threshold by chance", _format_expected(report.expected_by_chance), *empty])
        rows.append(["items above any threshold by chance", _format_expected(report.covered_by_chance or 0), *empty])
    return ["", *(part.name for part in parts)], rows


def _format_expected(count: float) -> str:
    """Return an expected count with two digits, such as `0.032` or `2,500`."""
    rounded = float(f"{count:.2g}")
    return f"{rounded:,.0f}" if count >= 10 else np.format_float_positional(rounded, trim="-")


def concept_table(report: CoverageReport, numbers: Ints | Sequence[int]) -> Table:
    """Return the counts, threshold and similarities of the concepts at some positions."""
    names, rows = report.concepts.names, []
    for number in map(int, numbers):
        nearest = int(report.nearest[number])
        cosines = (report.thresholds[number], report.background.quantiles[number, 0], _highest(report, number))
        counts = [*(part.counts[number] for part in report.all_counts), report.pool_counts.assigned[number]]
        cells = [*map(format_count, counts), *map(format_fraction, cosines)]
        rows.append([names[number], *cells, names[nearest] if nearest >= 0 else ""])
    columns = ["concept", *(part.name for part in report.all_counts)]
    return [*columns, "most similar to it", "threshold", "median", "highest", "nearest concept"], rows


def _highest(report: CoverageReport, number: int) -> float:
    """Return the similarity of the most similar item of a concept; NaN if an index has found none."""
    return float(report.scores[number, 0]) if report.rows[number, 0] >= 0 else np.nan


def overlap_table(report: CoverageReport, *, num_rows: int = _MAX_OVERLAPS) -> Table:
    """Return the pairs of concepts that share most items."""
    names = report.concepts.names
    rows = []
    for pair in report.overlaps[:num_rows]:
        numbers = [format_count(pair.num_items), format_fraction(pair.jaccard), format_fraction(pair.cosine)]
        rows.append([names[pair.first], names[pair.second], *numbers])
    return ["concept", "and", "items of both", "Jaccard index", "cosine of the concepts"], rows


def nouns_of(first: CoverageReport, second: CoverageReport) -> tuple[str, str]:
    """Return the plurals of the items of two modalities, such as `("images", "captions")`."""
    return pair_nouns((first.pool.modality, second.pool.modality))


def modality_line(first: CoverageReport, second: CoverageReport) -> str:
    """Return how many concepts are gaps among the items of either modality, and of both, in one line."""
    least, nouns = first.settings.min_count, nouns_of(first, second)
    gaps = [set(report.all_counts[-1].gaps(least).tolist()) for report in (first, second)]
    return (
        f"of {len(first.concepts.names):,} concepts, fewer than {least:,} items have: {len(gaps[0]):,} among "
        f"{nouns[0]}, {len(gaps[1]):,} among {nouns[1]}, {len(gaps[0] & gaps[1]):,} among both"
    )


def modality_table(first: CoverageReport, second: CoverageReport, *, num_rows: int) -> Table:
    """Return the concepts whose fractions of the items of two modalities differ most."""
    parts = (first.pool_counts, second.pool_counts)
    fractions = [part.counts / max(1, part.num_items) for part in parts]
    order = np.argsort(-np.abs(fractions[0] - fractions[1]), kind="stable")[:num_rows]
    rows = [[first.concepts.names[number], *(format_count(part.counts[number]) for part in parts)] for number in order]
    return ["concept", *nouns_of(first, second)], rows


def coverage_json(report: CoverageReport) -> dict[str, Any]:
    """Return a report as JSON values: what was measured, a summary of each part, each concept, and the overlaps."""
    pool, background, index = report.pool, report.background, report.index
    return {
        "pool": {
            "cache": str(pool.cache.path),
            INDEX_DIGEST: pool.cache.info.index_digest,
            "modality": pool.modality,
            "feature": pool.feature.name,
            "fingerprint": dict(pool.feature.fingerprint),
            "run": None if pool.run_path is None else str(pool.run_path),
            "run_weights": None if pool.config is None else pool.config.weights_digest,
        },
        "concepts_from": report.concepts.source,
        "threshold": report.settings.threshold,
        "deviations": report.settings.deviations if report.settings.threshold is None else None,
        "min_count": report.settings.min_count,
        "num_sampled": background.num_items,
        "index": index and {"factory": index.factory, "recall_at_10": index.recall_at_10},
        "by_chance": report.expected_by_chance,
        "covered_by_chance": report.covered_by_chance,
        "warnings": report.warnings(),
        "parts": [
            {
                "name": part.name,
                "items": part.num_items,
                "covered": part.num_covered,
                "gaps": [report.concepts.names[number] for number in part.gaps(report.settings.min_count)],
                "gini": round_json(part.gini),
                **{
                    f"share_of_largest_{fraction:g}": round_json(part.top_fraction(fraction)) for fraction in _FRACTIONS
                },
            }
            for part in report.all_counts
        ],
        "concepts": _concepts_json(report),
        "overlaps": [
            {
                "concepts": [report.concepts.names[pair.first], report.concepts.names[pair.second]],
                "items": pair.num_items,
                "jaccard": round_json(pair.jaccard),
                "cosine": round_json(pair.cosine),
            }
            for pair in report.overlaps
        ],
    }


def _concepts_json(report: CoverageReport) -> list[dict[str, Any]]:
    cache = report.pool.cache
    samples = cache.items(report.pool.modality, columns=["sample"])["sample"].to_numpy()[
        report.rows.ravel().clip(min=0)
    ]
    keys = keys_at(cache, samples).to_numpy().reshape(report.rows.shape)
    return [
        {
            "name": name,
            report.concepts.source["of"]: int(report.concepts.counts[number]),
            "counts": [int(part.counts[number]) for part in report.all_counts],
            "assigned": [int(part.assigned[number]) for part in report.all_counts],
            "threshold": round_json(report.thresholds[number]),
            "quantiles": {
                f"{quantile:g}": round_json(value)
                for quantile, value in zip(QUANTILES, report.background.quantiles[number], strict=True)
            },
            "best": [
                {"row": int(row), "key": key, "cosine": round_json(score)}
                for row, key, score in zip(report.rows[number], keys[number], report.scores[number], strict=True)
                if row >= 0
            ],
        }
        for number, name in enumerate(report.concepts.names)
    ]


def write_coverage_page(path: Path, *reports: CoverageReport) -> None:
    """Write a page of coverage by one modality or by two; images are read as by `Thumbnails`."""
    is_both = len(reports) == 2
    renderers = [ItemRenderer(report.pool.cache, report.pool.modality) for report in reports]
    sections = []
    if is_both:
        items, others = nouns_of(*reports)
        notes = [
            f"{modality_line(*reports).capitalize()}.",
            f"The table lists the concepts whose fractions of the {items} and of the {others} differ most.",
        ]
        table = modality_table(*reports, num_rows=_MAX_DIFFERENCES)
        sections = [Section(title=f"{items.capitalize()} and {others}", notes=notes, table=table)]
    for report, renderer in zip(reports, renderers, strict=True):
        prefix = f"{noun(report.pool.modality).capitalize()}: " if is_both else ""
        sections += [replace(section, title=f"{prefix}{section.title}") for section in _sections(report, renderer)]
    warnings = [
        warning
        for report, renderer in zip(reports, renderers, strict=True)
        for warning in (*report.warnings(), *renderer.warnings())
    ]
    write_report(
        path,
        title="Concept coverage",
        summary=" ".join(f"{report.line()}." for report in reports),
        warnings=dict.fromkeys(warnings),
        sections=sections,
        credit=credit(reports[0].pool.cache) if reports[0].pool.modality != "text" else "",
    )


def _sections(report: CoverageReport, renderer: ItemRenderer) -> list[Section]:
    notes = ["An item counts for every concept whose threshold its cosine exceeds, and is most similar to one of them."]
    if report.settings.threshold is None:
        notes.append(
            f"A threshold is the median of the concept's cosines on {report.background.num_items:,} items plus "
            f"{report.settings.deviations:g} standard deviations of their background, measured below the median, where "
            "items of the concept do not widen it. The numbers by chance are what normal backgrounds put above it, and "
            "above any of all thresholds."
        )
    return [
        Section(title="Summary", notes=notes, table=summary_table(report)),
        _count_section(report),
        _gap_section(report),
        _overlap_section(report),
        _concept_section(report, renderer),
    ]


def _count_section(report: CoverageReport) -> Section:
    parts, least = report.all_counts, report.settings.min_count
    bars = _coverage_bars(report.concepts.names, parts, min_count=least)
    if len(report.concepts.names) <= _MAX_BARS:
        return Section(title="Items per concept", figures=[bars])
    notes = [f"All concepts as a curve, then the {_MAX_BARS // 2} largest and the {_MAX_BARS // 2} smallest as bars."]
    figures = [_coverage_curve(parts, min_count=least), bars]
    return Section(title="Items per concept", notes=notes, figures=figures)


def _gap_section(report: CoverageReport) -> Section:
    part, least = report.all_counts[-1], report.settings.min_count
    gaps = report.gaps()
    if not len(gaps):
        return Section(title="Gaps", notes=[f"No concept has fewer than {least:,} items."])
    order = "the smallest first, of equal ones that nearest to its items"
    notes = [f"Concepts with fewer than {least:,} items in {part.name}, {order}. {gap_note(report)}"]
    if len(gaps) > _MAX_GAPS:
        notes.append(f"The first {_MAX_GAPS} of {len(gaps):,}; the JSON report has all of them.")
    return Section(title="Gaps", notes=notes, table=concept_table(report, gaps[:_MAX_GAPS]))


def _overlap_section(report: CoverageReport) -> Section:
    if not report.overlaps:
        return Section(title="Overlap", notes=["No concept shares an item with one of its 8 nearest concepts."])
    note = (
        "Items above both thresholds; the Jaccard index divides them by the items above either. Each concept is "
        "compared with its 8 nearest concepts."
    )
    return Section(title="Overlap", notes=[note], table=overlap_table(report))


def _concept_section(report: CoverageReport, renderer: ItemRenderer) -> Section:
    order = largest_first(report.pool_counts.counts)
    notes = ["The most similar items of each concept, best first; green: above its threshold."]
    if len(order) > _MAX_EXAMPLES:
        order = order[np.linspace(0, len(order) - 1, _MAX_EXAMPLES).round().astype(np.int64)]
        total = len(report.concepts.names)
        notes.append(f"{_MAX_EXAMPLES} of {total:,} concepts, evenly spaced from the largest to the smallest.")
    examples = [_concept_example(report, renderer, int(number)) for number in order]
    return Section(title="Concepts", notes=notes, examples=examples)


def _concept_example(report: CoverageReport, renderer: ItemRenderer, number: int) -> QueryExample:
    counts = " → ".join(format_count(part.counts[number]) for part in report.all_counts)
    levels = ", ".join(f"{quantile:g}" for quantile in QUANTILES)
    cosines = [*report.background.quantiles[number], _highest(report, number)]
    threshold = report.thresholds[number]
    return QueryExample(
        query=PageItem(text=report.concepts.names[number]),
        outcome=f"{counts} above {format_fraction(threshold)}; cosine quantiles {levels} and maximum: "
        f"{', '.join(map(format_fraction, cosines))}",
        is_correct=bool(report.all_counts[-1].counts[number] >= report.settings.min_count),
        results=[
            renderer.render(row, is_correct=score > threshold)
            for row, score in zip(report.rows[number].tolist(), report.scores[number].tolist(), strict=True)
            if row >= 0
        ],
    )


def _coverage_curve(parts: Sequence[ConceptCounts], *, min_count: int) -> str:
    """Draw the items per concept, the largest first: one curve per part, dashed where gaps begin; an SVG element."""
    axes = open_axes(3.4)
    for part, color in zip(parts, COLORS, strict=False):
        counts = np.sort(part.counts)[::-1]
        axes.plot(np.arange(1, len(counts) + 1), counts, color=color, label=legend_name(part.name), linewidth=2)
    axes.axhline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_COUNT)
    axes.legend(frameon=False, labelcolor=INK)
    label(axes, f"concepts, the largest first; dashed: {min_count:,}, gaps lie below", "items above the threshold")
    return svg(axes.figure)


def _coverage_bars(names: Sequence[str], parts: Sequence[ConceptCounts], *, min_count: int) -> str:
    """Draw one bar per concept and part as an SVG element; of many concepts the largest and the smallest."""
    order = largest_first(parts[0].counts)
    if len(order) > _MAX_BARS:
        order = np.concatenate([order[: _MAX_BARS // 2], order[-_MAX_BARS // 2 :]])
    axes = open_axes(0.8 + (0.12 + 0.12 * len(parts)) * len(order))
    height = 0.8 / len(parts)
    for number, part in enumerate(parts):
        positions = np.arange(len(order)) + (number - (len(parts) - 1) / 2) * height
        axes.barh(positions, part.counts[order], color=COLORS[number], height=height, label=legend_name(part.name))
    axes.axvline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_COUNT)
    axes.set_yticks(range(len(order)), [names[number] for number in order], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if len(order) < len(names):
        axes.axhline(_MAX_BARS // 2 - 0.5, color=SOFT, linewidth=1)
    if len(parts) > 1:
        axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    label(axes, f"items above the threshold; dashed: {min_count:,}, gaps lie below")
    return svg(axes.figure)


def largest_first(counts_C: Ints) -> Ints:
    """Return the positions of concepts in order of their counts, the largest first; ties keep their order."""
    order: Ints = np.argsort(-counts_C, kind="stable")
    return order
