"""What the exports of a run have in common on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from embedcache.export.export import Exported

Metrics = Annotated[
    Path | None, typer.Option(help="What `embedcache evaluate … --json` wrote, for the card.", dir_okay=False)
]
PushTo = Annotated[str | None, typer.Option("--push-to-hub", help="OWNER/NAME on the Hugging Face hub.")]
Public = Annotated[bool, typer.Option("--public", help="Let all see a repository that is made. [default: private]")]


def show(folder: Path, exported: "Exported") -> None:
    """Print what came out."""
    from embedcache.cli.console import say

    say(f"{folder}: {'written' if exported.is_new else 'there already, unchanged'}")
    for what, difference in exported.differences.items():
        say(f"  {what}: differs by {difference:.1e} at most from the run")
    if exported.url is not None:
        say(f"  {exported.url}")
