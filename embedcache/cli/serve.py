"""embedcache serve"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.options import Cache, Concepts, Device, IndexArgument, MovedRun


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
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to bind; one that others can reach requires a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to bind; 0 takes any free port.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Token that visitors must send.", show_default="random, where required"),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Accept requests for this host name too.")
    ] = None,
    max_upload: Annotated[str, typer.Option(metavar="SIZE", help="Largest query image in bytes.")] = "20MB",
    max_pixels: Annotated[int, typer.Option(metavar="N", help="Largest query image in pixels.")] = 40_000_000,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time per request.")] = 30.0,
    trust_cache: Annotated[
        bool,
        typer.Option("--trust-cache", metavar="", help="Read images from any URL, link or source the cache names."),
    ] = False,
    device: Device = "cpu",
) -> None:
    """Serve a search page and its JSON API.

    Visitors search the index with texts and images, filter by label and selection, and see the coverage of concepts.

    Example: embedcache serve index/ --port 8000
    """
    from contextlib import suppress

    from embedcache.cli.console import open_progress, print_line
    from embedcache.serve.served import Places
    from embedcache.serve.server import serve as run_server
    from embedcache.serve.settings import ServeSettings
    from embedcache.units import parse_size

    settings = ServeSettings(
        host=host,
        port=port,
        token=token,
        names=tuple(name or ()),
        max_upload_bytes=parse_size(max_upload),
        max_pixels=max_pixels,
        timeout_s=timeout,
        trusts_cache=trust_cache,
    )
    places = Places(index=index, run=run, cache=cache, selections=selection or (), coverage=coverage, concepts=concepts)
    with suppress(KeyboardInterrupt):  # Ctrl-C ends the server
        run_server(places, settings, device=device, progress=open_progress(), say=print_line)
