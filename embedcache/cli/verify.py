"""embedcache verify"""

from typing import Annotated

import typer


def verify(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    probe: Annotated[
        str | None, typer.Option(help="Encode this share of the items again, as 0.1%, and compare.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make the damaged chunks again.")] = False,
    device: Annotated[str, typer.Option(help="For --probe and --repair: cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Compare every chunk of a cache with the checksum that was written with it. Exit 1 where something is wrong."""
    from embedcache.cli.console import open_progress, say
    from embedcache.extract.repair import check_share, measure_drift
    from embedcache.extract.repair import repair as mend
    from embedcache.store.cache import Cache
    from embedcache.store.verify import verify as check
    from embedcache.units import parse_fraction

    opened, progress = Cache(cache), open_progress()
    share = None if probe is None else parse_fraction(probe)
    if share is not None:
        check_share(share)  # before hours of reading
    findings = check(opened, progress=progress)
    for finding in findings:
        say(finding.line())
    if repair:
        for line in mend(opened, findings, device=device, progress=progress):
            say(line)
        findings = check(opened, progress=progress)
    num_damaged = sum(finding.is_damage for finding in findings)
    say(f"{cache}: {num_damaged:,} damaged chunks or tables, {len(findings) - num_damaged:,} chunks not extracted yet")
    drifts = [] if share is None else measure_drift(opened, share, device=device, progress=progress)
    for drift in drifts:
        say(drift.line())
    if num_damaged or any(drift.is_bad for drift in drifts):
        raise typer.Exit(1)
