"""embedcache inspect and verify"""

from typing import Annotated

import typer

from embedcache.cli.options import CacheArgument, Device, Json, Output


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Cache, run, index, study or selection: a path or a URL.")
    ],
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Show what a cache, run, index, study or selection holds.

    Of a cache: features, their shapes, how complete they are, and why items failed.

    Example: embedcache inspect cache/
    """
    from embedcache.cli.console import print_line, print_table, publish
    from embedcache.reports.summary import summarize

    summary = summarize(path)

    def show() -> None:
        for line in summary.lines:
            print_line(line)
        if summary.rows:
            print_table(summary.columns, summary.rows)
        for line in summary.notes:
            print_line(line)

    publish(show, lambda: {"kind": summary.kind, **summary.record}, as_json=as_json, output=output)


def verify(
    cache: CacheArgument,
    reencode: Annotated[
        str | None,
        typer.Option(metavar="FRACTION", help="Encode this fraction of the items again and compare, such as 0.1%."),
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", metavar="", help="Encode damaged chunks again.")] = False,
    device: Device = "cpu",
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Check every chunk of a cache against its checksum.

    The exit code is 1 if something is damaged, or if encoding items again gives other vectors.

    Example: embedcache verify cache/ --reencode 0.1%
    """
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.extract.repair import check_fraction, measure_drift
    from embedcache.extract.repair import repair as run_repair
    from embedcache.store.cache import Cache
    from embedcache.store.verify import verify as run_verify
    from embedcache.units import parse_fraction

    opened, progress = Cache(cache), open_progress()
    fraction = None if reencode is None else parse_fraction(reencode)
    if fraction is not None:
        check_fraction(fraction)  # before hours of reading
    found = findings = run_verify(opened, progress=progress)
    repaired = []
    if repair:
        repaired = list(run_repair(opened, findings, device=device, progress=progress))
        findings = run_verify(opened, progress=progress)
    drifts = [] if fraction is None else measure_drift(opened, fraction, device=device, progress=progress)
    num_damaged = sum(finding.is_damage for finding in findings)

    def show() -> None:
        for line in [*(finding.line() for finding in found), *repaired]:
            print_line(line)
        num_missing = len(findings) - num_damaged
        print_line(f"{cache}: {num_damaged:,} damaged chunks or tables, {num_missing:,} chunks not extracted yet")
        for drift in drifts:
            print_line(drift.line())

    publish(
        show,
        lambda: {"findings": to_plain(findings), "repaired": repaired, "drifts": to_plain(drifts)},
        as_json=as_json,
        output=output,
    )
    if num_damaged or any(drift.is_bad for drift in drifts):
        raise typer.Exit(1)
