"""embedcache import uids"""

from pathlib import Path
from typing import Annotated

import typer


def uids(
    path: Annotated[Path, typer.Argument(help="DataComp's list of uids: a .npy of dtype u8,u8.")],
    cache: Annotated[str, typer.Argument(help="A cache whose keys are uids.")],
    out: Annotated[Path, typer.Argument(help="The selection, .parquet.")],
) -> None:
    """Make a selection of a list of DataComp's uids; curate export --format datacomp writes one."""
    from embedcache.cli.console import say
    from embedcache.interop.datacomp import import_uids

    say(f"{out}: {import_uids(path, cache, out):,} samples")
