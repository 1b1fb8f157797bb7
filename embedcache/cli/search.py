"""embedcache search and serve"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.cli.commands import (
    OUTPUT_PANEL,
    Concepts,
    Device,
    IndexArgument,
    by_modality,
    check_new_file,
    command,
    new_group,
)
from embedcache.errors import quoted
from embedcache.modalities import FILE_MODALITIES
from embedcache.processes import AUTO
from embedcache.search.settings import MOVED_CACHE, MOVED_RUN, SearchSettings
from embedcache.serve.settings import ServeSettings

if TYPE_CHECKING:
    from embedcache.search.search import Hit

app = new_group()
_SCORES = {"vectors": "cosine", "words": "BM25", "both": "ranks"}
_MODALITIES_OF_FILES = [modality.name for modality in FILE_MODALITIES]


@command(app, "search", settings=SearchSettings)
def search(
    index: IndexArgument,
    query: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts to search for.")] = None,
    queries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Search for each line of this text file too.")
    ] = None,
    query_image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Search with this image file.")] = None,
    query_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=FILE", help="Search with this recording, video, point cloud or image. May be repeated."
        ),
    ] = None,
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
) -> Any:
    """Search an index with texts, files or vectors.

    A query is a text, a file, a sample of the index, a concept or a vector; several queries may be mixed.

    Example: embedcache search index/ "a red bicycle" -k 5
    """
    from embedcache.cli.console import open_progress, read_lines
    from embedcache.reports.render import Presentation, Section, to_plain
    from embedcache.search.queries import Queries, read_vectors
    from embedcache.search.search import search as run_search

    all_queries = Queries(
        texts=[*(query or ()), *(read_lines(queries) if queries else ())],
        images=query_image or (),
        items=by_modality("--query-file", query_file, "audio=dog.wav", metavar="FILE", known=_MODALITIES_OF_FILES),
        keys=query_key or (),
        concepts=query_concept or (),
        concept_cache=concepts,
        vectors=None if query_vectors is None else read_vectors(query_vectors),
    )
    # Whoever types the name of a file probably means the file, but it may also be a word.
    progress = open_progress()
    for text in filter(os.path.isfile, query or ()):
        progress.note(
            f"searching the words {text!r}; a file of that name exists: to search with it, {_file_option(text)}"
        )

    sections = []
    results = []
    for name, hits in zip(all_queries.names, run_search(index, all_queries, settings, progress=progress), strict=True):
        sections.append(Section(title=name, table=_hit_table(hits, _SCORES[settings.match])))
        results.append((name, hits))
    return Presentation(
        lines=(),
        sections=sections,
        record=lambda: [{"query": name, "hits": to_plain(hits)} for name, hits in results],
    )


@command(app, "serve", settings=ServeSettings, has_report=False, reads_items=True)
def serve(
    index: IndexArgument,
    run: Annotated[Path | None, typer.Option(metavar=MOVED_RUN["metavar"], help=MOVED_RUN["help"])] = None,
    cache: Annotated[str | None, typer.Option(metavar=MOVED_CACHE["metavar"], help=MOVED_CACHE["help"])] = None,
    concepts: Concepts = None,
    coverage: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show this report, written by curate coverage --output.")
    ] = None,
    selection: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Offer this selection as a filter on the page.")
    ] = None,
    collect: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Let the page write the items that visitors collect to this new .parquet file; requires the token of "
            "the printed link.",
            callback=check_new_file,
        ),
    ] = None,
    device: Device = AUTO,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the address as JSON on standard output.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    *,
    settings: ServeSettings,
) -> None:
    """Serve a search page and its JSON API.

    Visitors search the index with texts and files, filter by label and selection, see a map of its items and the
    coverage of concepts, and collect items into a selection.

    Example: embedcache serve index/ --port 8000
    """
    from contextlib import suppress

    from embedcache.cli.console import open_progress, print_json, print_line
    from embedcache.registry import require

    # The modules below import these packages; without them, the error names the extra to install.
    for package in ("fastapi", "uvicorn"):
        require(package, extra="serve")
    from embedcache.serve.server import serve as run_server
    from embedcache.serve.service import ServePaths

    paths = ServePaths(
        index=index,
        run=run,
        cache=cache,
        selections=selection or (),
        coverage=coverage,
        concepts=concepts,
        collect=collect,
    )
    progress = open_progress()

    def announce(line: str) -> None:
        """Print a line. As JSON, only the address is printed."""
        word, _, url = line.partition(" ")
        if not as_json:
            print_line(line)
        elif word == "open":
            print_json({"url": url})
        else:
            progress.note(line)

    # Ctrl-C is the usual end of a server, not an error.
    with suppress(KeyboardInterrupt):
        run_server(paths, settings, device=device, progress=progress, print_line=announce)


def _file_option(path: str) -> str:
    """Return the option that searches with a file, by its suffix. A file of an unknown suffix counts as an image."""
    from embedcache.sources.files import MEDIA_SUFFIXES

    suffix = Path(path).suffix.lower()
    modality = next((name for name, suffixes in MEDIA_SUFFIXES.items() if suffix in suffixes), "image")
    return f"--query-image {quoted(path)}" if modality == "image" else f"--query-file {modality}={quoted(path)}"


def _hit_table(hits: Sequence["Hit"], score: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table of hits.

    Paths are shown if keys do not name the files, and labels if there are any.
    """
    from embedcache.sources.files import is_key_of_file

    has_paths = any(hit.path is not None and not is_key_of_file(hit.key, hit.path) for hit in hits)
    has_labels = any(hit.label is not None for hit in hits)
    columns = ["captions", score, "key"]
    if has_paths:
        columns.append("path")
    if has_labels:
        columns.append("label")

    rows = []
    for hit in hits:
        row = [" · ".join(hit.captions), f"{hit.score:.3f}", hit.key]
        if has_paths:
            row.append(hit.path or "")
        if has_labels:
            row.append(hit.label or "")
        rows.append(row)
    return columns, rows
