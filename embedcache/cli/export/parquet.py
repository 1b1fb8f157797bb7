"""embedcache export parquet"""

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


def parquet(
    cache: CacheArgument,
    out: Annotated[Path, typer.Argument(help="A new .parquet.")],
    projected: Projected = None,
    image: Image = None,
    text: Text = None,
    only: Only = None,
    selection: Chosen = None,
    language: Language = None,
) -> None:
    """Write Parquet: key, caption, columns, image_vector and text_vector as lists of one length."""
    from embedcache.interop.outgoing import ExportSettings
    from embedcache.interop.parquet import write_parquet

    settings = ExportSettings(image=image, text=text, only=only, run=projected, selection=selection, language=language)
    run_export(cache, out, settings, lambda rows, path, progress: write_parquet(rows, path, progress=progress))
