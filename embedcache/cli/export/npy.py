"""embedcache export npy"""

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


def npy(
    cache: CacheArgument,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    projected: Projected = None,
    image: Image = None,
    text: Text = None,
    only: Only = None,
    selection: Chosen = None,
    language: Language = None,
) -> None:
    """Write image.npy, text.npy and rows.parquet into a new folder."""
    from embedcache.interop.npy import write_arrays
    from embedcache.interop.outgoing import ExportSettings

    settings = ExportSettings(image=image, text=text, only=only, run=projected, selection=selection, language=language)
    run_export(cache, out, settings, lambda rows, path, progress: write_arrays(rows, path, progress=progress))
