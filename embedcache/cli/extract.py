"""embedcache extract and derive"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from embedcache.cli.options import CacheArgument, Json, Output, by_modality, with_settings
from embedcache.derive.settings import DeriveSettings
from embedcache.errors import SettingError
from embedcache.extract.settings import ExtractSettings
from embedcache.modalities import noun
from embedcache.sources.settings import SourceSettings
from embedcache.units import format_bytes

if TYPE_CHECKING:
    from embedcache.extract.plan import Plan
    from embedcache.samples import Source


@with_settings(settings=ExtractSettings, source_settings=SourceSettings)
def extract(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, table, WebDataset tars, Hugging Face dataset on disk or as hf:org/name, or a URL of these; "
            "prompts:FILE for the names of classes; CACHE itself for more encoders of the samples that it has.",
        ),
    ],
    cache: Annotated[
        str, typer.Argument(metavar="CACHE", help="New folder, or existing cache of this source; may be a URL.")
    ],
    image_encoder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Image encoder, as family:model of timm, hf, open_clip, st or lite, or module:attribute. May be "
            "repeated.",
        ),
    ] = None,
    text_encoder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Text encoder, as family:model of st, hf or open_clip, or module:attribute. May be repeated.",
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=SPEC",
            help="Encoder of any modality, also of the families whisper and frames, such as "
            "audio=whisper:tiny.en. May be repeated.",
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", metavar="", help="Estimate time, memory and disk, and stop.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", metavar="", help="Retry only the items that failed.")
    ] = False,
    source_type: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Kind of source: folder, table, webdataset, hf, texts, prompts, … or module:attribute.",
            show_default="by its content",
        ),
    ] = None,
    as_json: Json = False,
    output: Output = None,
    *,
    settings: ExtractSettings,
    source_settings: SourceSettings,
) -> None:
    """Encode a dataset once, into a cache.

    Run the same command again to resume an interrupted extraction; a second run changes nothing.

    Example: embedcache extract photos/ cache/ --image-encoder timm:resnet18 --text-encoder st:all-MiniLM-L6-v2
    """
    from embedcache.cli.console import publish, to_plain
    from embedcache.extract.extract import open_source_or_cache

    if retry_failed and (plan or settings.extend):
        other = "--plan" if plan else "--extend"
        raise SettingError(f"--retry-failed: expected neither --plan nor --extend, got {other}; omit one of the two")
    opened = open_source_or_cache(source, cache, kind=source_type, settings=source_settings)
    encoders: dict[str, Any] = {
        "image_encoder": image_encoder or (),
        "text_encoder": text_encoder or (),
        "encoder": by_modality("--encoder", encoder, "audio=whisper:tiny.en", metavar="SPEC"),
    }
    run = _plan if plan else _retry if retry_failed else _extract
    report, show = run(opened, cache, encoders, settings)
    publish(show, lambda: to_plain(report), as_json=as_json, output=output)
    if plan:
        report.check_space()


@with_settings(settings=DeriveSettings)
def derive(cache: CacheArgument, as_json: Json = False, output: Output = None, *, settings: DeriveSettings) -> None:
    """Compute features from cached ones, by a run or a rule.

    They are features of the cache like any other. Run the same command again to resume an interrupted derivation, or
    after new samples were extracted.

    Example: embedcache derive cache/ --run run/ --run-output projected
    """
    from embedcache.cli.console import open_progress, print_line, publish, to_plain
    from embedcache.derive.derive import derive_with_settings

    reports = derive_with_settings(cache, settings, progress=open_progress())

    def show() -> None:
        for report in reports:
            print_line(report.line())

    publish(show, lambda: [to_plain(report) for report in reports], as_json=as_json, output=output)


_Outcome: TypeAlias = tuple[Any, Callable[[], None]]
"""What a command reports, and a function that prints it."""


def _extract(source: "Source", cache: str, encoders: Mapping[str, Any], settings: ExtractSettings) -> _Outcome:
    from embedcache.cli.console import open_progress, print_lines
    from embedcache.extract.extract import extract as extract_features
    from embedcache.store.cache import Cache, caption_error_lines

    reports = extract_features(source, cache, **encoders, settings=settings, progress=open_progress())
    lines = [*(report.line() for report in reports), *caption_error_lines(Cache(cache))]
    if not any(report.computed for report in reports):
        lines.append("nothing to do: every chunk is committed")
    return reports, lambda: print_lines(lines)


def _retry(source: "Source", cache: str, encoders: Mapping[str, Any], settings: ExtractSettings) -> _Outcome:
    from embedcache.cli.console import open_progress, print_lines
    from embedcache.extract.extract import retry_failed

    reports = retry_failed(source, cache, **encoders, settings=settings, progress=open_progress())
    return reports, lambda: print_lines([report.line() for report in reports])


def _plan(source: "Source", cache: str, encoders: Mapping[str, Any], settings: ExtractSettings) -> _Outcome:
    from embedcache.cli.console import open_progress
    from embedcache.extract.plan import plan

    made = plan(source, cache, **encoders, settings=settings, progress=open_progress())
    return made, lambda: _show_plan(made)


def _show_plan(plan: "Plan") -> None:
    from embedcache.cli.console import print_line, print_table

    if not plan.features:
        print_line(f"{plan.cache}: nothing is missing")
        return
    rows = [
        [feature.name, f"{feature.num_items:,}", f"{feature.item_bytes:,.0f}", format_bytes(feature.num_bytes)]
        for feature in plan.features
    ]
    print_table(["feature", "items", "bytes per item", "disk"], rows)
    for modality, rate in plan.rates.items():
        processes = f" on each of {plan.num_processes} devices" if plan.num_processes > 1 else ""
        print_line(f"{noun(modality)}: measured {rate:,.1f} per second{processes}; {_time(plan.hours(modality))}")
    print_line(f"memory: {format_bytes(plan.memory_bytes)} per process for the outputs of two chunks; see --chunk-size")
    free = "" if plan.free_bytes is None else f"; {format_bytes(plan.free_bytes)} are free"
    print_line(f"disk: {format_bytes(plan.num_bytes)}{free}")


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} seconds"
