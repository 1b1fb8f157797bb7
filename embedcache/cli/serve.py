"""embedcache serve"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import Cache, Concepts, Device, IndexArgument, Json, MovedRun, with_settings
from embedcache.devices import AUTO
from embedcache.serve.settings import ServeSettings


@with_settings(settings=ServeSettings)
def serve(
    index: IndexArgument,
    run: MovedRun = None,
    cache: Cache = None,
    concepts: Concepts = None,
    coverage: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show this report, written by curate coverage --output.")
    ] = None,
    selection: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Offer this selection as a filter on the page.")
    ] = None,
    device: Device = AUTO,
    as_json: Json = False,
    *,
    settings: ServeSettings,
) -> None:
    """Serve a search page and its JSON API.

    Visitors search the index with texts and images, filter by label and selection, and see the coverage of concepts.

    Example: embedcache serve index/ --port 8000
    """
    from contextlib import suppress

    from embedcache.cli.console import open_progress, print_json, print_line
    from embedcache.registry import require

    for package in ("fastapi", "uvicorn"):
        require(package, extra="serve")  # the modules below import them
    from embedcache.serve.server import serve as run_server
    from embedcache.serve.service import ServePaths

    paths = ServePaths(
        index=index, run=run, cache=cache, selections=selection or (), coverage=coverage, concepts=concepts
    )
    progress = open_progress()

    def announce(line: str) -> None:
        """Print a line; as JSON only the address, which is the last one."""
        word, _, url = line.partition(" ")
        if not as_json:
            print_line(line)
        elif word == "open":
            print_json({"url": url})
        else:
            progress.note(line)

    with suppress(KeyboardInterrupt):  # Ctrl-C ends the server
        run_server(paths, settings, device=device, progress=progress, print_line=announce)
