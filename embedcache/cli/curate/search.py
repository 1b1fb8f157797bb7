"""embedcache curate search"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def search(
    index: Annotated[Path, typer.Argument(help="The index.")],
    query: Annotated[list[str], typer.Argument(help="One or more texts.")],
    k: Annotated[int | None, typer.Option("-k", help="Hits a query. [default: 10]")] = None,
    run: Annotated[Path | None, typer.Option(help="Where the index's run is, if it has moved.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where the index's cache is, if it has moved.")] = None,
    device: Annotated[str, typer.Option(help="Where the text encoder runs.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a query.")] = False,
) -> None:
    """Find the items that fit a text."""
    from embedcache.cli.console import say, show_table
    from embedcache.curate.search import search as run_search

    found = run_search(index, query, k=k, run_path=run, cache_path=cache, device=device)
    for text, hits in zip(query, found, strict=True):
        if as_json:
            say(json.dumps({"query": text, "hits": [asdict(hit) for hit in hits]}, ensure_ascii=False))
        else:
            rows = [[" · ".join(hit.captions), f"{hit.score:.3f}", hit.key] for hit in hits]
            show_table(["captions", "cosine", "key"], rows, title=text)
