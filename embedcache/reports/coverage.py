"""Coverage as rows to print and as JSON.

Figures of coverage as SVG text, to be placed inside a page.

Coverage as one page: figures, gaps, what overlaps, and the best examples of concepts to look at.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from embedcache.arrays import Array, Bools, Ints
from embedcache.curate.counting import QUANTILES
from embedcache.curate.coverage import ConceptCounts, CoverageReport
from embedcache.reports.base import BAD, COLOURS, INK, SOFT, Case, Section, Shown, label, svg, write_sections
from embedcache.reports.thumbnails import Pictures, credit

Table = tuple[list[str], list[list[str]]]

_SHARES = (0.01, 0.1)


def summary_rows(report: CoverageReport) -> Table:
    """Lay the pool and its selection out side by side, a figure a row."""
    least = report.settings.min_count
    num = len(report.concepts.names)
    rows = [
        ["items", *(f"{part.num_items:,}" for part in report.parts)],
        ["above any threshold", *(_of(part.num_covered, part.num_items) for part in report.parts)],
        [f"concepts with at least {least:,}", *(_of(num - len(part.gaps(least)), num) for part in report.parts)],
        [f"gaps: concepts with fewer than {least:,}", *(f"{len(part.gaps(least)):,}" for part in report.parts)],
        ["concepts with none", *(f"{(part.counts == 0).sum():,}" for part in report.parts)],
        ["items of a concept, median", *(f"{np.median(part.counts):,.0f}" for part in report.parts)],
        ["Gini", *(f"{part.gini:.3f}" for part in report.parts)],
        *(
            [f"matches of the largest {share:.0%} of concepts", *(_percent(part, share) for part in report.parts)]
            for share in _SHARES
        ),
    ]
    if report.by_chance is not None:
        rows.append(["above a threshold by chance", f"{report.by_chance:,.2g}", *([""] if report.selected else [])])
    return ["", *(part.name for part in report.parts)], rows


def concept_rows(report: CoverageReport, numbers: Ints | Sequence[int]) -> Table:
    """List some concepts: how many items, by the pool and the selection, and how similar the best of them are."""
    columns = ["concept", *(part.name for part in report.parts)]
    columns += ["most similar to it", "threshold", "median", "highest", "nearest concept"]
    return columns, [_concept_row(report, int(number)) for number in numbers]


def overlap_rows(report: CoverageReport, *, most: int = 20) -> Table:
    """List the concepts that share most items."""
    names = report.concepts.names
    rows = [
        [names[one.one], names[one.other], f"{one.num:,}", f"{one.jaccard:.3f}", f"{one.cosine:.3f}"]
        for one in report.overlaps[:most]
    ]
    return ["concept", "and", "items of both", "of the items of either", "cosine of the concepts"], rows


def side_line(images: CoverageReport, texts: CoverageReport) -> str:
    """Say how many concepts are gaps by images, by captions and by both."""
    least = images.settings.min_count
    by_images, by_texts = (set(report.parts[-1].gaps(least).tolist()) for report in (images, texts))
    return (
        f"of {len(images.concepts.names):,} concepts fewer than {least:,} items: {len(by_images):,} by images, "
        f"{len(by_texts):,} by captions, {len(by_images & by_texts):,} by both"
    )


def side_rows(images: CoverageReport, texts: CoverageReport, *, most: int) -> Table:
    """List the concepts whose share of the images and share of the captions differ most."""
    shares = [part.counts / max(1, part.num_items) for part in (images.whole, texts.whole)]
    order = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")[:most]
    rows = [
        [images.concepts.names[number], f"{images.whole.counts[number]:,}", f"{texts.whole.counts[number]:,}"]
        for number in order
    ]
    return ["concept", "images", "captions"], rows


def coverage_json(report: CoverageReport) -> dict[str, Any]:
    """Give all figures as JSON values: what was measured, a summary of each part, each concept, and the overlaps."""
    pool, background = report.pool, report.background
    return {
        "pool": {
            "cache": str(pool.cache.path),
            "spine": pool.cache.info.index_digest,
            "modality": pool.modality,
            "feature": pool.side.name,
            "fingerprint": dict(pool.side.fingerprint),
            "run": None if pool.run_path is None else str(pool.run_path),
            "run_weights": None if pool.config is None else pool.config.weights_digest,
        },
        "concepts_from": report.concepts.about,
        "threshold": report.settings.threshold,
        "deviations": report.settings.deviations if report.settings.threshold is None else None,
        "min_count": report.settings.min_count,
        "num_sampled": background.num_items,
        "index": None
        if report.index is None
        else {"factory": report.index.factory, "recall_at_10": report.index.recall_at_10},
        "by_chance": report.by_chance,
        "warnings": report.warnings(),
        "parts": [_part_json(report, part) for part in report.parts],
        "concepts": _concepts_json(report),
        "overlaps": [
            {
                "concepts": [report.concepts.names[one.one], report.concepts.names[one.other]],
                "items": one.num,
                "jaccard": round(one.jaccard, 5),
                "cosine": round(one.cosine, 5),
            }
            for one in report.overlaps
        ],
    }


def keys_of(report: CoverageReport, rows: Array) -> list[str]:
    """Get the sample's key of each of some items."""
    cache = report.pool.cache
    samples = cache.items(report.pool.modality)["sample"].to_numpy()[rows]
    keys: list[str] = cache.samples["key"].take(pa.array(samples)).to_pylist()
    return keys


def _concept_row(report: CoverageReport, number: int) -> list[str]:
    near = int(report.near[number])
    return [
        report.concepts.names[number],
        *(f"{part.counts[number]:,}" for part in report.parts),
        f"{report.whole.assigned[number]:,}",
        f"{report.thresholds[number]:.3f}",
        f"{report.background.quantiles[number, 0]:.3f}",
        f"{report.scores[number, 0]:.3f}",
        report.concepts.names[near] if near >= 0 else "",
    ]


def _part_json(report: CoverageReport, part: ConceptCounts) -> dict[str, Any]:
    gaps = part.gaps(report.settings.min_count)
    return {
        "name": part.name,
        "items": part.num_items,
        "covered": part.num_covered,
        "gaps": [report.concepts.names[number] for number in gaps],
        "gini": _finite(part.gini),
        **{f"share_of_largest_{share:g}": _finite(part.top_share(share)) for share in _SHARES},
    }


def _concepts_json(report: CoverageReport) -> list[dict[str, Any]]:
    keys = np.array(keys_of(report, report.rows.ravel()), object).reshape(report.rows.shape)
    return [
        {
            "name": name,
            report.concepts.about["of"]: int(report.concepts.counts[number]),
            "counts": [int(part.counts[number]) for part in report.parts],
            "assigned": [int(part.assigned[number]) for part in report.parts],
            "threshold": round(float(report.thresholds[number]), 5),
            "quantiles": {
                f"{quantile:g}": round(float(value), 5)
                for quantile, value in zip(QUANTILES, report.background.quantiles[number], strict=True)
            },
            "best": [
                {"row": int(row), "key": key, "cosine": round(float(score), 5)}
                for row, key, score in zip(report.rows[number], keys[number], report.scores[number], strict=True)
            ],
        }
        for number, name in enumerate(report.concepts.names)
    ]


def _of(num: int, total: int) -> str:
    return f"{num:,} ({num / total:.1%})" if total else "0"


def _percent(part: ConceptCounts, share: float) -> str:
    found = part.top_share(share)
    return "-" if np.isnan(found) else f"{found:.1%}"


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 5)


MOST_BARS = 50
"""Concepts drawn as bars."""

_COUNT = StrMethodFormatter("{x:,.0f}")


def coverage_curve(parts: Sequence[ConceptCounts], *, min_count: int) -> str:
    """Draw the items of each concept, the largest first: a line a part, and one where gaps begin."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for part, color in zip(parts, COLOURS, strict=False):
        counts = np.sort(part.counts)[::-1]
        axes.plot(np.arange(1, len(counts) + 1), counts, color=color, label=part.name, linewidth=2)
    axes.axhline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_COUNT)
    axes.legend(frameon=False, labelcolor=INK)
    label(axes, f"concepts, the largest first; dashed: {min_count:,}, below are gaps", "items above the threshold")
    return svg(figure)


def coverage_bars(names: Sequence[str], parts: Sequence[ConceptCounts], *, min_count: int) -> str:
    """Draw a bar a concept and part, the largest first; of many concepts the largest and the smallest."""
    order = largest_first(parts[0].counts)
    if len(order) > MOST_BARS:
        order = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
    figure = Figure(figsize=(9, 0.8 + (0.12 + 0.12 * len(parts)) * len(order)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(parts)
    for number, part in enumerate(parts):
        places = np.arange(len(order)) + (number - (len(parts) - 1) / 2) * height
        axes.barh(places, part.counts[order], color=COLOURS[number], height=height, label=part.name)
    axes.axvline(min_count, color=BAD, linestyle="--", linewidth=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_COUNT)
    axes.set_yticks(range(len(order)), [names[number] for number in order], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    if len(order) < len(names):
        axes.axhline(MOST_BARS // 2 - 0.5, color=SOFT, linewidth=1)
    if len(parts) > 1:
        axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    label(axes, f"items above the threshold; dashed: {min_count:,}, below are gaps")
    return svg(figure)


def largest_first(counts_C: Ints) -> Ints:
    """Order concepts by their counts, the largest first; of ties the first."""
    order: Ints = np.argsort(-counts_C, kind="stable")
    return order


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
