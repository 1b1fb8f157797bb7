"""embedcache serve"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from embedcache.cli.options import OUTPUT_PANEL, Concepts, Device, IndexArgument, with_settings
from embedcache.devices import AUTO
from embedcache.errors import SettingError
from embedcache.search.settings import MOVED_CACHE, MOVED_RUN
from embedcache.serve.settings import ServeSettings

T = TypeVar("T")


@with_settings(settings=ServeSettings)
def serve(
    index: IndexArgument,
    other: Annotated[
        Path | None, typer.Argument(metavar="INDEX2", help="Index to compare with, of another run for example.")
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar=MOVED_RUN["metavar"], help=MOVED_RUN["help"]),
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar=MOVED_CACHE["metavar"], help=MOVED_CACHE["help"]),
    ] = None,
    concepts: Concepts = None,
    coverage: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show this report, written by curate coverage --output.")
    ] = None,
    selection: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Offer this selection as a filter on the page.")
    ] = None,
    device: Device = AUTO,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar="", help="Print the address as JSON on standard output.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False,
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
    moved = zip(indexes, _per_index("run", run, indexes), _per_index("cache", cache, indexes), strict=True)
    first, *others = [
        ServePaths(index=path, run=its_run, cache=its_cache, selections=selection or ())
        for path, its_run, its_cache in moved
    ]
    paths = [replace(first, coverage=coverage, concepts=concepts), *others]
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


def _per_index(option: str, moved: Sequence[T] | None, indexes: Sequence[Path]) -> list[T | None]:
    """Return the value of an option for each index, None for the others."""
    values = list(moved or ())
    if len(values) > len(indexes):
        raise SettingError(f"{option}: expected at most one per index, got {len(values)} for {len(indexes)}")
    return [*values, *[None] * (len(indexes) - len(values))]
