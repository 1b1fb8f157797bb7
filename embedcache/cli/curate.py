"""embedcache curate"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Index and search a cache.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def index(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    index: Annotated[Path, typer.Argument(help="A folder for the index.")],
    projected: Annotated[Path | None, typer.Option(help="Project the feature with this run.")] = None,
    feature: Annotated[str | None, typer.Option(help="encoder/feature. [default: the run's, or the only one]")] = None,
    modality: Annotated[Literal["image", "text"], typer.Option(help="What to index.")] = "image",
    factory: Annotated[
        str | None, typer.Option(help="FAISS factory string. [default: exact up to 200,000 items]")
    ] = None,
) -> None:
    """Build a FAISS index, and measure it against exact search."""
    from embedcache.cli.console import open_progress, say
    from embedcache.curate.index import build_index

    card = build_index(
        cache,
        index,
        run_path=projected,
        feature=feature,
        modality=modality,
        factory=factory,
        progress=open_progress(),
    )
    say(
        f"{index}: {card.num_vectors:,} {card.modality}s of {card.feature}, {card.factory}, "
        f"recall@10 {card.recall_at_10:.3f} against exact search on {card.num_queries} queries, "
        f"{card.latency_ms:.2f} ms a query"
    )


@app.command()
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
