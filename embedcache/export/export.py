"""Export a run in another library's format: complete, checked with that library, with a model card, or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from embedcache.errors import SettingError, summary
from embedcache.export.base import MODALITIES, ExportNotes, check_modalities
from embedcache.export.card import write_card
from embedcache.export.hub import CARD, push_folder
from embedcache.export.onnx import write_onnx
from embedcache.export.open_clip import write_open_clip
from embedcache.export.sentence_transformers import write_sentence_transformers
from embedcache.export.settings import ExportSettings
from embedcache.export.transformers import write_transformers
from embedcache.files import AnyPath, building, remove_folder
from embedcache.provenance import read_report_json
from embedcache.registry import unknown_name
from embedcache.runs import PAIR, Run
from embedcache.settings import merge_settings

if TYPE_CHECKING:
    from embedcache.options import ExportOptions


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of an export.

    Args:
        differences: modality -> largest difference of the other library from the run in one component of a unit vector.
        url: address of the uploaded model. None if it was not uploaded.

    Example:
        >>> report = embedcache.export_run("onnx", "run", "exported")
        >>> max(report.differences.values()) < 1e-5, report.url
        (True, None)
    """

    differences: Mapping[str, float]
    url: str | None

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the differences, and the address of the uploaded model."""
        lines = []
        for modality, difference in self.differences.items():
            lines.append(f"{modality}: differs from the run by at most {difference:.1e}")
        return lines if self.url is None else [*lines, self.url]


def export_run(
    format_name: str,
    run: AnyPath,
    out: AnyPath,
    settings: ExportSettings | None = None,
    **options: Unpack["ExportOptions"],
) -> ExportReport:
    """Export a run for another library, so that it can be used without embedcache. Upload it if requested.

    Args:
        format_name: `onnx`, `open-clip`, `sentence-transformers` or `transformers`.
        run: folder of the run.
        out: a new or empty folder.
        settings: metrics for the model card, and the upload.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        UnknownNameError: unknown format.
        PathError: the run does not exist, the folder is not empty, or the hub rejects the upload.
        SettingError: the format does not support the run or an option. The message says why.
        ArtifactError: the other library computes other vectors.
        MissingExtraError: the other library is not installed.

    Example:
        >>> report = embedcache.export_run("onnx", "run", "onnx-projectors")
        >>> sorted(path.name for path in Path("onnx-projectors").iterdir())
        ['README.md', 'image_projector.onnx', 'text_projector.onnx']
    """
    settings = merge_settings(ExportSettings, settings, options)
    out = Path(out)
    writers: dict[str, Callable[[Run, Path], ExportNotes]] = {
        "onnx": partial(write_onnx, towers=settings.towers),
        "open-clip": partial(write_open_clip, address=settings.push_to_hub or str(out.absolute())),
        "sentence-transformers": write_sentence_transformers,
        "transformers": write_transformers,
    }
    if format_name not in writers:
        raise unknown_name("export format", format_name, writers)
    if settings.towers and format_name != "onnx":
        raise SettingError(f"towers: expected false for the {format_name} format, got true")

    opened = Run.open(run, kind=PAIR)
    if settings.towers or format_name in ("open-clip", "transformers"):
        check_modalities(opened, MODALITIES, format_name)
    metrics = None if settings.metrics is None else read_report_json(settings.metrics)

    with building(out) as temporary:
        notes = writers[format_name](opened, temporary)

        # The check ran code in the folder, which left bytecode of this Python.
        for bytecode_folder in temporary.rglob("__pycache__"):
            remove_folder(bytecode_folder)
        write_card(temporary / CARD, opened, notes, format_name, metrics)

    url = None if settings.push_to_hub is None else push_folder(out, settings.push_to_hub, is_public=settings.public)
    return ExportReport(differences=notes.differences, url=url)
