"""embedcache import datacomp"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.import_.options import CacheArgument, CaptionColumn, ChunkSize, KeyColumn, Model, run_import


def datacomp(
    folder: Annotated[Path, typer.Argument(help="DataComp's metadata: NAME.parquet beside NAME.npz.")],
    cache: CacheArgument,
    image: Annotated[list[str] | None, typer.Option(help="Array of image vectors, as l14_img; repeatable.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Array of text vectors, as l14_txt; repeatable.")] = None,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumn = None,
    chunk_size: ChunkSize = None,
) -> None:
    """Import DataComp's metadata and the vectors in it. Run it again to go on after a stop."""
    from embedcache.interop.datacomp import open_metadata

    run_import(
        open_metadata(folder, image=image or (), text=text or ()),
        cache,
        model=model,
        key_column=key_column,
        caption_column=caption_column,
        chunk_size=chunk_size,
    )
