"""Export a run in another library's format: complete, checked with that library, with a model card, or not at all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.encoders.base import Modality
from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.export.base import MODALITIES, ExportNotes, ExportRun
from embedcache.export.card import write_card
from embedcache.export.hub import push_folder
from embedcache.export.onnx import write_onnx
from embedcache.export.open_clip import write_open_clip
from embedcache.export.sentence_transformers import write_sentence_transformers
from embedcache.export.settings import RECORD, ExportSettings
from embedcache.export.transformers import write_transformers
from embedcache.files import AnyPath, building, remove_folder, remove_leftovers
from embedcache.outputs import read_report_json
from embedcache.projectors.saved import config_path
from embedcache.provenance import (
    DIGEST,
    check_same,
    construct,
    digest,
    digest_file,
    read_json,
    read_manifest,
    write_record,
)
from embedcache.registry import unknown_name
from embedcache.settings import merge_settings

FORMAT_VERSION = 1
CARD = "README.md"


FORMATS: Mapping[str, tuple[Callable[..., ExportNotes], Sequence[str], Sequence[Modality]]] = {
    "onnx": (write_onnx, ("towers",), ()),
    "open-clip": (write_open_clip, ("final", "hub_name"), MODALITIES),
    "sentence-transformers": (write_sentence_transformers, (), ("text",)),
    "transformers": (write_transformers, (), MODALITIES),
}
"""Format -> a function that fills an empty folder, checks it with the other library and returns notes, the names of the
options that the files depend on, which are recorded with the export, and the modalities that a run must have."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of an export.

    Args:
        differences: modality -> largest difference of the other library from the run in one component of a unit vector.
        url: where it was uploaded to, if it was.
        is_new: False: an identical export was reused.
    """

    differences: Mapping[str, float]
    url: str | None
    is_new: bool


def export_run(
    format_name: str, run: AnyPath, out: AnyPath, settings: ExportSettings | None = None, **options: Any
) -> ExportReport:
    """Export a run, and upload it if requested.

    An existing export of the same run with the same options is reused if its files are unchanged, which is checked; its
    model card may have been edited.

    Args:
        format_name: a name in `FORMATS`.
        out: a new or empty folder, or a folder with the same export.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        UnknownNameError: unknown format.
        PathError: the run does not exist, the folder holds something else, or the hub rejects the upload.
        SettingError: the format does not support the run or an option; the message says why.
        FingerprintError: the folder holds an export of another run, or was made with other options.
        CorruptError: a file of the existing export was changed.
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
    identity = {
        "form": format_name,
        "run": digest(read_json(config_path(run))),
        "metrics": digest(metrics),
        **arguments,
    }
    remove_leftovers(out)
    differences, is_new = _existing_differences(out, identity), False
    if differences is None:
        differences, is_new = _write(opened, out, identity, metrics, arguments), True
    url = None if settings.push_to_hub is None else push_folder(out, settings.push_to_hub, is_public=settings.public)
    return ExportReport(differences=differences, url=url, is_new=is_new)


def _existing_differences(folder: Path, identity: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Return the recorded differences of an existing export, after checking it; None if the folder is empty or new."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        got = "a folder of other files" if folder.is_dir() else "a file"
        raise PathError(f"{folder}: expected a new folder or an export, got {got}; give the path of a new folder")
    record = read_manifest(
        folder / RECORD,
        kind="export",
        make="embedcache export",
        next_step="give the path of a new folder",
    )
    existing = {name: record.get(name) for name in record if name not in ("format", "differences", "files", DIGEST)}
    check_same(f"the export {folder}", existing, identity, next_step="give the path of a new folder")
    files, differences = construct(folder / RECORD, lambda: (dict(record["files"]), dict(record["differences"])))
    for name, sha in files.items():
        if not (folder / name).is_file() or digest_file(folder / name) != sha:
            got = "other content" if (folder / name).is_file() else "no file"
            raise CorruptError(
                f"{folder / name}: expected the file that was exported, got {got}; give the path of a new folder"
            )
    return differences


def _write(
    run: ExportRun, folder: Path, identity: Mapping[str, Any], metrics: Any, options: Mapping[str, Any]
) -> Mapping[str, float]:
    format_name = str(identity["form"])
    with building(folder) as temporary:
        notes = FORMATS[format_name][0](run, temporary, **options)
        for cached in temporary.rglob("__pycache__"):
            remove_folder(cached)
        write_card(temporary / CARD, run, notes, format_name, metrics)
        files = sorted(path for path in temporary.rglob("*") if path.is_file() and path.name != CARD)
        record = {
            "format": FORMAT_VERSION,
            **identity,
            "differences": dict(notes.differences),
            "files": {str(path.relative_to(temporary)): digest_file(path) for path in files},
        }
        write_record(temporary / RECORD, record)
    return notes.differences
