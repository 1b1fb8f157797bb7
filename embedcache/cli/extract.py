"""embedcache extract and derive"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedcache.cli.commands import CacheArgument, by_modality, command, new_group
from embedcache.derive.settings import DeriveSettings
from embedcache.errors import SettingError
from embedcache.extract.settings import ExtractSettings
from embedcache.modalities import noun
from embedcache.settings import format_bytes
from embedcache.sources.open import SourceSettings

if TYPE_CHECKING:
    from embedcache.extract.extract import Plan
    from embedcache.reports.render import Presentation

app = new_group()


@command(
    app,
    "extract",
    settings=ExtractSettings,
    source_settings=SourceSettings,
    reads_items=True,
    plugins=("encoders", "sources", "views"),
    common=(
        "image_encoder",
        "text_encoder",
        "encoder",
        "feature",
        "source_type",
        "caption_column",
        "limit",
        "extend",
        "retry_failed",
        "plan",
        "device",
        "batch_size",
        "config",
    ),
)
def extract(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, table, WebDataset tars, Hugging Face dataset on disk or as hf:org/name, or a URL of these; "
            "prompts:FILE for the names of classes; prototypes:ENCODER for the classes of a classifier; "
            "CACHE itself for more encoders of the samples that it has.",
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
    plan: Annotated[bool, typer.Option("--plan", help="Estimate time, memory and disk, and stop.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry only the items that failed.")] = False,
    source_type: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Kind of source: folder, table, webdataset, hf, texts, prompts, … or module:attribute.",
            show_default="by its content",
        ),
    ] = None,
    *,
    settings: ExtractSettings,
    source_settings: SourceSettings,
) -> Any:
    """Encode a dataset once, into a cache.

    Run the same command again to resume an interrupted extraction; a second run changes nothing.

    Example: embedcache extract photos/ cache/ --image-encoder timm:resnet18 --text-encoder st:all-MiniLM-L6-v2
    """
    from embedcache.cli.console import open_progress
    from embedcache.extract.extract import extract as extract_features
    from embedcache.extract.extract import open_source_or_cache
    from embedcache.extract.extract import plan as make_plan
    from embedcache.extract.extract import retry_failed as retry
    from embedcache.reports.render import present
    from embedcache.store.cache import Cache, caption_error_lines

    if retry_failed and (plan or settings.extend):
        option = "--plan" if plan else "--extend"
        raise SettingError(f"--retry-failed: expected neither --plan nor --extend, got {option}; omit one of the two")

    opened = open_source_or_cache(source, cache, kind=source_type, settings=source_settings)
    options: dict[str, Any] = {
        "image_encoder": image_encoder or (),
        "text_encoder": text_encoder or (),
        "encoder": by_modality("--encoder", encoder, "audio=whisper:tiny.en", metavar="SPEC"),
        "settings": settings,
        "progress": open_progress(),
    }
    if plan:
        return _present_plan(make_plan(opened, cache, **options))
    if retry_failed:
        return retry(opened, cache, **options)

    # A second run encodes nothing, which must not look like a failure.
    reports = extract_features(opened, cache, **options)
    notes = caption_error_lines(Cache(cache))
    if not any(report.computed for report in reports):
        notes.append("nothing to do: every chunk is committed")
    return present(reports, notes=notes)


@command(app, "derive", settings=DeriveSettings, plugins=("rules",))
def derive(cache: CacheArgument, *, settings: DeriveSettings) -> Any:
    """Compute features from cached ones, by a run or a rule.

    They are features of the cache like any other. Run the same command again to resume an interrupted derivation, or
    after new samples were extracted.

    Example: embedcache derive cache/ --run run/ --run-output projected
    """
    from embedcache.cli.console import open_progress
    from embedcache.derive.derive import derive_with_settings

    return derive_with_settings(cache, settings, progress=open_progress())


def _present_plan(plan: "Plan") -> "Presentation":
    """Return the presentation of a plan. Too little space on the disk is an error after the plan was shown."""
    from embedcache.reports.render import Presentation, Section, to_plain

    rows = []
    for feature in plan.features:
        sizes = [f"{feature.num_items:,}", f"{feature.item_bytes:,.0f}", format_bytes(feature.num_bytes)]
        rows.append([feature.name, *sizes])

    notes = []
    for modality, rate in plan.rates.items():
        processes = f" on each of {plan.num_processes} devices" if plan.num_processes > 1 else ""
        notes.append(f"{noun(modality)}: measured {rate:,.1f} per second{processes}; {_time(plan.hours(modality))}")

    memory = format_bytes(plan.memory_bytes)
    notes.append(f"memory: {memory} per process for the outputs of two chunks; see --chunk-size")
    free = "" if plan.free_bytes is None else f"; {format_bytes(plan.free_bytes)} are free"
    notes.append(f"disk: {format_bytes(plan.num_bytes)}{free}")

    features = Section(title="missing features", table=(["feature", "items", "bytes per item", "disk"], rows))
    return Presentation(
        lines=[] if rows else [f"{plan.cache}: nothing is missing"],
        sections=[features] if rows else [],
        notes=notes if rows else [],
        record=lambda: to_plain(plan),
        finish=plan.check_space,
    )


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.1f} seconds"
