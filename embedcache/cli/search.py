"""embedcache search"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedcache.cli.options import Concepts, IndexArgument, Json, Output, with_settings
from embedcache.search.settings import SearchSettings

if TYPE_CHECKING:
    from embedcache.search.hits import Hit


@with_settings(settings=SearchSettings)
def search(
    index: IndexArgument,
    query: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to search for.")] = None,
    queries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Search for each line of this text file too.")
    ] = None,
    query_image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Search with this image file.")] = None,
    query_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Search with the indexed vector of this sample.")
    ] = None,
    query_concept: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Search with this concept of --concepts.")
    ] = None,
    query_vectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Search with each row of this .npy file.")
    ] = None,
    concepts: Concepts = None,
    *,
    settings: SearchSettings,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Search an index with texts, images or vectors.

    A query is a text, an image file, a sample of the index, a concept or a vector; several queries may be mixed.

    Example: embedcache search index/ "a red bicycle" -k 5
    """
    from embedcache.cli.console import print_table, publish, read_lines
    from embedcache.search.card import read_card
    from embedcache.search.queries import Queries, read_vectors
    from embedcache.search.search import search as run_search

    all_queries = Queries(
        texts=[*(query or ()), *(read_lines(queries) if queries else ())],
        images=query_image or (),
        keys=query_key or (),
        concepts=query_concept or (),
        concept_cache=concepts,
        vectors=None if query_vectors is None else read_vectors(query_vectors),
    )
    hit_lists = run_search(index, all_queries, settings)
    results = list(zip(all_queries.names, hit_lists, strict=True))
    score = read_card(index).score

    def show() -> None:
        for name, hits in results:
            print_table(*_hit_rows(hits, score), title=name)

    publish(
        show,
        lambda: [{"query": name, "hits": [asdict(hit) for hit in hits]} for name, hits in results],
        as_json=as_json,
        output=output,
    )


def _hit_rows(hits: Sequence["Hit"], score: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of hits: files where keys do not name them, labels where there are any.

    Args:
        hits: the hits.
        score: what their scores are, a column.
    """
    from embedcache.sources.files import is_key_of_file

    columns = {
        "captions": [" · ".join(hit.captions) for hit in hits],
        score: [f"{hit.score:.3f}" for hit in hits],
        "key": [hit.key for hit in hits],
    }
    if any(hit.path is not None and not is_key_of_file(hit.key, hit.path) for hit in hits):
        columns["path"] = [hit.path or "" for hit in hits]
    if any(hit.label is not None for hit in hits):
        columns["label"] = [hit.label or "" for hit in hits]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
