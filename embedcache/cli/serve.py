"""embedcache serve"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import Concepts, Device, IndexArgument, Json, with_settings
from embedcache.devices import AUTO
from embedcache.errors import SettingError
from embedcache.serve.settings import ServeSettings


@with_settings(settings=ServeSettings)
def serve(
    index: IndexArgument,
    other: Annotated[
        Path | None, typer.Argument(metavar="INDEX2", help="Index to compare with, of another run for example.")
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Where the run of the index is, if it has moved."),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar="CACHE", help="Where the cache of the index is, if it has moved."),
    ] = None,
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

    Visitors search the index with texts and images, filter by label and selection, see a map of its items and the
    coverage of concepts, and compare two indexes side by side, for which --run and --cache may be given twice.

    Example: embedcache serve index/ --port 8000
    """
    from contextlib import suppress

    from embedcache.cli.console import open_progress, print_json, print_line
    from embedcache.registry import require

    for package in ("fastapi", "uvicorn"):
        require(package, extra="serve")  # the modules below import them
    from embedcache.serve.server import serve as run_server
    from embedcache.serve.service import ServePaths

    indexes = [index] if other is None else [index, other]
    for name, moved in (("run", run), ("cache", cache)):
        if len(moved or ()) > len(indexes):
            raise SettingError(f"{name}: expected at most one per index, got {len(moved or ())} for {len(indexes)}")
    runs, caches = [*(run or ()), None, None], [*(cache or ()), None, None]
    paths = [
        ServePaths(
            index=index, run=runs[0], cache=caches[0], coverage=coverage, concepts=concepts, selections=selection or ()
        )
    ]
    if other is not None:
        paths.append(ServePaths(index=other, run=runs[1], cache=caches[1], selections=selection or ()))
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
