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
        str | None, typer.Option(help="FAISS factory string. [default: what fits the memory and reaches the recall]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Most that the index may take while it is searched: 500M, 4G. [default: any]")
    ] = None,
    on_disk: Annotated[
        bool, typer.Option("--on-disk", help="Leave the vectors on the disk: --memory is of the rest.")
    ] = False,
    min_recall: Annotated[
        float, typer.Option(help="Least share of the true 10 nearest that it must find, or it is refused.")
    ] = 0.95,
) -> None:
    """Build a FAISS index and measure it against exact search; stopped, or with new items, it goes on."""
    from embedcache.cli.console import going_on_later, open_progress, say
    from embedcache.search.index import build_index
    from embedcache.units import parse_size

    with going_on_later():
        card = build_index(
            cache,
            index,
            run_path=projected,
            feature=feature,
            modality=modality,
            factory=factory,
            memory_bytes=None if memory is None else parse_size(memory),
            leaves_on_disk=on_disk,
            min_recall=min_recall,
            progress=open_progress(),
        )
    where = " on the disk" if card.lists else ""
    size = "" if card.file_bytes is None else f"{card.file_bytes / 1e6:,.1f} MB{where}, "
    say(
        f"{index}: {card.num_vectors:,} {card.modality}s of {card.feature}, {card.factory}, {size}"
        f"recall@10 {card.recall_at_10:.3f} against exact search on {card.num_queries} queries, "
        f"{card.latency_ms:.2f} ms a query"
    )
