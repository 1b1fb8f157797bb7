"""embedcache curate dedup"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer


def dedup(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    out: Annotated[Path | None, typer.Argument(help="A .parquet file for the selection of what stays.")] = None,
    cosine: Annotated[
        float | None, typer.Option(help="Near-duplicates from this cosine on go. [default: only look, write nothing]")
    ] = None,
    copies: Annotated[bool, typer.Option("--copies", help="Only copies go: equal bytes or texts.")] = False,
    image: Annotated[
        str | None, typer.Option(help="Compare images by this encoder/feature. [default: the only one]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Compare texts by this encoder/feature.")] = None,
    projected: Annotated[Path | None, typer.Option(help="Project the feature with this run.")] = None,
    keep: Annotated[
        str, typer.Option(help="What stays: first, far (from its cluster's center) or best:COLUMN (largest number).")
    ] = "first",
    all_pairs: Annotated[
        bool | None,
        typer.Option("--all-pairs/--clusters", help="Compare every pair. [default: up to 50,000 items]"),
    ] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Of going through the vectors.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one here]")] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for 2 to 4 bytes a number. [default: the system's temporary one]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the clusters, and of what is drawn.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with the histogram and pairs to look at.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Find copies and near-duplicates: look at the histogram first, then choose a cosine."""
    from embedcache.cli.console import open_progress, say, show_table
    from embedcache.curate import dedup as stage
    from embedcache.provenance import write_json
    from embedcache.reports.dedup import (
        comparison_line,
        dedup_line,
        histogram_lines,
        threshold_json,
        threshold_table,
        write_dedup_page,
        write_threshold_page,
    )

    settings = stage.DedupSettings(
        modality=stage.one_modality(image, text),
        feature=image or text,
        run_path=projected,
        keep=keep,
        all_pairs=all_pairs,
        scratch=scratch,
        seed=seed,
        engine=engine,
        address=address,
    )
    stage.check_asked(out, cosine, only_copies=copies)
    if out is None:
        analysis = stage.analyze(cache, settings, progress=open_progress())
        figures, write_page = threshold_json(analysis), partial(write_threshold_page, analysis=analysis)
        for line in (comparison_line(analysis), *histogram_lines(analysis)):
            say(line)
        show_table(*threshold_table(analysis))
        say("choose one: embedcache curate dedup CACHE OUT.parquet --cosine …")
    else:
        done = stage.dedup(cache, out, cosine=cosine, settings=settings, progress=open_progress())
        figures, write_page = done.to_json(), partial(write_dedup_page, result=done)
        say(comparison_line(done.analysis))
        say(dedup_line(done))
    if json_path is not None:
        write_json(json_path, figures)
    if html is not None:
        write_page(html)
        say(f"wrote {html}")
