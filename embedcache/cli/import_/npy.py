"""embedcache import npy"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.import_.options import CacheArgument, CaptionColumn, ChunkSize, KeyColumn, Model, run_import


def npy(
    cache: CacheArgument,
    image: Annotated[Path | None, typer.Option(help="A .npy of image vectors, (rows, width).")] = None,
    text: Annotated[Path | None, typer.Option(help="A .npy of text vectors; needs --table.")] = None,
    table: Annotated[Path | None, typer.Option(help="Keys, captions and columns of the rows.")] = None,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumn = None,
    chunk_size: ChunkSize = None,
) -> None:
    """Import arrays that NumPy wrote. Run it again to go on after a stop."""
    from embedcache.interop.npy import open_arrays

    run_import(
        open_arrays(image=image, text=text, table=table),
        cache,
        model=model,
        key_column=key_column,
        caption_column=caption_column,
        chunk_size=chunk_size,
    )
