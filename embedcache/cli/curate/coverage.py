"""embedcache curate coverage"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from embedcache.curate.coverage import CoverageReport


def coverage(
    cache: Annotated[str, typer.Argument(help="The pool: a cache, or its URL.")],
    concepts: Annotated[str, typer.Argument(help="A cache of embedcache extract prompts:…, or of labeled examples.")],
    modality: Annotated[Literal["image", "text", "both"], typer.Option(help="What of the pool to look at.")] = "image",
    feature: Annotated[str | None, typer.Option(help="encoder/feature. [default: the run's, or the only one]")] = None,
    projected: Annotated[Path | None, typer.Option(help="Project pool and concepts with this run.")] = None,
    label: Annotated[str, typer.Option(help="Column of the examples' labels.")] = "label",
    threshold: Annotated[
        float | None, typer.Option(help="One cosine for all. [default: calibrated for each concept]")
    ] = None,
    deviations: Annotated[
        float, typer.Option(help="Calibrated: standard deviations above a concept's background.")
    ] = 4.0,
    k: Annotated[int, typer.Option("-k", help="Best items kept of each concept.")] = 10,
    min_count: Annotated[int, typer.Option(help="A concept with fewer items is a gap.")] = 20,
    selection: Annotated[Path | None, typer.Option(help="Count what a selection holds beside the pool.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with bars, gaps and examples.")] = None,
    index: Annotated[
        Path | None, typer.Option(help="Look only at what this index of the pool finds. [default: at everything]")
    ] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="What goes through the chunks.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one on this machine]")] = None,
) -> None:
    """Count the items of a pool for each of many concepts, exactly."""
    from embedcache.cli.console import open_progress, say
    from embedcache.curate.coverage import CoverageSettings, measure_coverage
    from embedcache.errors import SettingError
    from embedcache.provenance import write_json
    from embedcache.reports.coverage import coverage_json, write_coverage_page

    if modality == "both" and (feature or index):
        raise SettingError("a feature and an index are of one modality; with --modality both, give neither")
    reports = [
        measure_coverage(
            cache,
            concepts,
            modality=side,
            feature=feature,
            run_path=projected,
            label=label,
            settings=CoverageSettings(threshold=threshold, deviations=deviations, k=k, min_count=min_count),
            selection=selection,
            index_path=index,
            engine=engine,
            address=address,
            progress=open_progress(),
        )
        for side in (("image", "text") if modality == "both" else (modality,))
    ]
    for report in reports:
        _show(report)
    if modality == "both":
        _show_sides(*reports)
    if json_path is not None:
        figures = {report.pool.modality: coverage_json(report) for report in reports}
        write_json(json_path, figures if modality == "both" else figures[modality])
        say(f"wrote {json_path}")
    if html is not None:
        write_coverage_page(html, *reports)
        say(f"wrote {html}")


def _show(report: "CoverageReport") -> None:
    from embedcache.cli.console import say, show_table
    from embedcache.reports.coverage import concept_table, largest_first, overlap_table, summary_table

    say(report.line())
    for warning in report.warnings():
        say(warning)
    show_table(*summary_table(report))
    order = largest_first(report.whole.counts)
    show_table(*concept_table(report, order[:10]), title="the largest concepts")
    show_table(*concept_table(report, order[10:][-10:]), title="the smallest concepts") if len(order) > 10 else None
    show_table(*overlap_table(report, num_rows=5), title="concepts that share items") if report.overlaps else None


def _show_sides(images: "CoverageReport", texts: "CoverageReport") -> None:
    from embedcache.cli.console import say, show_table
    from embedcache.reports.coverage import modality_line, modality_table

    say(modality_line(images, texts))
    show_table(*modality_table(images, texts, num_rows=10), title="where images and captions differ most")
