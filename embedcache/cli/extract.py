"""embedcache extract"""

from pathlib import Path
from typing import Annotated, Literal

import typer


def extract(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, a table, WebDataset tars, a saved Hugging Face dataset, texts, or openmoji:"
        ),
    ],
    cache: Annotated[Path, typer.Argument(help="A new folder, or a cache of this source.")],
    image: Annotated[list[str] | None, typer.Option(help="Encoder of images, family:model. May be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Encoder of captions, family:model. May be repeated.")] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(help="Feature to store, such as cls or patches. May be repeated. [default: each encoder's first]"),
    ] = None,
    source_type: Annotated[
        str | None,
        typer.Option(
            help="folder, table, webdataset, huggingface, texts, openmoji, module:attribute. [default: by its content]"
        ),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Table: column of paths or bytes.")] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="Table: column of captions. May be repeated.")
    ] = None,
    key_column: Annotated[str | None, typer.Option(help="Table: column of unique keys.")] = None,
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="On disk.")] = "float16",
    chunk_size: Annotated[int | None, typer.Option(help="Items in a chunk. [default: 2048]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that decode. [default: one a core]")] = None,
    worker: Annotated[str, typer.Option(help="This process's share of the chunks, i/n, for job arrays.")] = "0/1",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the forward pass.")] = "float32",
    backend: Annotated[
        Literal["auto", "torch", "onnxruntime"],
        typer.Option(help="auto: onnxruntime on the CPU where the family exports to it."),
    ] = "auto",
) -> None:
    """Run frozen encoders over a source, once, into a cache. Run it again to go on after a stop."""
    from embedcache.cli.console import open_progress, say
    from embedcache.encoders.contract import EncoderSettings
    from embedcache.extract.extract import extract as run
    from embedcache.extract.settings import ExtractSettings
    from embedcache.sources.open import open_source
    from embedcache.sources.settings import SourceSettings

    opened = open_source(
        source,
        kind=source_type,
        settings=SourceSettings(
            image_column=image_column,
            caption_columns=tuple(caption_column or ()),
            key_column=key_column,
        ),
    )
    settings = ExtractSettings(
        features=tuple(feature or ()),
        dtype=dtype,
        chunk_size=chunk_size,
        threads=threads,
        worker=worker,
        encoder=EncoderSettings(device=device, precision=precision, backend=backend),
    )
    reports = run(
        opened,
        cache,
        image=image or (),
        text=text or (),
        settings=settings,
        progress=open_progress(),
    )
    for report in reports:
        say(report.line())
