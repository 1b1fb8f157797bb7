"""embedcache import parquet"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.import_.options import CacheArgument, CaptionColumn, ChunkSize, KeyColumn, Model, run_import


def parquet(
    path: Annotated[Path, typer.Argument(help="A .parquet, or a folder of such.")],
    cache: CacheArgument,
    image: Annotated[str | None, typer.Option(help="Column of image vectors. [default: image_vector]")] = None,
    text: Annotated[str | None, typer.Option(help="Column of text vectors. [default: text_vector]")] = None,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumn = None,
    chunk_size: ChunkSize = None,
) -> None:
    """Import vectors that are lists in Parquet, with keys, captions and columns. Run it again to go on after a stop."""
    from embedcache.interop.parquet import open_parquet_vectors

    run_import(
        open_parquet_vectors(path, image=image, text=text),
        cache,
        model=model,
        key_column=key_column,
        caption_column=caption_column,
        chunk_size=chunk_size,
    )
