"""What the exports of vectors have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

if TYPE_CHECKING:
    from embedcache.interop.outgoing import ExportSettings, Outgoing
    from embedcache.progress import Progress

CacheArgument: TypeAlias = Annotated[str, typer.Argument(help="The cache, or its URL.")]
Projected: TypeAlias = Annotated[Path | None, typer.Option(help="Project the features with this run.")]
Image: TypeAlias = Annotated[str | None, typer.Option(help="Image feature. [default: the run's, or the only one]")]
Text: TypeAlias = Annotated[str | None, typer.Option(help="Text feature. [default: the run's, or the only one]")]
Only: TypeAlias = Annotated[Literal["image", "text"] | None, typer.Option(help="Vectors of one modality alone.")]
Chosen: TypeAlias = Annotated[Path | None, typer.Option(help="Samples of this selection only.")]
Language: TypeAlias = Annotated[str | None, typer.Option(help="Captions of this language only.")]


def run_export(
    cache: str,
    out: Path,
    settings: "ExportSettings",
    write: Callable[["Outgoing", Path, "Progress"], int],
) -> None:
    """Export, and say how many rows there are, and what is not among them."""
    from embedcache.cli.console import open_progress, say
    from embedcache.interop.outgoing import Outgoing

    outgoing = Outgoing(cache, settings)
    num_rows = write(outgoing, out, open_progress())
    left_out = outgoing.left_out
    say(f"{out}: {num_rows:,} rows" + (f"; left out: {left_out}" if left_out else ""))
