"""embedcache export atlas"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from embedcache.cli.export.vector_options import CacheArgument, Chosen, Language, Projected, run_export


def atlas(
    cache: CacheArgument,
    out: Annotated[Path, typer.Argument(help="A new .parquet.")],
    projected: Projected = None,
    feature: Annotated[str | None, typer.Option(help="encoder/feature. [default: the run's, or the only one]")] = None,
    modality: Annotated[Literal["image", "text"], typer.Option(help="What a point is.")] = "image",
    selection: Chosen = None,
    language: Language = None,
    method: Annotated[Literal["umap", "pca"], typer.Option(help="How vectors get their places.")] = "umap",
    images: Annotated[
        Literal["thumbnails", "paths", "none"], typer.Option(help="Small pictures in the file, paths, or none.")
    ] = "thumbnails",
    seed: Annotated[int, typer.Option(help="Of the places.")] = 0,
) -> None:
    """Write the Parquet that embedding-atlas opens: vectors, captions, pictures, places on a plane, neighbors."""
    from embedcache.interop.atlas import write_atlas
    from embedcache.interop.outgoing import ExportSettings

    settings = ExportSettings(
        image=feature if modality == "image" else None,
        text=feature if modality == "text" else None,
        only=modality,
        run=projected,
        selection=selection,
        language=language,
    )
    run_export(
        cache,
        out,
        settings,
        lambda rows, path, progress: write_atlas(
            rows, path, method=method, images=images, seed=seed, progress=progress
        ),
    )
