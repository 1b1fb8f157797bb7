"""What the imports of vectors have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from embedcache.interop.incoming import Incoming

CacheArgument: TypeAlias = Annotated[str, typer.Argument(help="A new folder, or a cache of the same import.")]
Model: TypeAlias = Annotated[str | None, typer.Option(help="What made the vectors, in words, for the record.")]
KeyColumn: TypeAlias = Annotated[str | None, typer.Option(help="Column of unique keys. [default: key, id or uid]")]
CaptionColumn: TypeAlias = Annotated[list[str] | None, typer.Option(help="Column of captions. May be repeated.")]
ChunkSize: TypeAlias = Annotated[int | None, typer.Option(help="Vectors in a chunk. [default: 2048]")]


def run_import(
    incoming: "Incoming",
    cache: str,
    *,
    model: str | None,
    key_column: str | None,
    caption_column: Sequence[str] | None,
    chunk_size: int | None,
) -> None:
    """Import, and say what came of it."""
    from embedcache.cli.console import going_on_later, open_progress, say
    from embedcache.interop.importing import import_vectors
    from embedcache.sources import SourceSettings

    settings = SourceSettings(key_column=key_column, caption_columns=tuple(caption_column or ()))
    with going_on_later():
        reports = import_vectors(
            incoming, cache, model=model, chunk_size=chunk_size, settings=settings, progress=open_progress()
        )
    for report in reports:
        say(report.line())
