"""embedcache curate export"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    selection: Annotated[Path, typer.Argument(help="A selection, or a text with a key a line.")],
    out: Annotated[Path, typer.Argument(help="A file; for webdataset a new folder.")],
    form: Annotated[
        Literal["datacomp", "keys", "webdataset"],
        typer.Option("--format", help="DataComp's uids (.npy), a key a line, or tars."),
    ] = "keys",
) -> None:
    """Write a selection for other tools."""
    from embedcache.cli.console import open_progress, say
    from embedcache.curate.select.export import export as run_export

    say(f"{out}: {run_export(cache, selection, out, form, progress=open_progress()):,} samples")
