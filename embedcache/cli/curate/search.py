"""embedcache curate search"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from embedcache.search.search import Hit


def search(
    index: Annotated[Path, typer.Argument(help="The index.")],
    query: Annotated[list[str] | None, typer.Argument(help="Texts.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="Hits a query. [default: 10]")] = None,
    queries: Annotated[Path | None, typer.Option(help="A file with a text a line, beside those given.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Ask with an image file.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Ask with what the index holds of this sample.")] = None,
    concept: Annotated[list[str] | None, typer.Option(help="Ask with a concept of --concepts.")] = None,
    concepts: Annotated[str | None, typer.Option(help="A cache of prompts, a sample a concept.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Ask with each row of a .npy file.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Find samples with this label only.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Find samples of this split only.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Find what has captions in this language only.")] = None,
    selection: Annotated[Path | None, typer.Option(help="Find samples of this selection only.")] = None,
    run: Annotated[Path | None, typer.Option(help="Where the index's run is, if it has moved.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where the index's cache is, if it has moved.")] = None,
    device: Annotated[str, typer.Option(help="Where encoders run.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a query.")] = False,
) -> None:
    """Find the items that fit texts, images, samples, concepts or vectors."""
    from embedcache.cli.console import read_lines, say, show_table
    from embedcache.search.filters import Filter
    from embedcache.search.queries import Queries, read_vectors
    from embedcache.search.search import search as run_search

    asked = Queries(
        texts=[*(query or ()), *(read_lines(queries) if queries else ())],
        images=image or (),
        keys=key or (),
        concepts=concept or (),
        concept_cache=concepts,
        vectors=None if vectors is None else read_vectors(vectors),
    )
    keep = Filter(labels=label or (), splits=split or (), languages=language or (), selection=selection)
    found = run_search(index, asked, k=k, keep=keep, run_path=run, cache_path=cache, device=device)
    for name, hits in zip(asked.names, found, strict=True):
        if as_json:
            say(json.dumps({"query": name, "hits": [asdict(hit) for hit in hits]}, ensure_ascii=False))
        else:
            show_table(*_table(hits), title=name)


def _table(hits: Sequence["Hit"]) -> tuple[list[str], list[list[str]]]:
    columns, rows = (
        ["captions", "cosine", "key"],
        [[" · ".join(hit.captions), f"{hit.score:.3f}", hit.key] for hit in hits],
    )
    if all(hit.label is None for hit in hits):
        return columns, rows
    return [*columns, "label"], [[*row, hit.label or ""] for row, hit in zip(rows, hits, strict=True)]
