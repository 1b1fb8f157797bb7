"""embedcache verify"""

from pathlib import Path
from typing import Annotated

import typer


def verify(cache: Annotated[Path, typer.Argument(help="The cache.")]) -> None:
    """Compare every chunk of a cache with the checksum that was written with it. Exit 1 where bytes are wrong."""
    from embedcache.cache.cache import Cache
    from embedcache.cache.verify import verify as run
    from embedcache.cli.console import open_progress, say

    findings = run(Cache(cache), progress=open_progress())
    for finding in findings:
        say(f"{finding.feature} chunk {finding.chunk}: {finding.reason}")
    num_damaged = sum(finding.is_damage for finding in findings)
    say(f"{cache}: {num_damaged:,} damaged chunks, {len(findings) - num_damaged:,} not extracted yet")
    if num_damaged:
        raise typer.Exit(1)
