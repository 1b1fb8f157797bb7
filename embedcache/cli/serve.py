"""embedcache serve"""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    index: Annotated[Path, typer.Argument(help="The index.")],
    run: Annotated[Path | None, typer.Option(help="Where the index's run is, if it has moved.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where the index's cache is, if it has moved.")] = None,
    concepts: Annotated[str | None, typer.Option(help="Measure coverage of this cache of concepts first.")] = None,
    coverage: Annotated[Path | None, typer.Option(help="Show what curate coverage --json wrote.")] = None,
    selection: Annotated[list[Path] | None, typer.Option(help="A selection that visitors may choose.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind; one that others reach demands a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    token: Annotated[str | None, typer.Option(help="What visitors must show. [default: drawn, where needed]")] = None,
    name: Annotated[list[str] | None, typer.Option(help="Another name that this server goes by.")] = None,
    max_upload: Annotated[str, typer.Option(help="Bytes of a picture to ask with, such as 20M.")] = "20M",
    max_pixels: Annotated[int, typer.Option(help="Pixels of such a picture.")] = 40_000_000,
    timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = 30.0,
    trust_cache: Annotated[
        bool, typer.Option("--trust-cache", help="Read pictures wherever the cache says: URLs, links, own sources.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where encoders run.")] = "cpu",
) -> None:
    """Serve a page to search an index with words and pictures, and its JSON API."""
    from contextlib import suppress

    from embedcache.cli.console import open_progress, say
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
    with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        run_server(places, settings, device=device, progress=open_progress(), say=say)
