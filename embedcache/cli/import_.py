"""embedcache import"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedcache.cli.options import (
    CacheArgument,
    CaptionColumns,
    ChunkSize,
    Json,
    KeyColumn,
    Output,
    SelectionOutput,
    add_command,
    new_group,
)

if TYPE_CHECKING:
    from embedcache.interop.incoming import Incoming

app = new_group("Make a cache of vectors from other tools.")

NewCache = Annotated[
    str, typer.Argument(metavar="CACHE", help="New folder, or existing cache of the same import; may be a URL.")
]
Model = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Description of the model that computed the vectors, for the record.")
]


def clip_retrieval(
    tree: Annotated[
        Path, typer.Argument(metavar="TREE", help="Folder of clip-retrieval inference: img_emb, text_emb, metadata.")
    ],
    cache: NewCache,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumns = None,
    chunk_size: ChunkSize = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Import vectors of clip-retrieval.

    Run the same command again to resume an interrupted import.

    Example: embedcache import clip-retrieval embeddings/ cache/
    """
    from embedcache.interop.clip_retrieval import open_tree

    _import(open_tree(tree), cache, model, key_column, caption_column, chunk_size, as_json=as_json, output=output)


def datacomp(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Metadata of DataComp: NAME.parquet beside NAME.npz.")
    ],
    cache: NewCache,
    image_array: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Array of image vectors, such as l14_img. May be repeated."),
    ] = None,
    text_array: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Array of text vectors, such as l14_txt. May be repeated."),
    ] = None,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumns = None,
    chunk_size: ChunkSize = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Import metadata and vectors of DataComp.

    Run the same command again to resume an interrupted import.

    Example: embedcache import datacomp metadata/ cache/ --image-array l14_img --text-array l14_txt
    """
    from embedcache.interop.datacomp import open_metadata

    incoming = open_metadata(folder, image=image_array or (), text=text_array or ())
    _import(incoming, cache, model, key_column, caption_column, chunk_size, as_json=as_json, output=output)


def parquet(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A .parquet file, or a folder of them.")],
    cache: NewCache,
    image_vector_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of image vectors.", show_default="image_vector")
    ] = None,
    text_vector_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of text vectors.", show_default="text_vector")
    ] = None,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumns = None,
    chunk_size: ChunkSize = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Import vectors in list columns of Parquet.

    With keys, captions and other columns. Run the same command again to resume an interrupted import.

    Example: embedcache import parquet vectors.parquet cache/
    """
    from embedcache.interop.parquet import open_parquet_vectors

    incoming = open_parquet_vectors(path, image=image_vector_column, text=text_vector_column)
    _import(incoming, cache, model, key_column, caption_column, chunk_size, as_json=as_json, output=output)


def npy(
    cache: NewCache,
    image_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .npy file of image vectors, (rows, width).")
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .npy file of text vectors; requires --table.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Table with the keys, captions and columns of the rows.")
    ] = None,
    model: Model = None,
    key_column: KeyColumn = None,
    caption_column: CaptionColumns = None,
    chunk_size: ChunkSize = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Import NumPy arrays.

    Run the same command again to resume an interrupted import.

    Example: embedcache import npy cache/ --image-file images.npy --table rows.parquet
    """
    from embedcache.interop.npy import open_arrays

    incoming = open_arrays(image=image_file, text=text_file, table=table)
    _import(incoming, cache, model, key_column, caption_column, chunk_size, as_json=as_json, output=output)


def _import(
    incoming: "Incoming",
    cache: str,
    model: str | None,
    key_column: str | None,
    caption_column: Sequence[str] | None,
    chunk_size: int | None,
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    from embedcache.cli.console import open_progress, print_line, publish, resumable, to_plain
    from embedcache.interop.importing import import_vectors
    from embedcache.sources import SourceSettings

    settings = SourceSettings(key_column=key_column, caption_columns=tuple(caption_column or ()))
    with resumable():
        reports = import_vectors(
            incoming, cache, model=model, chunk_size=chunk_size, settings=settings, progress=open_progress()
        )

    def show() -> None:
        for report in reports:
            print_line(report.line())

    publish(show, lambda: to_plain(reports), as_json=as_json, output=output)


def uids(
    path: Annotated[Path, typer.Argument(metavar="UIDS", help="List of uids of DataComp: a .npy file of dtype u8,u8.")],
    cache: CacheArgument,
    out: SelectionOutput,
) -> None:
    """Turn a list of uids of DataComp into a selection.

    `embedcache curate export --format datacomp` writes such a list.

    Example: embedcache import uids uids.npy cache/ selection.parquet
    """
    from embedcache.cli.console import print_line
    from embedcache.interop.datacomp import import_uids

    print_line(f"{out}: {import_uids(path, cache, out):,} samples")


add_command(app, "clip-retrieval", clip_retrieval)
add_command(app, "datacomp", datacomp)
add_command(app, "parquet", parquet)
add_command(app, "npy", npy)
add_command(app, "uids", uids)
