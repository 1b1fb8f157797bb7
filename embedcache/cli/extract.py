"""embedcache extract"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from embedcache.cli.options import (
    Address,
    CaptionColumns,
    ChunkSize,
    Json,
    KeyColumn,
    Output,
    split_names,
)
from embedcache.errors import SettingError

if TYPE_CHECKING:
    from embedcache.extract.plan import Plan


def extract(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, table, WebDataset tars, dataset on disk, or a URL.")
    ],
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="New folder, or existing cache of this source; may be a URL.")
    ],
    image_encoder: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Image encoder, as family:model. May be repeated.")
    ] = None,
    text_encoder: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Text encoder, as family:model. May be repeated.")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Features to store, such as cls,patches,grid:4,kmeans:4,layer6.cls.",
            show_default="each encoder's first",
        ),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Altered items to encode too: crop:0.5, flip or module:function. May be repeated."
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", metavar="", help="Estimate time, memory and disk, and stop.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", metavar="", help="Retry only the items that failed.")
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", metavar="", help="Append samples that were added to the source.")
    ] = False,
    source_type: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Kind of source, or module:attribute.", show_default="by its content"),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Table: column of image paths or bytes.")
    ] = None,
    caption_column: CaptionColumns = None,
    key_column: KeyColumn = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(metavar="float16|float32", help="Data type on disk.")
    ] = "float16",
    chunk_size: ChunkSize = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that decode.", show_default="one per core")
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Part of the chunks that this process extracts, for job arrays.")
    ] = "0/1",
    engine: Annotated[str, typer.Option(metavar="local|ray", help="Execution backend.")] = "local",
    address: Address = None,
    actors: Annotated[
        int | None,
        typer.Option(metavar="N", help="Ray: processes that hold encoders.", show_default="one per GPU"),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DEVICE",
            help="Torch devices, such as cpu or cuda:0,cuda:1; one process each.",
            show_default="all GPUs, else cpu",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Items per forward pass.", show_default="chosen by the encoder")
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(metavar="float32|bfloat16", help="Compute precision; bfloat16 uses autocast."),
    ] = "float32",
    compile_: Annotated[
        bool, typer.Option("--compile", metavar="", help="Compile the models with torch.compile.")
    ] = False,
    backend: Annotated[
        Literal["auto", "torch", "onnxruntime"],
        typer.Option(metavar="auto|torch|onnxruntime", help="auto uses onnxruntime on the CPU where possible."),
    ] = "auto",
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Encode a dataset once, into a cache.

    Run the same command again to resume an interrupted extraction; a second run changes nothing.

    Example: embedcache extract photos/ cache/ --image-encoder timm:resnet18 --text-encoder st:all-MiniLM-L6-v2
    """
    from embedcache.cli.console import open_progress, print_line, publish, resumable, to_plain
    from embedcache.encoders.settings import EncoderSettings
    from embedcache.extract import extract as stage
    from embedcache.extract import plan as planning
    from embedcache.extract import repair as retry
    from embedcache.extract.settings import ExtractSettings
    from embedcache.sources import SourceSettings, open_source
    from embedcache.store.cache import Cache, caption_error_lines

    if retry_failed and (plan or extend):
        raise SettingError("--retry-failed: expected neither --plan nor --extend beside it; leave them out")
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
        features=split_names(feature),
        views=split_names(view),
        dtype=dtype,
        chunk_size=chunk_size,
        threads=threads,
        worker=shard,
        devices=split_names(device),
        engine=engine,
        address=address,
        num_actors=actors,
        encoder=EncoderSettings(precision=precision, backend=backend, batch_size=batch_size, compile=compile_),
    )
    encoders: dict[str, Any] = {"image": image_encoder or (), "text": text_encoder or ()}
    progress = open_progress()
    with resumable():
        if plan:
            made = planning.plan(opened, cache, **encoders, settings=settings, extends=extend, progress=progress)
            publish(lambda: _show_plan(made), lambda: to_plain(made), as_json=as_json, output=output)
            made.require_space()
            return
        if retry_failed:
            lines = []
            reports: Any = retry.retry_failed(opened, cache, **encoders, settings=settings, progress=progress)
        else:
            reports = stage.extract(opened, cache, **encoders, settings=settings, extends=extend, progress=progress)
            lines = caption_error_lines(Cache(cache))

    def show() -> None:
        for line in [*(report.line() for report in reports), *lines]:
            print_line(line)

    publish(show, lambda: [to_plain(report) for report in reports], as_json=as_json, output=output)


def _show_plan(plan: "Plan") -> None:
    from embedcache.cli.console import print_line, print_table

    if not plan.features:
        print_line(f"{plan.cache}: nothing is missing")
        return
    rows = [
        [feature.name, f"{feature.num_items:,}", f"{feature.item_bytes:,.0f}", _bytes(feature.num_bytes)]
        for feature in plan.features
    ]
    print_table(["feature", "items", "bytes per item", "disk"], rows)
    for modality, rate in plan.rates.items():
        processes = f" on each of {plan.num_processes} devices" if plan.num_processes > 1 else ""
        print_line(f"{modality}s: measured {rate:,.1f} per second{processes}; {_time(plan.hours(modality))}")
    print_line(f"memory: {_bytes(plan.memory_bytes)} per process for the outputs of two chunks; see --chunk-size")
    free = "" if plan.free_bytes is None else f"; {_bytes(plan.free_bytes)} are free"
    print_line(f"disk: {_bytes(plan.num_bytes)}{free}")


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} seconds"
