"""Export a run in another library's format: complete, checked with that library, with a model card, or not at all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from embedcache.encoders.base import Modality
from embedcache.errors import SettingError
from embedcache.export.base import MODALITIES, ExportNotes, ExportRun
from embedcache.export.card import write_card
from embedcache.export.hub import CARD, push_folder
from embedcache.export.onnx import write_onnx
from embedcache.export.open_clip import write_open_clip
from embedcache.export.sentence_transformers import write_sentence_transformers
from embedcache.export.settings import ExportSettings
from embedcache.export.transformers import write_transformers
from embedcache.files import AnyPath, building, remove_folder
from embedcache.outputs import read_report_json
from embedcache.registry import unknown_name
from embedcache.settings import merge_settings

if TYPE_CHECKING:
    from embedcache.options import ExportOptions

FORMATS: Mapping[str, tuple[Callable[..., ExportNotes], Sequence[str], Sequence[Modality]]] = {
    "onnx": (write_onnx, ("towers",), ()),
    "open-clip": (write_open_clip, ("final", "hub_name"), MODALITIES),
    "sentence-transformers": (write_sentence_transformers, (), ("text",)),
    "transformers": (write_transformers, (), MODALITIES),
}
"""Format -> a function that fills an empty folder, checks it with the other library and returns notes, the names of the
options that it accepts, and the modalities that a run must have."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of an export.

    Args:
        differences: modality -> largest difference of the other library from the run in one component of a unit vector.
        url: where it was uploaded to, if it was.
    """

    differences: Mapping[str, float]
    url: str | None


def export_run(
    format_name: str,
    run: AnyPath,
    out: AnyPath,
    settings: ExportSettings | None = None,
    **options: Unpack["ExportOptions"],
) -> ExportReport:
    """Export a run, and upload it if requested.

    Args:
        format_name: a name in `FORMATS`.
        out: a new or empty folder.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        UnknownNameError: unknown format.
        PathError: the run does not exist, the folder is not empty, or the hub rejects the upload.
        SettingError: the format does not support the run or an option; the message says why.
        ArtifactError: the other library computes other vectors.
        MissingExtraError: the other library is not installed.
    """
    settings = merge_settings(ExportSettings, settings, options)
    run, out = Path(run), Path(out)
    if format_name not in FORMATS:
        raise unknown_name("export format", format_name, FORMATS)
    values = {"towers": settings.towers, "final": str(out.absolute()), "hub_name": settings.push_to_hub}
    arguments = {name: values[name] for name in FORMATS[format_name][1]}
    if settings.towers and "towers" not in arguments:
        raise SettingError(f"towers: expected false for the {format_name} format, got true")
    opened = ExportRun.open(run)
    opened.require(MODALITIES if settings.towers else FORMATS[format_name][2], format_name)
    metrics = None if settings.metrics is None else read_report_json(settings.metrics)

    with building(out) as temporary:
        notes = FORMATS[format_name][0](opened, temporary, **arguments)
        for cached in temporary.rglob("__pycache__"):
            remove_folder(cached)
        write_card(temporary / CARD, opened, notes, format_name, metrics)

    url = None if settings.push_to_hub is None else push_folder(out, settings.push_to_hub, is_public=settings.public)
    return ExportReport(differences=notes.differences, url=url)
