"""embedcache extract"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from embedcache.errors import SettingError

if TYPE_CHECKING:
    from embedcache.extract.plan import Plan


def extract(
    source: Annotated[str, typer.Argument(help="A folder, a table, WebDataset tars, a dataset on disk; or its URL.")],
    cache: Annotated[str, typer.Argument(help="A new folder, or a cache of this source; or its URL.")],
    image: Annotated[list[str] | None, typer.Option(help="Encoder of images, family:model. May be repeated.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="Encoder of captions, family:model. May be repeated.")] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help="Features to store, such as cls,patches,grid:4,kmeans:4,layer6.cls. [default: each encoder's first]"
        ),
    ] = None,
    view: Annotated[
        list[str] | None, typer.Option(help="Another look at each item, stored too: crop:0.5, flip, module:function.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Number the source, say what it will take, and stop.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the items again that failed, and nothing else.")
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Number samples that were added to the source behind the others.")
    ] = False,
    source_type: Annotated[
        str | None, typer.Option(help="A kind of source, or module:attribute. [default: by its content]")
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
    engine: Annotated[str, typer.Option(help="local, or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one on this machine]")] = None,
    actors: Annotated[int | None, typer.Option(help="Ray: processes that hold encoders. [default: by GPUs]")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda:0,cuda:1 …, a process each. [default: all GPUs, else cpu]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items in one forward pass. [default: the family's]")] = None,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the forward pass.")] = "float32",
    compile_: Annotated[bool, typer.Option("--compile", help="Let torch compile the models first.")] = False,
    backend: Annotated[
        Literal["auto", "torch", "onnxruntime"],
        typer.Option(help="auto: onnxruntime on the CPU where the family exports to it."),
    ] = "auto",
) -> None:
    """Run frozen encoders over a source, once, into a cache. Run it again to go on after a stop."""
    from embedcache.cli.console import going_on_later, open_progress, say
    from embedcache.encoders.settings import EncoderSettings
    from embedcache.extract import extract as stage
    from embedcache.extract import plan as planning
    from embedcache.extract import repair as retry
    from embedcache.extract.settings import ExtractSettings
    from embedcache.sources import SourceSettings, open_source
    from embedcache.store.cache import Cache, caption_error_lines

    if retry_failed and (plan or extend):
        raise SettingError("--retry-failed tries failed items again and nothing else; leave --plan and --extend out")
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
        features=_listed(feature),
        views=_listed(view),
        dtype=dtype,
        chunk_size=chunk_size,
        threads=threads,
        worker=worker,
        devices=_listed(device),
        engine=engine,
        address=address,
        num_actors=actors,
        encoder=EncoderSettings(precision=precision, backend=backend, batch_size=batch_size, compile=compile_),
    )
    encoders = {"image": image or (), "text": text or ()}
    progress = open_progress()
    with going_on_later():
        if plan:
            made = planning.plan(opened, cache, **encoders, settings=settings, extends=extend, progress=progress)
            _show_plan(made)
            made.require_space()
        elif retry_failed:
            for retried in retry.retry_failed(opened, cache, **encoders, settings=settings, progress=progress):
                say(retried.line())
        else:
            reports = stage.extract(opened, cache, **encoders, settings=settings, extends=extend, progress=progress)
            for line in [*(report.line() for report in reports), *caption_error_lines(Cache(cache))]:
                say(line)


def _show_plan(plan: "Plan") -> None:
    from embedcache.cli.console import say, show_table

    if not plan.features:
        say(f"{plan.cache}: nothing is missing")
        return
    rows = [
        [feature.name, f"{feature.num_items:,}", f"{feature.item_bytes:,.0f}", _bytes(feature.num_bytes)]
        for feature in plan.features
    ]
    show_table(["feature", "items", "bytes an item", "disk"], rows)
    for modality, rate in plan.rates.items():
        processes = f" on each of {plan.num_processes} devices" if plan.num_processes > 1 else ""
        say(f"{modality}s: {rate:,.1f} a second{processes}, measured; {_time(plan.hours(modality))}")
    say(f"memory: {_bytes(plan.memory_bytes)} a process for the outputs of two chunks; see --chunk-size")
    free = "" if plan.free_bytes is None else f"; {_bytes(plan.free_bytes)} are free"
    say(f"disk: {_bytes(plan.num_bytes)}{free}")


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} seconds"


def _listed(values: Sequence[str] | None) -> tuple[str, ...]:
    """Take an option that may be repeated and hold several names, `cls,patches`, apart."""
    return tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())
