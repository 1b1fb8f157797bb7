"""embedcache import"""

from pathlib import Path
from typing import Annotated, Any

import typer

from embedcache.cli.commands import by_modality, command, new_group
from embedcache.errors import SettingError
from embedcache.vectors.settings import ImportSettings

app = new_group("Make a cache of vectors from other tools.")

NewCache = Annotated[
    str, typer.Argument(metavar="CACHE", help="New folder, or existing cache of the same import; may be a URL.")
]


@command(app, "clip-retrieval", settings=ImportSettings, runs_named_code=False)
def clip_retrieval(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of clip-retrieval inference: img_emb, text_emb, metadata.")
    ],
    cache: NewCache,
    *,
    settings: ImportSettings,
) -> Any:
    """Import vectors of clip-retrieval.

    Run the same command again to resume an interrupted import.

    Example: embedcache import clip-retrieval embeddings/ cache/
    """
    return _import(cache, settings, "clip-retrieval", folder)


@command(app, "datacomp", settings=ImportSettings, runs_named_code=False)
def datacomp(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Metadata of DataComp: NAME.parquet next to NAME.npz.")
    ],
    cache: NewCache,
    array: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=NAME",
            help="Array of vectors in the .npz, such as image=l14_img. May be repeated.",
        ),
    ] = None,
    *,
    settings: ImportSettings,
) -> Any:
    """Import metadata and vectors of DataComp.

    Run the same command again to resume an interrupted import.

    Example: embedcache import datacomp metadata/ cache/ --array image=l14_img --array text=l14_txt
    """
    arrays = by_modality("--array", array, "image=l14_img", metavar="NAME")
    return _import(cache, settings, "datacomp", folder, arrays=arrays)


@command(app, "parquet", settings=ImportSettings, runs_named_code=False)
def parquet(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A .parquet file, or a folder of them.")],
    cache: NewCache,
    vector_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=NAME",
            help="Parquet column of vectors of any modality. May be repeated.",
            show_default="image=image_vector, text=text_vector and so on",
        ),
    ] = None,
    *,
    settings: ImportSettings,
) -> Any:
    """Import vectors in list columns of Parquet.

    Keys, captions and all other columns are imported as well. Run the same command again to resume an interrupted
    import.

    Example: embedcache import parquet vectors.parquet cache/
    """
    columns = by_modality("--vector-column", vector_column, "audio=clap", metavar="NAME")
    return _import(cache, settings, "parquet", path, vector_columns=columns)


@command(app, "npy", settings=ImportSettings, runs_named_code=False)
def npy(
    cache: NewCache,
    file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=FILE",
            help="A .npy file of (rows, width) vectors; texts require --table.",
        ),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Table with the keys, captions and columns of the rows.")
    ] = None,
    *,
    settings: ImportSettings,
) -> Any:
    """Import NumPy arrays.

    Run the same command again to resume an interrupted import.

    Example: embedcache import npy cache/ --file image=images.npy --table rows.parquet
    """
    files = {}
    for modality, paths in by_modality("--file", file, "audio=clap.npy", metavar="FILE").items():
        # The option may be repeated for other modalities, but a modality has one row per vector.
        if len(paths) > 1:
            raise SettingError(f"--file: expected one file of {modality} vectors, got {' and '.join(paths)}; name one")
        files[modality] = Path(paths[0])
    return _import(cache, settings, "npy", files=files, table=table)


def _import(cache: str, settings: ImportSettings, format_name: str, path: Path | None = None, **inputs: Any) -> Any:
    from embedcache.cli.console import open_progress
    from embedcache.vectors.importing import import_vectors
    from embedcache.vectors.opening import open_vectors

    return import_vectors(open_vectors(format_name, path, **inputs), cache, settings, progress=open_progress())
