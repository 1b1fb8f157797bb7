"""embedcache curate index"""

from pathlib import Path
from typing import Annotated, Literal

import typer


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
