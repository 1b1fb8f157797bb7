"""Coverage as one page: figures, gaps, what overlaps, and the best examples of concepts to look at."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from embedcache.arrays import Bools, Ints
from embedcache.curate.coverage.background import QUANTILES
from embedcache.curate.coverage.coverage import CoverageReport
from embedcache.curate.coverage.plots import MOST_BARS, coverage_bars, coverage_curve, largest_first
from embedcache.curate.coverage.report import concept_rows, overlap_rows, side_line, side_rows, summary_rows
from embedcache.pages.pictures import Pictures, credit
from embedcache.pages.sections import Case, Section, Shown, write_sections

_MOST_GAPS = 100
_MOST_CASES = 100


def write_coverage(path: Path, *reports: CoverageReport) -> None:
    """Write the page. It asks for nothing from outside.

    Args:
        path: of the page.
        reports: what was measured, of images, of captions, or of both in this order; images are read again from the
            pool's source.
    """
    sections = [_both(*reports)] if len(reports) == 2 else []
    for report in reports:
        side = f"{report.pool.modality.capitalize()}s: " if len(reports) == 2 else ""
        sections += [replace(section, title=f"{side}{section.title}") for section in _sections(report)]
    write_sections(
        path,
        title="Concept coverage",
        lead=" ".join(f"{report.line()}." for report in reports),
        warnings=[warning for report in reports for warning in report.warnings()],
        credit=credit(reports[0].pool.cache) if reports[0].pool.modality == "image" else "",
        sections=sections,
    )


def _sections(report: CoverageReport) -> list[Section]:
    return [
        Section(title="Summary", notes=_notes(report), table=summary_rows(report)),
        _counts(report),
        _gaps(report),
        _overlaps(report),
        _gallery(report),
    ]


def _both(images: CoverageReport, texts: CoverageReport) -> Section:
    notes = [side_line(images, texts).capitalize() + ".", "Below, where the shares of images and captions differ most."]
    return Section(title="Images and captions", notes=notes, table=side_rows(images, texts, most=20))


def _counts(report: CoverageReport) -> Section:
    parts, least = report.parts, report.settings.min_count
    bars = coverage_bars(report.concepts.names, parts, min_count=least)
    if len(report.concepts.names) <= MOST_BARS:
        return Section(title="Items of each concept", figures=[bars])
    notes = [f"All concepts as a line, then the {MOST_BARS // 2} largest and the {MOST_BARS // 2} smallest as bars."]
    figures = [coverage_curve(parts, min_count=least), bars]
    return Section(title="Items of each concept", notes=notes, figures=figures)


def _notes(report: CoverageReport) -> list[str]:
    notes = [
        "An item counts for every concept whose threshold its cosine is above, and is most similar to one of them.",
    ]
    if report.settings.threshold is None:
        notes.append(
            f"A threshold is the median of the concept's cosines on {report.background.num_items:,} items, plus "
            f"{report.settings.deviations:g} standard deviations of their background, which is measured below the "
            "median, where items of the concept do not widen it. By chance is what a normal background puts above it."
        )
    return notes


def _gaps(report: CoverageReport) -> Section:
    part = report.parts[-1]
    gaps = part.gaps(report.settings.min_count)
    if not len(gaps):
        return Section(title="Gaps", notes=[f"No concept has fewer than {report.settings.min_count:,} items."])
    notes = [f"Concepts with fewer than {report.settings.min_count:,} items in {part.name}, the emptiest first."]
    if len(gaps) > _MOST_GAPS:
        notes.append(f"The first {_MOST_GAPS} of {len(gaps):,}; --json has all.")
    return Section(title="Gaps", notes=notes, table=concept_rows(report, gaps[:_MOST_GAPS]))


def _overlaps(report: CoverageReport) -> Section:
    if not report.overlaps:
        return Section(title="Overlap", notes=["No concept shares an item with one of the 8 nearest to it."])
    note = "Items above both thresholds, of the items above either. Each concept is compared with the 8 nearest to it."
    return Section(title="Overlap", notes=[note], table=overlap_rows(report))


def _gallery(report: CoverageReport) -> Section:
    order = largest_first(report.whole.counts)
    notes = ["The most similar items of each concept, best first; green: above its threshold."]
    if len(order) > _MOST_CASES:
        order = order[np.linspace(0, len(order) - 1, _MOST_CASES).round().astype(np.int64)]
        notes.append(
            f"{_MOST_CASES} of {len(report.concepts.names):,} concepts, evenly from the largest to the smallest."
        )
    show = _Shower(report)
    return Section(title="Concepts", notes=notes, cases=[_case(report, show, int(number)) for number in order])


def _case(report: CoverageReport, show: "_Shower", number: int) -> Case:
    counts = " → ".join(f"{part.counts[number]:,}" for part in report.parts)
    quantiles = ", ".join(f"{value:.2f}" for value in [*report.background.quantiles[number], report.scores[number, 0]])
    levels = ", ".join(f"{quantile:g}" for quantile in QUANTILES)
    return Case(
        query=Shown(text=report.concepts.names[number]),
        said=f"{counts} above {report.thresholds[number]:.3f}; cosines at {levels} and highest: {quantiles}",
        is_right=bool(report.parts[-1].counts[number] >= report.settings.min_count),
        shown=show.items(report.rows[number], report.scores[number] > report.thresholds[number]),
    )


class _Shower:
    """Turns rows of the pool into pictures or captions; reads each table once."""

    def __init__(self, report: CoverageReport) -> None:
        self._cache, self._modality = report.pool.cache, report.pool.modality

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(self._cache)

    @cached_property
    def _texts(self) -> list[str]:
        texts: list[str] = self._cache.items("text")["text"].to_pylist()
        return texts

    def items(self, rows_K: Ints, is_above_K: Bools) -> list[Shown]:
        return [
            Shown(picture=self._pictures.data_url(row), is_right=is_above)
            if self._modality == "image"
            else Shown(text=self._texts[row], is_right=is_above)
            for row, is_above in zip(rows_K.tolist(), is_above_K.tolist(), strict=True)
        ]
