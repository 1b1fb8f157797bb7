"""embedcache import"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedcache.cli.commands import add_command, new_group
from embedcache.cli.options import Json, Output, by_modality, with_settings
from embedcache.errors import SettingError
from embedcache.interop.settings import ImportSettings

if TYPE_CHECKING:
    from embedcache.interop.vector_files import VectorImport

app = new_group("Make a cache of vectors from other tools.")

NewCache = Annotated[
    str, typer.Argument(metavar="CACHE", help="New folder, or existing cache of the same import; may be a URL.")
]


@with_settings(settings=ImportSettings)
def clip_retrieval(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of clip-retrieval inference: img_emb, text_emb, metadata.")
    ],
    cache: NewCache,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ImportSettings,
) -> None:
    """Import vectors of clip-retrieval.

    Run the same command again to resume an interrupted import.

    Example: embedcache import clip-retrieval embeddings/ cache/
    """
    from embedcache.interop.clip_retrieval import open_clip_retrieval

    _import(open_clip_retrieval(folder), cache, settings, as_json=as_json, output=output)


@with_settings(settings=ImportSettings)
def datacomp(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Metadata of DataComp: NAME.parquet beside NAME.npz.")
    ],
    cache: NewCache,
    array: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=NAME",
            help="Array of vectors in the .npz, such as image=l14_img. May be repeated.",
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ImportSettings,
) -> None:
    """Import metadata and vectors of DataComp.

    Run the same command again to resume an interrupted import.

    Example: embedcache import datacomp metadata/ cache/ --array image=l14_img --array text=l14_txt
    """
    from embedcache.interop.npy import open_datacomp

    vectors = open_datacomp(folder, arrays=by_modality("--array", array, "image=l14_img", metavar="NAME"))
    _import(vectors, cache, settings, as_json=as_json, output=output)


@with_settings(settings=ImportSettings)
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
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ImportSettings,
) -> None:
    """Import vectors in list columns of Parquet.

    Keys, captions and all other columns are imported as well. Run the same command again to resume an interrupted
    import.

    Example: embedcache import parquet vectors.parquet cache/
    """
    from embedcache.interop.parquet import open_parquet_vectors

    vectors = open_parquet_vectors(
        path,
        vector_columns=by_modality("--vector-column", vector_column, "audio=clap", metavar="NAME"),
    )
    _import(vectors, cache, settings, as_json=as_json, output=output)


@with_settings(settings=ImportSettings)
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
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ImportSettings,
) -> None:
    """Import NumPy arrays.

    Run the same command again to resume an interrupted import.

    Example: embedcache import npy cache/ --file image=images.npy --table rows.parquet
    """
    from embedcache.interop.npy import open_npy_vectors

    named = by_modality("--file", file, "audio=clap.npy", metavar="FILE")
    for modality, paths in named.items():
        if len(paths) > 1:
            raise SettingError(f"--file: expected one file of {modality} vectors, got {' and '.join(paths)}; name one")
    files = {modality: Path(path) for modality, (path,) in named.items()}
    vectors = open_npy_vectors(files, table=table)
    _import(vectors, cache, settings, as_json=as_json, output=output)


def _import(
    vectors: "VectorImport", cache: str, settings: ImportSettings, *, as_json: bool, output: Path | None
) -> None:
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.interop.importing import import_vectors

    reports = import_vectors(vectors, cache, settings, progress=open_progress())

    def show() -> None:
        for report in reports:
            print_line(report.line())

    publish(show, lambda: to_plain(reports), as_json=as_json, output=output)


add_command(app, "clip-retrieval", clip_retrieval, runs_named_code=False)
add_command(app, "datacomp", datacomp, runs_named_code=False)
add_command(app, "parquet", parquet, runs_named_code=False)
add_command(app, "npy", npy, runs_named_code=False)
