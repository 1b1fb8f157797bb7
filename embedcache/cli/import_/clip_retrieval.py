"""embedcache import clip-retrieval"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.import_.options import CacheArgument, CaptionColumn, ChunkSize, KeyColumn, Model, run_import


def clip_retrieval(
    tree: Annotated[Path, typer.Argument(help="What clip-retrieval inference wrote: img_emb, text_emb, metadata.")],
    cache: CacheArgument,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumn = None,
    chunk_size: ChunkSize = None,
) -> None:
    """Import what clip-retrieval wrote. Run it again to go on after a stop."""
    from embedcache.interop.clip_retrieval import open_tree

    run_import(
        open_tree(tree),
        cache,
        model=model,
        key_column=key_column,
        caption_column=caption_column,
        chunk_size=chunk_size,
    )
