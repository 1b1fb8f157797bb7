"""embedcache export clip-retrieval"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.export.vector_options import (
    CacheArgument,
    Chosen,
    Image,
    Language,
    Only,
    Projected,
    Text,
    run_export,
)


def clip_retrieval(
    cache: CacheArgument,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    projected: Projected = None,
    image: Image = None,
    text: Text = None,
    only: Only = None,
    selection: Chosen = None,
    language: Language = None,
) -> None:
    """Write clip-retrieval's tree: img_emb, text_emb and metadata, vectors of length 1, for its index command."""
    from embedcache.interop.clip_retrieval import write_tree
    from embedcache.interop.outgoing import ExportSettings

    settings = ExportSettings(image=image, text=text, only=only, run=projected, selection=selection, language=language)
    run_export(cache, out, settings, lambda rows, path, progress: write_tree(rows, path, progress=progress))
